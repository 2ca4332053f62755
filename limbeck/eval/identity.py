"""Whether an answer says who wrote it: such a battle is not blind, and nobody votes on it."""

from __future__ import annotations

import re
from collections.abc import Iterable

# what models call themselves, and who made them; with any of them in an answer, FastChat drops a battle as well
KNOWN = (
    "deepseek", "qwen", "qwq", "tongyi", "llama", "smollm", "mistral", "mixtral", "gemma", "gemini", "phi-2", "phi-3", "phi-4", "chatgpt",
    "gpt-2", "gpt-3", "gpt-4", "gpt-5", "openai", "claude", "anthropic", "kimi", "moonshot", "chatglm", "zhipu", "minimax", "ernie", "olmo",
    "falcon-7b", "vicuna", "alpaca", "limbeck", "alibaba", "通义千问", "千问", "深度求索", "文心一言", "智谱", "月之暗面", "阿里云",
)  # fmt: skip
_SELF = r"(?:\bi am|\bi['’]m|\bmy name is|\bthis is|\bcalled|\bas|我是|我叫|名叫|名字是|作为)\s*(?:the model\s+|a\s+|an\s+|the\s+)?[\"“‘'*_`]*"


def revealed(answer: str, prompt: str, names: Iterable[str]) -> str:
    """The word by which an answer gives its author away, or nothing. What the prompt itself mentions gives nobody away.

    `names` are those that models are served under. One that could be an ordinary word ("zero", "small") counts only where
    somebody speaks of themselves.

    >>> (
    ...     revealed("I am zero, and 2 - 2 is zero.", "2 - 2?", ["zero"]),
    ...     revealed("2 - 2 is zero.", "2 - 2?", ["zero"]),
    ... )
    ('zero', '')
    """
    text, asked = answer.casefold(), prompt.casefold()
    for name in dict.fromkeys(name.casefold() for name in (*KNOWN, *names)):
        known = name in KNOWN or (len(name) > 4 and re.search(r"\d", name) and re.search(r"[^\W\d]", name))
        word = (
            rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])"
            if name not in KNOWN
            else rf"(?<![a-z]){re.escape(name)}"
        )
        if name not in asked and re.search(word if known else _SELF + word, text):
            return name
    return ""
