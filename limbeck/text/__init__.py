"""Conversion between text and token ids: tokenizer, chat template, incremental detokenizer, and reasoning
parser. Nothing here imports torch."""
