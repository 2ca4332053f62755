"""Traces of another model in rows: who the text says it is, and runs of words that a given corpus has as well.

Evidence, never proof: people quote, base models have read the web, and common phrases are common. What was not found says
as little. (FastChat drops conversations that name a model, serve/monitor/clean_battle_data.py; the idea is theirs.)
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...types import LimbeckError
from ..dataset_rows import said

RUN = 8  # words in a row
SHOWN = 3  # examples of each kind
MAKERS = "openai|anthropic|google(?: deepmind)?|meta(?: ai)?|microsoft|mistral(?: ai)?|alibaba(?: cloud)?|tencent|baidu|moonshot ai|zhipu ai|xai|deepseek|阿里云|腾讯|百度|月之暗面|智谱|深度求索"
MODELS = "chatgpt|gpt-?[345][\\w.-]*|claude|gemini|bard|llama|qwen|mistral|grok|copilot|kimi|deepseek|ernie|glm|hunyuan|通义千问|文心一言|混元|豆包"
SAYS = {
    "names itself": rf"\b(?:i am|i'm|my name is|call me) (?:called |an? (?:ai|assistant) (?:called |named ))?(?:{MODELS})\b|(?:我是|我叫|我的名字(?:是|叫))[^，。！？]{{0,6}}?(?:{MODELS})",
    "names its maker": rf"\b(?:developed|trained|created|made|built) by (?:{MAKERS})\b|由\s*(?:{MAKERS})[^，。！？]{{0,6}}?(?:开发|训练|研发|创造)",
    "speaks as an assistant does": r"\bas an? (?:ai|artificial intelligence)(?: language)? (?:model|assistant)\b|作为(?:一个|一名|一款)?\s*(?:人工智能|AI)\s*(?:语言)?\s*(?:模型|助手)",
}
_SAYS = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in SAYS.items()}
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")


@dataclass(frozen=True)
class Trace:
    """One kind of evidence: `Trace("names itself", 2, 640, (("clock/1#0", "I am ChatGPT"),))`: 2 of 640 rows, with examples."""

    kind: str
    rows: int
    of: int
    examples: tuple[tuple[str, str], ...]


def traces(rows: Iterable[dict[str, Any]], corpus: Path | None = None) -> list[Trace]:
    """Look for other models' traces in rows (`id`, `completion`), and for `corpus`'s runs of eight words in them.

    `corpus` is a text file, or JSONL whose texts are under completion, response, text, content or messages.
    """
    texts = {row["id"]: said(row) for row in rows}
    found = [_trace(kind, len(texts), _matches(pattern, texts)) for kind, pattern in _SAYS.items()]
    if corpus:
        known = {run for text in _texts(corpus) for run in _runs(text)}
        hits = {
            id: " ".join(run)
            for id, text in texts.items()
            if (run := next((r for r in _runs(text) if r in known), None))
        }
        found.append(_trace(f"shares {RUN} words in a row with {corpus.name}", len(texts), hits))
    return found


def _matches(pattern: re.Pattern, texts: dict[str, str]) -> dict[str, str]:
    found = ((id, pattern.search(text)) for id, text in texts.items())
    return {id: match[0] for id, match in found if match}


def _trace(kind: str, of: int, hits: dict[str, str]) -> Trace:
    usual = Counter(hits.values())  # what is said most often first
    ordered = sorted(hits.items(), key=lambda hit: (-usual[hit[1]], hit[0]))
    return Trace(kind, len(hits), of, tuple(ordered[:SHOWN]))


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    said = _WORD.findall(text.lower())
    return (tuple(said[i : i + RUN]) for i in range(len(said) - RUN + 1))


def _texts(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise LimbeckError(f"{path} is no file; name a text or JSONL file of the other model's outputs")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if path.suffix != ".jsonl":
            yield line
        elif line.strip():
            try:
                yield _said(json.loads(line))
            except (ValueError, AttributeError):
                raise LimbeckError(
                    f"{path}, line {number}: not a JSON object with a text; mend or delete the line"
                ) from None


def _said(row: dict[str, Any]) -> str:
    messages = " ".join(
        str(m.get("content", "")) for m in row.get("messages", []) if m.get("role") == "assistant"
    )
    return next(
        (str(row[key]) for key in ("completion", "response", "text", "content") if row.get(key)), messages
    )
