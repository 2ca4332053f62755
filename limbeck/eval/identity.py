"""Detection of names of models and makers in an answer. A comparison of anonymous answers in which an answer
names its author is not blind, and accepts no votes."""

from __future__ import annotations

import re
from collections.abc import Iterable

# names of models and of their makers; FastChat, too, drops a battle with one of them in an answer
KNOWN = (
    "deepseek", "qwen", "qwq", "tongyi", "llama", "smollm", "mistral", "mixtral", "gemma", "gemini",
    "phi-2", "phi-3", "phi-4", "chatgpt", "gpt-2", "gpt-3", "gpt-4", "gpt-5", "openai", "claude",
    "anthropic", "kimi", "moonshot", "chatglm", "zhipu", "minimax", "ernie", "olmo", "falcon-7b",
    "vicuna", "alpaca", "limbeck",
    "alibaba", "通义千问", "千问", "深度求索", "文心一言", "智谱", "月之暗面", "阿里云",
)  # fmt: skip
# phrases before a name by which the author of an answer names itself
_SELF = (
    r"(?:\bi am|\bi['’]m|\bmy name is|\bthis is|\bcalled|\bas|我是|我叫|名叫|名字是|作为)"
    r"\s*(?:the model\s+|a\s+|an\s+|the\s+)?[\"“‘'*_`]*"
)
MIN_NAME = 5  # characters of a name with digits and letters that is no ordinary word


def author_name(answer: str, prompt: str, names: Iterable[str]) -> str:
    """Return the name by which an answer reveals its author, or "". A name that also appears in the prompt
    reveals nothing.

    `names` are the names of the models that are served. A name that could be an ordinary word ("zero",
    "small") counts only after a phrase such as "I am", as the example shows.

    >>> (
    ...     revealed("I am zero, and 2 - 2 is zero.", "2 - 2?", ["zero"]),
    ...     revealed("2 - 2 is zero.", "2 - 2?", ["zero"]),
    ... )
    ('zero', '')
    """
    answer = answer.casefold()
    prompt = prompt.casefold()
    folded = (name.casefold() for name in (*KNOWN, *names))
    for name in dict.fromkeys(folded):
        if name not in prompt and re.search(_pattern(name), answer):
            return name
    return ""


def _pattern(name: str) -> str:
    """Return the regular expression that matches a model's name where it reveals the author of an answer."""
    escaped = re.escape(name)
    if name in KNOWN:
        return rf"(?<![a-z]){escaped}"
    word = rf"(?<![a-z0-9]){escaped}(?![a-z0-9])"
    return word if _unusual(name) else _SELF + word


def _unusual(name: str) -> bool:
    """Return True if a name cannot be an ordinary word: it is long enough, and has both a digit and a
    letter."""
    if len(name) < MIN_NAME:
        return False
    return bool(re.search(r"\d", name) and re.search(r"[^\W\d]", name))
