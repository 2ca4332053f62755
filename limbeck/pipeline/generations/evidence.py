"""The evidence for the gate: what two models' evaluations say of them, problem by problem, and what each of
them cost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...eval.gate import Check, Decision, better, not_worse, paired
from ...eval.statistics import Interval, mean_interval
from ...report.loaded_run import EVALUATION
from ...report.paired import Verdicts, read_verdicts
from ...run_log import read
from ...tasks.files import language_of
from ...tasks.rewards import language_consistency
from ...text.reasoning_parser import split_thought
from ..store import Artifact
from .recipes import Plan

SUITE_ROWS = "suite_items.jsonl"


@dataclass(frozen=True)
class Measured:
    """A model as an evaluation found it: `Measured("r1", "rl-3fa9c1d07b52", interval, 75.2, 31.0, ...)`.

    `stage` is the name of its stage, `artifact` that of its folder in the store, and `accuracy` that on the
    gate's problems. `tokens` is the mean length of a response there. `seconds` and `flops` are what the whole
    evaluation took (sampling and scoring, on all problems and in all ways), and `right` the number of right
    responses among `responses`.
    """

    stage: str
    artifact: str
    accuracy: Interval
    tokens: float
    seconds: float
    flops: float
    right: int
    responses: int

    @property
    def seconds_per_right(self) -> float | None:
        """Seconds of the evaluation for each right response; None without any."""
        return self.seconds / self.right if self.right else None

    @property
    def flops_per_right(self) -> float | None:
        """FLOPs of the evaluation for each right response; None without any."""
        return self.flops / self.right if self.right else None


def measure(stage: str, model: Artifact, evaluation: Artifact, plan: Plan) -> Measured:
    """Return what the evaluation of a model found, on the gate's problems and in its way of sampling."""
    verdicts = read_verdicts(evaluation.folder)
    asked = [row for source in plan.better for row in verdicts[source, plan.mode].values()]
    found = json.loads((evaluation.folder / EVALUATION).read_text(encoding="utf-8"))
    lengths = [found["sources"][source]["modes"][plan.mode]["length"] for source in plan.better]
    weights = [len(verdicts[source, plan.mode]) for source in plan.better]
    responses = [value for rows in verdicts.values() for row in rows.values() for value in row["right"]]
    return Measured(
        stage=stage,
        artifact=model.folder.name,
        accuracy=mean_interval([row["right"] for row in asked]),
        tokens=float(np.average(lengths, weights=weights)),
        seconds=evaluation.manifest["seconds"],
        flops=evaluation.manifest["flops"] or 0.0,
        right=round(sum(responses)),
        responses=len(responses),
    )


def decide(plan: Plan, champion: Path, candidate: Path, votes: Sequence[int] = ()) -> Decision:
    """Return the gate's decision on a candidate, from the folders of both models' evaluations and people's
    `votes`: 1 for one in which the candidate wins, 0 for a tie, -1 for one that it loses."""
    gate = plan.settings.gate
    before = read_verdicts(champion)
    after = read_verdicts(candidate)
    pairs = [pair for source in plan.better for pair in _pairs(before, after, source, plan.mode)]
    checks = [better("accuracy", *paired(*_right(pairs)), gate.alpha)]
    language_P = _language(pairs)
    if len(language_P):
        checks.append(not_worse("language", language_P, gate.language_margin, gate.alpha))
    general_P = np.array([*_general(plan, before, after), *_suites(champion, candidate)])
    if len(general_P):
        checks.append(not_worse("general", general_P, gate.general_margin, gate.alpha))
    checks += _arena(plan, votes)
    return Decision(gate.alpha, tuple(checks))


Row = Mapping[str, Any]  # a problem's verdicts


def _pairs(before: Verdicts, after: Verdicts, source: str, mode: str) -> list[tuple[Row, Row]]:
    """Return the rows of both models for each problem of a source that both were asked."""
    theirs = after.get((source, mode), {})
    return [(row, theirs[name]) for name, row in before.get((source, mode), {}).items() if name in theirs]


def _right(pairs: Iterable[tuple[Row, Row]]) -> tuple[list[list[float]], list[list[float]]]:
    """Return the accuracies of both models' responses, problem by problem."""
    pairs = list(pairs)
    return [row["right"] for row, _ in pairs], [row["right"] for _, row in pairs]


def _language(pairs: Iterable[tuple[Row, Row]]) -> np.ndarray:
    """Return the differences [P] of language consistency of the first responses, where both have words."""
    shares = [(_consistency(row), _consistency(other)) for row, other in pairs]
    return np.array([after - before for before, after in shares if None not in (before, after)])


def _consistency(row: Row) -> float | None:
    """Return the share of words of a response's thought that are in the language of the prompt."""
    text = row["text"]
    return language_consistency(split_thought(text).thought or text, language_of(row["prompt"]))


def _general(plan: Plan, before: Verdicts, after: Verdicts) -> Iterator[float]:
    """Yield the difference on each problem of the sources that stand for general ability."""
    for source in plan.general:
        pairs = _pairs(before, after, source, plan.mode)
        if pairs:
            yield from paired(*_right(pairs))[0]


def _suites(champion: Path, candidate: Path) -> Iterator[float]:
    """Yield the difference on each item of the named benchmarks that both evaluations have."""
    before, after = (_scores(folder) for folder in (champion, candidate))
    for item, score in before.items():
        if item in after:
            yield after[item] - score


def _scores(evaluation: Path) -> dict[tuple[str, str], float]:
    """Return the score of each item of an evaluation's named benchmarks, by the first metric, by the names
    of benchmark and item."""
    scores = {}
    for row in read(evaluation / SUITE_ROWS):
        verdicts = next(iter(row["verdicts"].values()))
        values = [float(value) for sample in verdicts for value in sample]
        scores[row["suite"], str(row["item"])] = sum(values) / len(values)
    return scores


def _arena(plan: Plan, votes: Sequence[int]) -> list[Check]:
    """Return the check of the arena's votes; none if there are too few."""
    gate = plan.settings.gate
    if len(votes) < gate.votes:
        return []
    return [not_worse("arena", np.array(votes, float), gate.arena_margin, gate.alpha)]
