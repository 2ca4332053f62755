"""Published scores of known models, from `published.yaml`, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class PublishedScore:
    """A published score, in percent: `PublishedScore("DeepSeek-R1", "math-500", 97.3, "DeepSeek-R1, ...",
    "https://...", "2025-01-22", "at most 32,768 tokens ...")`. `how` says how it was measured."""

    model: str
    suite: str
    score: float
    title: str
    url: str
    date: str
    how: str


@lru_cache(maxsize=1)
def published_scores() -> tuple[PublishedScore, ...]:
    """Return all published scores, in the order of the file."""
    data = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    scores = []
    for model, rows in data["scores"].items():
        for row in rows:
            source = data["sources"][row["source"]]
            about = (source["title"], source["url"], str(source["date"]), source["how"])
            scores += [PublishedScore(model, name, row[name], *about) for name in row if name != "source"]
    return tuple(scores)


def scores_of(suite: str) -> list[PublishedScore]:
    """Return the published scores on a suite, the highest first."""
    return sorted((one for one in published_scores() if one.suite == suite), key=lambda one: -one.score)
