"""Ranking of a problem's completions by rewards, by a judge, or by a teacher's likelihood, for stages that
keep the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...model.decoder import Decoder
from ...text.tokenizer import Tokenizer
from ...train.batch import MICRO_TOKENS, by_sample
from ...train.scorer import Scorer
from ...types import Group, LimbeckError, Sample
from ..job import Job
from .rewards import CALIBRATION, judge_of
from .sweep import Usage

RankCompletions = Callable[[Group], Sequence[float]]  # one number per completion, the more the better


def mean_logprob(teacher: Scorer, batch_tokens: int) -> RankCompletions:
    """Return a function that ranks the completions of a group by the mean log-probability per token that a
    teacher gives them. `batch_tokens` is the size of a micro-batch in input tokens."""

    def rank(group: Group) -> list[float]:
        """Return the mean log-probability per token of each completion of a group."""
        start = len(group.prompt_tokens)
        samples = [
            Sample(np.concatenate([group.prompt_tokens, completion.tokens]), start)
            for completion in group.completions
        ]
        batches = teacher.pack(samples, batch_tokens)
        logprobs = by_sample(batches, teacher.logprobs(batches), len(samples))
        return [float(logprobs_M.mean()) for logprobs_M in logprobs]

    return rank


class LikelihoodScorer:
    """Scores completions by a teacher's likelihood, and counts the FLOPs."""

    def __init__(self, teacher: Decoder):
        self.config = teacher.config
        self.rank = mean_logprob(Scorer(teacher), MICRO_TOKENS)
        self.flops = 0.0

    def __call__(self, group: Group) -> Sequence[float]:
        """Return one score per completion, the mean log-probability of its tokens; higher is better."""
        prompt = len(group.prompt_tokens)
        lengths = [len(completion.tokens) for completion in group.completions]
        context = prompt + sum(lengths) / len(lengths) / 2
        self.flops += (prompt + sum(lengths)) * self.config.flops_per_token(context)
        return self.rank(group)

    def take_usage(self) -> dict[str, float]:
        """Return the FLOPs since the last call, as `{"teacher_flops": ...}`, and reset the count."""
        usage = {"teacher_flops": self.flops}
        self.flops = 0.0
        return usage


def ranking_of(job: Job) -> tuple[RankCompletions, Usage]:
    """Return (function that scores the completions of a group, function that returns the cost since its last
    call). The setting `scored_by` names a calibrated judge or a teacher; if it is not set, completions are
    scored by their rewards."""
    name = job.stage.scored_by
    if not name:
        return lambda group: group.rewards, dict
    if (job.inputs[name] / CALIBRATION).exists():
        judge = judge_of(job, name)
        return judge.scores, judge.take_usage
    teacher, tokenizer = job.model(name)
    require_same_vocabulary(job, job.tokenizer(job.stage.model), name, tokenizer)
    scorer = LikelihoodScorer(teacher)
    return scorer, scorer.take_usage


def require_same_vocabulary(job: Job, student: Tokenizer, name: str, teacher: Tokenizer) -> None:
    """Raise LimbeckError unless student and teacher have the same token ids and the same end token. Their
    distributions can be compared token by token only then. `name` is the teacher's name in the message."""
    own = student.backend.get_vocab(with_added_tokens=True)
    other = teacher.backend.get_vocab(with_added_tokens=True)
    different = sum(own.get(token) != other.get(token) for token in {**own, **other})
    remedy = (
        "take a teacher of the same family, learn its outputs (kind: sft), which are text, "
        "or distil spans of it (divergence: text)"
    )
    if different:
        raise LimbeckError(
            f"{job.name}: the vocabulary of the teacher {name} differs from the student's "
            f"in {different} tokens; {remedy}"
        )
    if student.end_id != teacher.end_id:
        raise LimbeckError(
            f"{job.name}: the teacher {name} ends its turn with {teacher.end!r}, "
            f"the student with {student.end!r}; {remedy}"
        )


def ranked(group: Group, keep: str | None, rank: RankCompletions | None) -> list[int]:
    """Return the indices of a group's completions in the order in which they should be kept: the shortest
    first if `keep` is "shortest", else the highest `rank` score first, or as sampled if `rank` is None. Equal
    completions stay in sampling order."""
    places = list(range(len(group.completions)))
    if keep == "shortest":
        return sorted(places, key=lambda place: len(group.completions[place].tokens))
    if rank is None:
        return places
    scores = rank(group)
    return sorted(places, key=lambda place: -scores[place])
