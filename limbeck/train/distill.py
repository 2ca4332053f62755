"""Distillation of distributions: on what the student says (on-policy), on rows, or on both in turn (GKD, arXiv
2306.13649, algorithm 1). Each problem has the teacher of its domain.

What this is not: the gradient does not pass through sampling, and no reward is used; accuracies are watched only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..methods import Distill
from ..model.config import ModelConfig
from ..record import Record
from ..types import Group, Labels, Sample, Sampler, generator
from .batch import Batch, by_sample, pack, to_samples
from .checkpoint import Checkpoint
from .divergence import top_k
from .learner import Learner
from .losses import distill
from .rl import Tasks, summarize

LABELLED = ""  # the owner of samples that bring their labels


@dataclass(frozen=True)
class Lesson:
    """What one step learns from: `Lesson({"big": [...]}, groups)` has samples by who teaches them; groups are the
    student's own, and empty where rows are learned."""

    samples: Mapping[str, Sequence[Sample]]
    groups: Sequence[Group] = ()


class Lessons:
    """The step-th lesson is a function of step, seed and the student's weights alone."""

    def __init__(
        self, settings: Distill, seed: object, engine: Sampler, tasks: Tasks | None, sampling: Any, rows: Sequence[tuple[str, Sample]]
    ):  # fmt: skip
        self.settings, self.seed, self.engine, self.tasks, self.sampling, self.rows = settings, seed, engine, tasks, sampling, rows

    def __call__(self, step: int) -> Lesson:
        own = generator(self.seed, step, "student").random() < self.settings.on_policy
        return self._own(step) if own else self._given(step)

    def _own(self, step: int) -> Lesson:
        problems = self.tasks.draw(self.settings.prompts_per_step, (self.seed, step))
        rolled = self.engine.rollout(problems, self.settings.group_size, self.sampling, (self.seed, step))
        groups = [self.tasks.score(group) for group in rolled]
        samples = [to_samples([group], [np.zeros(len(group.completions))], False) for group in groups]
        owners = [self.settings.teachers[domain(group.problem.id)] for group in groups]
        return Lesson(_by_owner((owner, s) for owner, part in zip(owners, samples, strict=True) for s in part), groups)

    def _given(self, step: int) -> Lesson:
        count = self.settings.prompts_per_step * self.settings.group_size
        places = (divmod(i, len(self.rows)) for i in range(step * count, (step + 1) * count))
        orders: dict[int, np.ndarray] = {}
        picked = []
        for epoch, place in places:
            if epoch not in orders:
                orders[epoch] = generator(self.seed, "rows", epoch).permutation(len(self.rows))
            picked.append(self.rows[orders[epoch][place]])
        return Lesson(_by_owner(picked))


def imitate(
    learner: Learner, teachers: Mapping[str, Learner], lessons: Lessons, settings: Distill, record: Record, checkpoint: Checkpoint,
    budget: float = math.inf,
) -> None:  # fmt: skip
    """`settings.steps` updates, or fewer if `budget` FLOPs, the teachers' included, are spent before."""
    loss, (first, spent) = distill(settings.divergence, settings.beta), _resume(learner, checkpoint)
    for step in range(first, settings.steps):
        if spent >= budget:
            break
        lesson = lessons(step)
        metrics = learner.update(taught(lesson.samples, teachers, settings.batch_tokens), loss, settings.temperature)
        lessons.engine.load(learner.weights())
        configs = {name: teacher.model.config for name, teacher in teachers.items()}
        metrics |= _volume(lesson, learner.model.config, configs) | (summarize(lesson.groups) if lesson.groups else {})
        spent += metrics["flops"]
        shown = lesson.groups[:1] if step % settings.log_every == 0 or step == settings.steps - 1 else []
        record.step(step, {"on_policy": float(bool(lesson.groups)), **metrics}, shown)
        checkpoint.offer(lambda: {"learner": learner.state_dict(), "step": step + 1, "flops": spent}, record)  # noqa: B023


def taught(samples: Mapping[str, Sequence[Sample]], teachers: Mapping[str, Learner], batch_tokens: int) -> list[Batch]:
    """Micro-batches, each with its teacher's states or labels; their counts are those of the whole."""
    batches, tokens, sequences = [], 0, 0
    for owner, part in samples.items():
        packed = pack(part, batch_tokens)
        tokens, sequences = tokens + packed[0].tokens, sequences + packed[0].sequences
        batches += packed if owner == LABELLED else [replace(b, teacher=teachers[owner].states(b)) for b in packed]
    return [replace(batch, tokens=tokens, sequences=sequences) for batch in batches]


def labelled(teacher: Learner, samples: Sequence[Sample], count: int, temperature: float, batch_tokens: int) -> list[Labels]:
    """What a teacher would have said at each learned token of each sample."""
    batches = pack(samples, batch_tokens)
    shown = [teacher.states(batch) for batch in batches]
    tops = [top_k(s.hidden_MC, s.head_VC, count, temperature) for s in shown]
    parts = [by_sample(batches, [getattr(t, name) for t in tops], len(samples)) for name in ("ids_MK", "logprobs_MK", "tail_M")]
    return [Labels(ids.astype(np.int32), logprobs, tail) for ids, logprobs, tail in zip(*parts, strict=True)]


def domain(name: str) -> str:
    """The problems that a problem's or a row's id is of: `clock` of `clock/en-1-2-3-4#0`."""
    return name.partition("/")[0]


def _by_owner(pairs: Any) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for owner, sample in pairs:
        found.setdefault(owner, []).append(sample)
    return dict(sorted(found.items()))


def _volume(lesson: Lesson, student: ModelConfig, teachers: Mapping[str, ModelConfig]) -> dict[str, float]:
    """Tokens sampled (prompts once a group) and learned from, and the FLOPs of all: the student samples and learns, a
    teacher reads; each token sees half of its sequence on average, as `rl` counts."""
    samples = [s for part in lesson.samples.values() for s in part]
    learned, sampled = sum(len(s.tokens) for s in samples), sum(_sampled(group) for group in lesson.groups)
    seen = float(np.mean([(len(s.tokens) + s.start) / 2 for s in samples]))
    teaching = sum(
        sum(len(s.tokens) for s in part) * teachers[owner].flops_per_token(seen) for owner, part in lesson.samples.items() if owner != LABELLED
    )  # fmt: skip
    own = sampled * student.flops_per_token(seen) + learned * student.flops_per_token(seen, backward=True)
    return {"sampled_tokens": sampled, "learned_tokens": learned, "flops": own + teaching, "teacher_flops": float(teaching)}


def _sampled(group: Group) -> int:
    return len(group.prompt_tokens) + sum(len(c.tokens) for c in group.completions)


def _resume(learner: Learner, checkpoint: Checkpoint) -> tuple[int, float]:
    """The step to go on with, and the FLOPs spent before it."""
    state = checkpoint.restore()
    if state is None:
        return 0, 0.0
    learner.load_state_dict(state["learner"])
    return state["step"], state["flops"]
