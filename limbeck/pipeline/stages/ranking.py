"""How completions are ranked where right and wrong are not enough: by rewards, or by what a teacher makes of them.

A scorer is any callable from a group to one number for each of its completions, the more the better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...config.parts import Optimizer
from ...model.decoder import Decoder
from ...text.tokenizer import Tokenizer
from ...train.batch import MICRO_TOKENS
from ...train.dpo import Scorer, likelihood
from ...train.learner import Learner
from ...types import Group, LimbeckError
from ..job import Job
from .rewards import CALIBRATION, judge_of

Bill = Callable[[], dict[str, float]]


class Reader:
    """A teacher that reads completions: how likely it finds each, and what that cost since the last bill."""

    def __init__(self, teacher: Decoder):
        self.config, self.score, self.flops = (
            teacher.config,
            likelihood(Learner(teacher, Optimizer(), 1), MICRO_TOKENS),
            0.0,
        )

    def __call__(self, group: Group) -> Sequence[float]:
        asked, lengths = len(group.prompt_tokens), [len(c.tokens) for c in group.completions]
        self.flops += (asked + sum(lengths)) * self.config.flops_per_token(
            asked + sum(lengths) / len(lengths) / 2
        )
        return self.score(group)

    def bill(self) -> dict[str, float]:
        told = {"teacher_flops": self.flops}
        self.flops = 0.0
        return told


def scorer_of(job: Job) -> tuple[Scorer, Bill]:
    """What a stage's completions are ranked by, and who tells its cost: a judge that passed its calibration, a teacher's
    likelihood of them, or the rewards that they earned, which are there already."""
    name = job.stage.scored_by
    if not name:
        return lambda group: group.rewards, dict
    if (job.inputs[name] / CALIBRATION).exists():
        judge = judge_of(job, name)
        return judge.scores, judge.bill
    teacher, tokenizer = job.model(name)
    require_same_vocabulary(job, job.model(job.stage.model)[1], name, tokenizer)
    reader = Reader(teacher)
    return reader, reader.bill


def require_same_vocabulary(job: Job, student: Tokenizer, name: str, teacher: Tokenizer) -> None:
    """Token by token, only those can be compared who mean the same by an id, and end a turn alike."""
    mine, theirs = (t.backend.get_vocab(with_added_tokens=True) for t in (student, teacher))
    differ = sum(mine.get(token) != theirs.get(token) for token in {**mine, **theirs})
    remedy = "take a teacher of the same family, learn its outputs (kind: sft), which are text, or distil spans of it (divergence: text)"
    if differ:
        raise LimbeckError(
            f"{job.name}: the vocabulary of the teacher {name} differs from the student's in {differ} tokens; {remedy}"
        )
    if student.end_id != teacher.end_id:
        raise LimbeckError(
            f"{job.name}: the teacher {name} ends its turn with {teacher.end!r}, the student with {student.end!r}; {remedy}"
        )


def ranked(group: Group, keep: str | None, scorer: Scorer | None) -> list[int]:
    """The places of a group's completions, those to be kept first; of equals the first."""
    places = list(range(len(group.completions)))
    if keep == "shortest":
        return sorted(places, key=lambda i: len(group.completions[i].tokens))
    scores = scorer(group) if scorer else [0.0] * len(places)
    return sorted(places, key=lambda i: -scores[i])
