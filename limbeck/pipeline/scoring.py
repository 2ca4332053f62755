"""How completions are ranked where right and wrong are not enough: by rewards, or by what a teacher makes of them.

A scorer is any callable from a group to one number for each of its completions, the more the better.
"""

from __future__ import annotations

from ..model.config import ModelConfig
from ..parts import Optimizer
from ..tokenizer import Tokenizer
from ..train.learner import Learner
from ..train.preference import Scorer, likelihood
from ..types import Group, LimbeckError
from .job import Job
from .voices import CALIBRATION, judge_of

MICRO_TOKENS = 8192  # of a model that only reads


def scorer_of(job: Job) -> Scorer:
    """What a stage's completions are ranked by: a judge that passed its calibration, a teacher's likelihood of them, or
    the rewards that they earned."""
    if not job.stage.scored_by:
        return lambda group: group.rewards
    if (job.inputs[job.stage.scored_by] / CALIBRATION).exists():
        return judge_of(job, job.stage.scored_by).scores
    teacher, tokenizer = job.model(job.stage.scored_by)
    check_tongue(job, job.model(job.stage.model)[1], job.stage.scored_by, tokenizer)
    return likelihood(Learner(teacher, Optimizer(), 1), MICRO_TOKENS)


def check_tongue(job: Job, student: Tokenizer, name: str, teacher: Tokenizer) -> None:
    """Token by token, only those can be compared who mean the same by an id, and end a turn alike."""
    mine, theirs = (t.backend.get_vocab(with_added_tokens=True) for t in (student, teacher))
    differ = sum(mine.get(token) != theirs.get(token) for token in {**mine, **theirs})
    remedy = "take a teacher of the same family, learn its outputs (kind: sft), which are text, or distil spans of it (divergence: text)"
    if differ:
        raise LimbeckError(f"{job.name}: the vocabulary of the teacher {name} differs from the student's in {differ} tokens; {remedy}")
    if student.end_id != teacher.end_id:
        raise LimbeckError(f"{job.name}: the teacher {name} ends its turn with {teacher.end!r}, the student with {student.end!r}; {remedy}")


def ranked(group: Group, keep: str | None, scorer: Scorer | None) -> list[int]:
    """The places of a group's completions, those to be kept first; of equals the first."""
    places = list(range(len(group.completions)))
    if keep == "shortest":
        return sorted(places, key=lambda i: len(group.completions[i].tokens))
    scores = scorer(group) if scorer else [0.0] * len(places)
    return sorted(places, key=lambda i: -scores[i])


def judging(job: Job, groups: list[Group]) -> dict[str, float]:
    """What it costs when a teacher reads the completions: each prompt once a group."""
    teacher = getattr(job.stage, "scored_by", None)
    if not teacher or (job.inputs[teacher] / CALIBRATION).exists():
        return {}
    config = ModelConfig.from_directory(job.inputs[teacher] / "model")
    lengths = [(len(g.prompt_tokens), [len(c.tokens) for c in g.completions]) for g in groups]
    return {"teacher_flops": sum((p + sum(n)) * config.flops_per_token(p + sum(n) / len(n) / 2) for p, n in lengths)}
