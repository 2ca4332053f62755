"""Text and token ids: tokenizer, chat template, incremental detokenizer, reasoning parser. No torch."""
