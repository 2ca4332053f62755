"""Accuracy with intervals on held-out problems: pass@1 in several ways of sampling, pass@k, majority votes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Protocol

from ..config.recipe import Evaluate
from ..types import Group, Problem, Sampler, generator
from . import statistics

SHOWN = 24  # problems whose responses are kept to be read
VOTES = 8


class Problems(Protocol):
    """What an evaluation needs to know of a source."""

    def problems(self, name: str, split: str = "train") -> Sequence[Problem]: ...

    def score(self, group: Group) -> Group: ...


def evaluate(
    engine: Sampler,
    sources: Mapping[str, Problems],
    settings: Evaluate,
    ways: Mapping[str, Any],
    seed: str,
    done: int = 0,
) -> Iterator[dict[str, Any]]:
    """Every source in every way of sampling (`ways`: name -> sampling parameters), from the `done`-th pair on.

    Yields each pair's numbers, some responses to read, and how many tokens it took. The same seed asks every
    model the same problems.
    """
    for source, way in list(product(sources, ways))[done:]:
        problems = _held_out(sources[source].problems(source, "test"), settings.prompts, (seed, source))
        asked, copies = _quota(problems, way, settings)
        groups = [
            sources[source].score(g)
            for g in engine.rollout(asked, copies, ways[way], (seed, "evaluate", way))
        ]
        yield {
            "source": source,
            "way": way,
            "modes": measure(way, groups),
            "samples": [_shown(group, way) for group in groups[:SHOWN]],
            "tokens": sum(len(c.tokens) for g in groups for c in g.completions),
        }


def combine(parts: Sequence[Mapping[str, Any]], seed: str) -> dict[str, Any]:
    """The whole evaluation of one model, of what `evaluate` yielded."""
    sources: dict[str, Any] = {}
    for part in parts:
        sources.setdefault(part["source"], {"modes": {}})["modes"].update(part["modes"])
    return {"seed": seed, "sources": sources}


def measure(way: str, groups: Sequence[Group]) -> dict[str, Any]:
    """The numbers of one way of sampling; `pass@8` also gives the majority's `cons@8`."""
    right = [[score.parts["accuracy"] for score in g.scores] for g in groups]
    if way.startswith("pass@"):
        k = int(way.removeprefix("pass@"))
        passed = statistics.mean_interval([[statistics.pass_at_k(len(r), int(sum(r)), k)] for r in right])
        votes = statistics.mean_interval([[_majority(g)] for g in groups])
        return {way: {"accuracy": _described(passed)}, f"cons@{k}": {"accuracy": _described(votes)}}
    return {way: {"accuracy": _described(statistics.mean_interval(right)), **_means(groups)}}


def _held_out(problems: Sequence[Problem], count: int, seed: object) -> list[Problem]:
    order = generator(seed, "held out").permutation(len(problems))
    return [problems[i] for i in order[:count]]


def _quota(problems: list[Problem], way: str, settings: Evaluate) -> tuple[list[Problem], int]:
    """Fewer problems where each is asked many times; once each for greedy, which would only repeat itself."""
    if way.startswith("pass@"):
        return problems[: max(1, len(problems) // VOTES)], int(way.removeprefix("pass@"))
    return problems, 1 if "greedy" in way else settings.samples


def _majority(group: Group) -> float:
    """Is the most frequent answer right? Of equals, the first given counts."""
    winner = statistics.consensus([score.answer or None for score in group.scores])
    return next((score.parts["accuracy"] for score in group.scores if winner and score.answer == winner), 0.0)


def _means(groups: Sequence[Group]) -> dict[str, Any]:
    completions = [c for g in groups for c in g.completions]
    scores = [s for g in groups for s in g.scores]
    names = sorted({name for s in scores for name in s.stats})
    stats = {name: _mean([s.stats[name] for s in scores if name in s.stats]) for name in names}
    return {
        "length": _mean([len(c.tokens) for c in completions]),
        "truncated": _mean([not c.stopped for c in completions]),
        "format": _mean([s.parts.get("format", 0.0) for s in scores]),
        "language_consistency": _mean([s.parts["language"] for s in scores if "language" in s.parts]),
        "stats": stats,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _described(interval: Any) -> dict[str, Any]:
    return {name: getattr(interval, name) for name in ("mean", "low", "high", "n", "problems")}


def _shown(group: Group, way: str) -> dict[str, Any]:
    completion, score, problem = group.completions[0], group.scores[0], group.problem
    return {
        "problem": problem.id,
        "prompt": problem.prompt,
        "language": problem.language,
        "mode": way,
        "text": completion.text,
        "correct": bool(score.parts["accuracy"]),
        "length": len(completion.tokens),
        "reasons": dict(score.reasons),
    }
