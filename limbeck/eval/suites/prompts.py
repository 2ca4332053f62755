"""The prompts of a suite's items: description, worked examples and question, as the protocol has them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from ...text.tokenizer import Tokenizer
from .suite import Item, Prompt, fill

SHOTS_SEED = 1234  # lm-eval's default `fewshot_random_seed`
BETWEEN_EXAMPLES = "\n\n"


def build_prompts(prompt: Prompt, items: Sequence[Item], pool: Sequence[Item] = ()) -> list[str]:
    """Return the text of the prompt of each item. `pool` are the items of the split that examples are drawn
    from. Random examples depend on the order of the items, as they do in lm-eval."""
    rng = random.Random(SHOTS_SEED)
    texts = []
    for item in items:
        description = fill(prompt.description, category=item.category)
        texts.append(description + _examples(prompt, item, pool, rng) + prompt.fill(item))
    return texts


def _examples(prompt: Prompt, item: Item, pool: Sequence[Item], rng: random.Random) -> str:
    """Return the worked examples of one item, each followed by an empty line."""
    shots = prompt.shots
    if shots is None:
        return ""
    pairs = [(Item("", question, ""), answer) for question, answer in shots.fixed]
    if shots.split:
        same = [other for other in pool if not item.category or other.category == item.category]
        chosen = rng.sample(same, shots.count) if shots.order == "random" else same[: shots.count]
        pairs = [(example, prompt.answer(example)) for example in chosen]
    return "".join(f"{prompt.fill(example)} {answer}{BETWEEN_EXAMPLES}" for example, answer in pairs)


class TextTokenizer(Tokenizer):
    """A tokenizer whose prompts are texts to be continued: without the chat template, and with the special
    tokens that the tokenizer itself puts before a text, as transformers does."""

    def __init__(self, tokenizer: Tokenizer):
        self.__dict__.update(tokenizer.__dict__)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text with the special tokens of the tokenizer's post-processor."""
        return self.backend.encode(text, add_special_tokens=True).ids

    def prompt(self, question: str) -> np.ndarray:
        """Return the token ids [N] of a text."""
        return np.array(self.encode(question), dtype=np.int64)
