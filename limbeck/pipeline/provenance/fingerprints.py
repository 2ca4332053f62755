"""Fingerprints of another model in rows: sentences in which a text names its model, and runs of words that a
given corpus shares.

Evidence, never proof: people quote, base models have read the web, and common phrases are common; and no
match proves no absence. (FastChat drops conversations that name a model, serve/monitor/clean_battle_data.py;
the idea is theirs.)
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...types import LimbeckError
from ..dataset_rows import response_text

RUN_LENGTH = 8  # words in a row
MAX_EXAMPLES = 3  # examples of each kind of trace
MAKERS = (
    "openai|anthropic|google(?: deepmind)?|meta(?: ai)?|microsoft|mistral(?: ai)?|alibaba(?: cloud)?|tencent|"
    "baidu|moonshot ai|zhipu ai|xai|deepseek|阿里云|腾讯|百度|月之暗面|智谱|深度求索"
)
MODELS = (
    r"chatgpt|gpt-?[345][\w.-]*|claude|gemini|bard|llama|qwen|mistral|grok|copilot|kimi|deepseek|ernie|glm|hunyuan|"
    "通义千问|文心一言|混元|豆包"
)
PATTERNS = {
    "names itself": (
        r"\b(?:i am|i'm|my name is|call me) (?:called |an? (?:ai|assistant) (?:called |named ))?"
        rf"(?:{MODELS})\b|(?:我是|我叫|我的名字(?:是|叫))[^，。！？]{{0,6}}?(?:{MODELS})"
    ),
    "names its maker": (
        rf"\b(?:developed|trained|created|made|built) by (?:{MAKERS})\b|"
        rf"由\s*(?:{MAKERS})[^，。！？]{{0,6}}?(?:开发|训练|研发|创造)"
    ),
    "speaks as an assistant does": (
        r"\bas an? (?:ai|artificial intelligence)(?: language)? (?:model|assistant)\b|"
        r"作为(?:一个|一名|一款)?\s*(?:人工智能|AI)\s*(?:语言)?\s*(?:模型|助手)"
    ),
}
_COMPILED = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in PATTERNS.items()}
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")

WordRun = tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """One kind of evidence: `Trace("names itself", 2, 640, (("clock/1#0", "I am ChatGPT"),))` is in 2 of 640
    rows.

    `examples` are ids of rows with the words that match.
    """

    kind: str
    rows: int
    of: int
    examples: tuple[tuple[str, str], ...]


def traces(rows: Iterable[dict[str, Any]], corpus: Path | None = None) -> list[Trace]:
    """Search rows (`id`, `completion`) for traces of other models, and for runs of eight words that `corpus`
    has.

    `corpus` is a text file, or JSONL whose texts are under completion, response, text, content or messages.
    Raises LimbeckError if it cannot be read.
    """
    texts = {row["id"]: response_text(row) for row in rows}
    evidence = [_trace(kind, len(texts), _match(pattern, texts)) for kind, pattern in _COMPILED.items()]
    if corpus:
        shared = _shared_runs(texts, corpus)
        evidence.append(_trace(f"shares {RUN_LENGTH} words in a row with {corpus.name}", len(texts), shared))
    return evidence


def _match(pattern: re.Pattern, texts: Mapping[str, str]) -> dict[str, str]:
    """The first match in each text that has one, by row id."""
    matches = {}
    for row_id, text in texts.items():
        match = pattern.search(text)
        if match:
            matches[row_id] = match[0]
    return matches


def _shared_runs(texts: Mapping[str, str], corpus: Path) -> dict[str, str]:
    """The first run of words that each text shares with the corpus, by row id."""
    known: set[WordRun] = set()
    for text in _texts(corpus):
        known.update(_runs(text))
    shared = {}
    for row_id, text in texts.items():
        run = next((run for run in _runs(text) if run in known), None)
        if run:
            shared[row_id] = " ".join(run)
    return shared


def _trace(kind: str, of: int, matches: Mapping[str, str]) -> Trace:
    """The trace of one kind; its examples are the most frequent matches."""
    frequency = Counter(matches.values())
    ordered = sorted(matches.items(), key=lambda match: (-frequency[match[1]], match[0]))
    return Trace(kind, len(matches), of, tuple(ordered[:MAX_EXAMPLES]))


def _runs(text: str) -> Iterator[WordRun]:
    words = _WORD.findall(text.lower())
    for i in range(len(words) - RUN_LENGTH + 1):
        yield tuple(words[i : i + RUN_LENGTH])


def _texts(path: Path) -> Iterator[str]:
    """The texts of a corpus: the lines of a text file, or the responses of JSONL rows."""
    if not path.is_file():
        raise LimbeckError(f"{path} is no file; name a text or JSONL file of the other model's outputs")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if path.suffix != ".jsonl":
            yield line
        elif line.strip():
            try:
                yield _response(json.loads(line))
            except (ValueError, AttributeError):
                raise LimbeckError(
                    f"{path}, line {number}: not a JSON object with a text; mend or delete the line"
                ) from None


def _response(row: dict[str, Any]) -> str:
    """The response in a corpus row: under one of four keys, or the assistant's messages."""
    for key in ("completion", "response", "text", "content"):
        if row.get(key):
            return str(row[key])
    replies = [message for message in row.get("messages", []) if message.get("role") == "assistant"]
    return " ".join(str(reply.get("content", "")) for reply in replies)
