"""Traces of other models in rows: sentences in which a text names the model that wrote it, and runs of
consecutive words that also occur in a given corpus.

A trace is evidence, not proof: people quote models, base models were trained on web text, and some phrases
are common. Likewise, no match does not prove that no other model was involved. (The idea is from FastChat,
which drops conversations that name a model, serve/monitor/clean_battle_data.py.)
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
    """One kind of evidence: `Trace("names itself", 2, 640, (("clock/1#0", "I am ChatGPT"),))` was found in 2
    of 640 rows.

    `examples` are pairs of a row's id and the words that match.
    """

    kind: str
    rows: int
    of: int
    examples: tuple[tuple[str, str], ...]


def traces(rows: Iterable[dict[str, Any]], corpus: Path | None = None) -> list[Trace]:
    """Search rows (with `id`, and `completion` or a preference pair) for sentences that name another model,
    and for runs of eight words that also occur in `corpus`. Return one trace per kind of evidence.

    `corpus` is a text file, or a JSONL file whose texts are under completion, response, text, content or
    messages. Raises LimbeckError if it cannot be read.
    """
    texts = {row["id"]: response_text(row) for row in rows}
    evidence = [_trace(kind, len(texts), _match(pattern, texts)) for kind, pattern in _COMPILED.items()]
    if corpus:
        shared = _shared_runs(texts, corpus)
        evidence.append(_trace(f"shares {RUN_LENGTH} words in a row with {corpus.name}", len(texts), shared))
    return evidence


def _match(pattern: re.Pattern, texts: Mapping[str, str]) -> dict[str, str]:
    """Return the first match of the pattern in each text that has one, by row id. `texts` maps row ids to
    texts."""
    matches = {}
    for row_id, text in texts.items():
        match = pattern.search(text)
        if match:
            matches[row_id] = match[0]
    return matches


def _shared_runs(texts: Mapping[str, str], corpus: Path) -> dict[str, str]:
    """Return the first run of words that each text shares with the corpus, by row id. `texts` maps row ids to
    texts."""
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
    """Return the trace of one kind. `of` is the number of rows searched, `matches` maps row ids to matches;
    the most frequent matches become the examples."""
    frequency = Counter(matches.values())
    ordered = sorted(matches.items(), key=lambda match: (-frequency[match[1]], match[0]))
    return Trace(kind, len(matches), of, tuple(ordered[:MAX_EXAMPLES]))


def _runs(text: str) -> Iterator[WordRun]:
    words = _WORD.findall(text.lower())
    for i in range(len(words) - RUN_LENGTH + 1):
        yield tuple(words[i : i + RUN_LENGTH])


def _texts(path: Path) -> Iterator[str]:
    """Yield the texts of a corpus: the lines of a text file, or the responses in a JSONL file."""
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
    """Return the response in a row of a JSONL corpus: the text under one of four keys, or the assistant's
    messages joined."""
    for key in ("completion", "response", "text", "content"):
        if row.get(key):
            return str(row[key])
    replies = [message for message in row.get("messages", []) if message.get("role") == "assistant"]
    return " ".join(str(reply.get("content", "")) for reply in replies)
