"""Evaluation on held-out problems: pass@1 with several sets of sampling parameters, pass@k, and majority
voting.

A way of sampling is a named set of sampling parameters, such as `greedy` or `pass@8`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, product
from typing import Any, Protocol

from ..activity import track
from ..config.recipe import Evaluate
from ..text.reasoning_parser import OPEN, count_thought_tokens
from ..text.tokenizer import Tokenizer
from ..types import Completion, Group, Problem, Sampler, Score, generator
from . import statistics

SAMPLES = 24  # number of problems whose first completion is part of the result
MAJORITY_SHARE = 8  # pass@k is evaluated on one of every 8 problems
PASS = 8  # completions of a problem from which a way of sampling that is not pass@k also gives pass@8


class Problems(Protocol):
    """A source of problems that can also score completions."""

    def problems(self, name: str, split: str = "train") -> Sequence[Problem]:
        """Return the problems of the split `train` or `test` of the source `name`."""

    def score(self, group: Group) -> Group:
        """Return the group with a score for each completion."""


def evaluate(
    engine: Sampler,
    tokenizer: Tokenizer,
    sources: Mapping[str, Problems],
    settings: Evaluate,
    ways: Mapping[str, Any],
    seed: str,
    done: int = 0,
) -> Iterator[dict[str, Any]]:
    """Evaluate a model on each source with each way of sampling. `ways` maps the name of a way to its
    sampling parameters; `tokenizer` is the model's.

    `done` is the number of pairs of source and way that are finished already; they are skipped. Yields, for
    each remaining pair, its metrics, some samples, the verdicts on all completions, and the number of their
    tokens. Every model that is evaluated with the same seed is given the same problems."""
    for source, way in list(product(sources, ways))[done:]:
        task = sources[source]
        test = task.problems(source, "test")
        held_out = _held_out(test, settings.prompts, (seed, source))
        problems, n = _limit(held_out, way, settings)
        rollouts = engine.rollout(problems, n, ways[way], (seed, "evaluate", way))
        groups = [task.score(group) for group in track(rollouts, "scoring", "problems")]
        lengths = [len(completion.tokens) for completion in _completions(groups)]
        yield {
            "source": source,
            "way": way,
            "modes": measure(way, groups, tokenizer),
            "samples": [_sample(group, way) for group in groups[:SAMPLES]],
            "verdicts": [{"source": source, **_verdict(group, way)} for group in groups],
            "tokens": sum(lengths),
        }


def combine(parts: Sequence[Mapping[str, Any]], seed: str) -> dict[str, Any]:
    """Combine all that `evaluate` yielded for one model into one evaluation."""
    sources: dict[str, Any] = {}
    for part in parts:
        source = sources.setdefault(part["source"], {"modes": {}})
        source["modes"].update(part["modes"])
    return {"seed": seed, "sources": sources}


def measure(way: str, groups: Sequence[Group], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the metrics of one way of sampling. For a way `pass@8`, they also include `cons@8`, the
    accuracy of the majority vote among 8 completions; for another way with 8 completions of each problem or
    more, `pass@8` from these."""
    right = []
    for group in groups:
        right.append([score.parts["accuracy"] for score in group.scores])
    if not way.startswith("pass@"):
        metrics = {"accuracy": _interval(right), **_measures(groups, tokenizer)}
        if min(map(len, right)) >= PASS:
            metrics[f"pass@{PASS}"] = _passed(right, PASS)
        return {way: metrics}
    k = _k(way)
    majority = [[_majority(group)] for group in groups]
    return {
        way: {"accuracy": _passed(right, k)},
        f"cons@{k}": {"accuracy": _interval(majority)},
    }


def _passed(right: Sequence[Sequence[float]], k: int) -> dict[str, Any]:
    """Return pass@k with its interval from the accuracies of each problem's completions."""
    return _interval([[statistics.pass_at_k(len(values), int(sum(values)), k)] for values in right])


def _held_out(problems: Sequence[Problem], count: int, seed: object) -> list[Problem]:
    """Return at most `count` of the problems, in a random order that depends only on the seed."""
    rng = generator(seed, "held out")
    order = rng.permutation(len(problems))
    return [problems[i] for i in order[:count]]


def _limit(problems: list[Problem], way: str, settings: Evaluate) -> tuple[list[Problem], int]:
    """Return the problems that a way of sampling is evaluated on, and the number of completions for each
    problem.

    pass@k uses fewer problems; greedy decoding needs only one completion."""
    if way.startswith("pass@"):
        count = max(1, len(problems) // MAJORITY_SHARE)
        return problems[:count], _k(way)
    if "greedy" in way:
        return problems, 1
    return problems, settings.samples


def _k(way: str) -> int:
    """Return k, the number after `pass@`."""
    return int(way.removeprefix("pass@"))


def _majority(group: Group) -> float:
    """Return the accuracy of the most frequent answer in a group, the earliest one among equally frequent
    answers; 0 if no answer can be read."""
    winner = statistics.consensus([score.answer or None for score in group.scores])
    if not winner:
        return 0.0
    for score in group.scores:
        if score.answer == winner:
            return score.parts["accuracy"]
    return 0.0


def _completions(groups: Sequence[Group]) -> list[Completion]:
    """Return the completions of all groups in one list."""
    return [completion for group in groups for completion in group.completions]


def _measures(groups: Sequence[Group], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return means over all completions: length of the whole completion and of the thought in tokens, share
    of truncated completions, format, language consistency, and the statistics that the task itself reports.

    `intervals` has the 95 % intervals of these means; not of a mean that no completion has, and of a length
    only with two problems or more."""
    values = _values(groups, tokenizer)
    measured = {name: lists for name, lists in values.items() if any(lists)}
    return {
        **{name: _mean([*chain.from_iterable(lists)]) for name, lists in values.items()},
        "intervals": {name: _measure_interval(name, lists) for name, lists in measured.items()},
        "stats": _mean_stats([score for group in groups for score in group.scores]),
    }


def _values(groups: Sequence[Group], tokenizer: Tokenizer) -> dict[str, list[list[float]]]:
    """Return the values of each measure by its name: one list for each problem, with one value for each
    completion that has the measure."""
    values: dict[str, list[list[float]]] = {}
    for group in groups:
        parts = [score.parts for score in group.scores]
        of_problem = {
            "length": [len(one.tokens) for one in group.completions],
            "thought_length": _thought_lengths(group, tokenizer),
            "truncated": [not one.stopped for one in group.completions],
            "format": [part.get("format", 0.0) for part in parts],
            "language_consistency": [part["language"] for part in parts if "language" in part],
        }
        for name, of_one in of_problem.items():
            values.setdefault(name, []).append(of_one)
    return values


def _measure_interval(name: str, values_by_problem: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Return the mean of a measure with its 95 % confidence interval, as JSON; None if it has none."""
    if name.endswith("length"):
        interval = statistics.amount_interval(values_by_problem)
    elif len(set(map(len, values_by_problem))) == 1:
        interval = statistics.mean_interval(values_by_problem)
    else:  # a completion without words has no language
        interval = statistics.pooled_interval(values_by_problem)
    return asdict(interval) if interval else None


def _thought_lengths(group: Group, tokenizer: Tokenizer) -> list[int]:
    """Return the length in tokens of the thought of each completion; 0 without one."""
    opened = tokenizer.decode(group.prompt_tokens).rstrip().endswith(OPEN)
    return [
        count_thought_tokens(one.text, one.tokens[: len(one.tokens) - one.stopped], tokenizer, opened)
        for one in group.completions
    ]


def _mean_stats(scores: Sequence[Score]) -> dict[str, float | None]:
    """Return the mean of each statistic over the scores that have it, sorted by name."""
    values: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.stats.items():
            values.setdefault(name, []).append(value)
    return {name: _mean(values[name]) for name in sorted(values)}


def _mean(values: Sequence[float]) -> float | None:
    """Return the mean; None if there are no values."""
    return sum(values) / len(values) if values else None


def _interval(values_by_problem: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the mean with its 95 % confidence interval, as JSON. `values_by_problem` has one sequence of
    values for each problem."""
    return asdict(statistics.mean_interval(values_by_problem))


def _verdict(group: Group, way: str) -> dict[str, Any]:
    """Return the accuracies of all completions of a group, and the first one's text, as JSON."""
    return {
        "mode": way,
        "problem": group.problem.id,
        "prompt": group.problem.prompt,
        "right": [score.parts["accuracy"] for score in group.scores],
        "text": group.completions[0].text,
    }


def _sample(group: Group, way: str) -> dict[str, Any]:
    """Return the first completion of a group with its problem and its score, as JSON."""
    completion = group.completions[0]
    score = group.scores[0]
    problem = group.problem
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
