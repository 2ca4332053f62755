"""Measurement of a model on a suite: prompts, responses or log-likelihoods, verdicts, and the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...activity import track
from ...config.parts import SuiteOptions
from ...engine.rollout import Engine
from ...engine.sampling import SamplingParams
from ...train.batch import MICRO_TOKENS, by_sample
from ...train.scorer import Scorer
from ...types import Completion, LimbeckError, Problem, Sample
from .. import statistics
from .catalogue import find_protocol, find_suite
from .prompts import TextTokenizer, build_prompts
from .reading import read_rows
from .suite import Item, Metric, Protocol, Suite, SuiteSampling

ITEMS_AT_ONCE = 256  # items that are measured between two checkpoints
Result = dict[str, Any]


@dataclass(frozen=True)
class SuiteTask:
    """A suite that is ready to be asked: its items with their prompts, and the sampling that is used, None
    for log-likelihoods. `changes` says in words how it differs from the published protocol."""

    suite: Suite
    protocol: Protocol
    items: tuple[Item, ...]
    prompts: tuple[str, ...]
    sampling: SuiteSampling | None
    changes: tuple[str, ...]

    @property
    def chunks(self) -> list[slice]:
        """The parts of the items that are measured one after the other."""
        return [slice(i, i + ITEMS_AT_ONCE) for i in range(0, len(self.items), ITEMS_AT_ONCE)]


def open_suite(name: str, options: SuiteOptions) -> SuiteTask:
    """Return a suite with the items of the user's files and their prompts. Raises LimbeckError for an unknown
    name or protocol, for files that are missing or not as published, and for a missing package."""
    suite = find_suite(name)
    protocol = find_protocol(suite, options.protocol)
    data = Path(options.data)
    items = suite.read(read_rows(suite, data), protocol.name)
    whole = len(items)
    shots = protocol.prompt.shots
    pool = suite.read(read_rows(suite, data, shots.split), protocol.name) if shots and shots.split else []
    missing = suite.requires(items)
    if missing:
        raise LimbeckError(f"{suite.name}: {missing}")
    items = items[: options.items]
    prompts = build_prompts(protocol.prompt, items, pool)
    sampling = _sampling(protocol, options)
    return SuiteTask(
        suite, protocol, tuple(items), tuple(prompts), sampling, _changes(suite, protocol, options, whole)
    )


def _sampling(protocol: Protocol, options: SuiteOptions) -> SuiteSampling | None:
    """Return the sampling of the protocol with what the user changed."""
    if protocol.sampling is None:
        return None
    changed = {"samples": options.samples, "max_new_tokens": options.max_new_tokens}
    return replace(protocol.sampling, **{key: value for key, value in changed.items() if value})


def _changes(suite: Suite, protocol: Protocol, options: SuiteOptions, rows: int) -> tuple[str, ...]:
    """Return in words what is not as published."""
    changes = []
    if rows != suite.size:
        changes.append(f"{rows} items in the files, {suite.size} as published")
    if options.items and options.items < rows:
        changes.append(f"the first {options.items} items only")
    for key in ("samples", "max_new_tokens"):
        given = getattr(options, key)
        if given and protocol.sampling and given != getattr(protocol.sampling, key):
            changes.append(f"{key} {given}, {getattr(protocol.sampling, key)} as published")
    return tuple(changes)


# ---------------------------------------------------------------- verdicts


def engines_for(tasks: Sequence[SuiteTask], engine: Engine) -> dict[str, Engine]:
    """Return the engine of each suite: the model's own, or one that continues texts where the protocol has no
    chat template."""
    texts = engine.with_tokenizer(TextTokenizer(engine.tokenizer))
    return {task.suite.name: engine if task.protocol.prompt.chat else texts for task in tasks}


def measure(task: SuiteTask, part: slice, engine: Engine, seed: object) -> list[Result]:
    """Return the verdicts on a part of the items, one JSON object for each: `verdicts` has for each metric
    one list for each sample."""
    if task.sampling is None:
        return _rank_options(task, part, engine)
    return _judge_responses(task, part, engine, seed)


def _judge_responses(task: SuiteTask, part: slice, engine: Engine, seed: object) -> list[Result]:
    """Sample the responses to the items of a part, and judge them."""
    sampling = task.sampling
    problems = [
        Problem(item.id, prompt) for item, prompt in zip(task.items[part], task.prompts[part], strict=True)
    ]
    params = SamplingParams(sampling.temperature, sampling.top_p, sampling.max_new_tokens)
    groups = engine.rollout(problems, sampling.samples, params, (seed, task.suite.name))
    rows = []
    for item, group in zip(task.items[part], track(groups, "scoring", "problems"), strict=True):
        cut = [cut_off(completion.text, sampling.stop) for completion in group.completions]
        verdicts = judge(task.protocol.metrics, item, cut)
        rows.append(
            {
                "item": item.id,
                "gold": item.gold,
                "verdicts": verdicts | vote(task.protocol.metrics[0], item, cut, verdicts),
                "tokens": [len(completion.tokens) for completion in group.completions],
                "truncated": [_is_truncated(*pair) for pair in zip(group.completions, cut, strict=True)],
                "response": cut[0],
            }
        )
    return rows


def judge(metrics: Sequence[Metric], item: Item, responses: Sequence[str]) -> dict[str, list[list[bool]]]:
    """Return the verdicts of each metric on each response to an item."""
    return {metric.name: [list(metric.judge(item, text)) for text in responses] for metric in metrics}


def vote(
    metric: Metric, item: Item, responses: Sequence[str], verdicts: Mapping[str, list[list[bool]]]
) -> dict[str, list[list[bool]]]:
    """Return the verdict of a majority vote of N responses as `cons@N`: that on the first response with the
    most frequent answer, wrong if no response has one. {} for a single response, and for a metric without
    answers. `verdicts` are those of `judge`."""
    if metric.answer is None or len(responses) < 2:
        return {}
    answers = [metric.answer(item, text) for text in responses]
    winner = statistics.consensus(answers)
    right = winner is not None and verdicts[metric.name][answers.index(winner)][0]
    return {f"cons@{len(responses)}": [[right]]}


def cut_off(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first of the texts in `stop`."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def _is_truncated(completion: Completion, text: str) -> bool:
    """Return True if a response ended neither by itself nor at a stop text."""
    return not completion.stopped and len(text) == len(completion.text)


def _rank_options(task: SuiteTask, part: slice, engine: Engine) -> list[Result]:
    """Rank the options of the items of a part by their log-likelihood."""
    samples = []
    options = [task.protocol.options or tuple(item.letters) for item in task.items[part]]
    for prompt, texts in zip(task.prompts[part], options, strict=True):
        samples += [encode_pair(engine.tokenizer, prompt, f" {text}") for text in texts]
    longest = max(len(sample.tokens) for sample in samples)
    if longest > engine.model.config.max_positions:
        raise LimbeckError(
            f"{task.suite.name}: an item of {longest} tokens exceeds the model's "
            f"{engine.model.config.max_positions} positions; take a model with more"
        )
    scorer = Scorer(engine.model)
    batches = scorer.pack(samples, MICRO_TOKENS)
    totals = [float(values.sum()) for values in by_sample(batches, scorer.logprobs(batches), len(samples))]
    rows = []
    for item, texts in zip(task.items[part], options, strict=True):
        scores = [totals.pop(0) for _ in texts]
        rows.append(
            {
                "item": item.id,
                "gold": item.gold,
                "verdicts": {name: [[value]] for name, value in choose(item, texts, scores).items()},
                "logprobs": scores,
            }
        )
    return rows


def choose(item: Item, texts: Sequence[str], scores: Sequence[float]) -> dict[str, bool]:
    """Return whether the right option has the greatest log-likelihood, and whether it has the greatest one
    per character; the first of equal ones counts (lm-eval's `acc` and `acc_norm`)."""
    gold = item.letters.index(item.gold)
    lengths = [len(text) for text in texts]
    return {
        "acc": int(np.argmax(scores)) == gold,
        "acc_norm": int(np.argmax(np.divide(scores, lengths))) == gold,
    }


def encode_pair(tokenizer: TextTokenizer, context: str, continuation: str) -> Sample:
    """Return the tokens of a context and its continuation, of which the latter's are scored. Both are
    encoded as one text, and spaces at the end of the context belong to the continuation (lm-eval,
    `api/model.py`)."""
    stripped = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    start = len(tokenizer.encode(stripped))
    return Sample(np.array(whole, dtype=np.int64), start)


# ---------------------------------------------------------------- results


def combine(task: SuiteTask, rows: Sequence[Result]) -> Result:
    """Return the result of a suite from the verdicts on all its items: each metric with its 95 % interval,
    and of sampled responses the mean length in tokens and the truncated share."""
    result = {
        "suite": task.suite.name,
        "protocol": task.protocol.name,
        "source": asdict(task.protocol.source),
        "sampling": asdict(task.sampling) if task.sampling else "log-likelihood of the options",
        "changes": list(task.changes),
        "items": len(rows),
        "metrics": {name: _interval(task, name, rows) for name in rows[0]["verdicts"]},
    }
    return result | _lengths(rows) if task.sampling else result


def _interval(task: SuiteTask, name: str, rows: Sequence[Result]) -> Mapping[str, Any]:
    """Return the mean of a metric with its 95 % interval, as JSON."""
    values = [[float(value) for sample in row["verdicts"][name] for value in sample] for row in rows]
    if any(metric.pooled for metric in task.protocol.metrics if metric.name == name):
        return asdict(statistics.pooled_interval(values))
    return asdict(statistics.mean_interval(values))


def _lengths(rows: Sequence[Result]) -> Result:
    """Return the number and the tokens of all responses, the mean length, and the share that was cut off."""
    lengths = [length for row in rows for length in row["tokens"]]
    truncated = [value for row in rows for value in row["truncated"]]
    return {
        "responses": len(lengths),
        "tokens": sum(lengths),
        "length": sum(lengths) / len(lengths),
        "truncated": sum(truncated) / len(truncated),
    }


def all_chunks(tasks: Sequence[SuiteTask]) -> Iterator[tuple[SuiteTask, slice]]:
    """Yield the parts of all suites, in the order in which they are measured."""
    for task in tasks:
        for part in task.chunks:
            yield task, part
