"""Published scores of known models, from `published.yaml`, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class PublishedScore:
    """A published score, in percent: `PublishedScore("DeepSeek-R1", "math-500", "", 97.3, "DeepSeek-R1, ...",
    "https://...", "2025-01-22", "at most 32,768 tokens ...")`. `metric` is "" for the suite's first metric,
    and `cons@64` for a majority vote; `how` says how it was measured."""

    model: str
    suite: str
    metric: str
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
            for name, score in row.items():
                if name != "source":
                    suite, _, metric = name.partition("/")
                    scores.append(PublishedScore(model, suite, metric, score, *about))
    return tuple(scores)


def scores_of(suite: str, metric: str = "") -> list[PublishedScore]:
    """Return the published scores on a suite in a metric, the highest first."""
    found = (one for one in published_scores() if (one.suite, one.metric) == (suite, metric))
    return sorted(found, key=lambda one: -one.score)
