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

from ..config.methods import Distill
from ..model.config import ModelConfig
from ..run_log import Record
from ..text.tokenizer import Tokenizer
from ..types import Group, Labels, Sample, Sampler, generator
from .batch import Batch, by_sample, pack, to_samples
from .checkpoint import Checkpoint
from .divergence import top_k
from .grpo import summarize
from .learned_rewards import Tasks
from .learner import Learner
from .losses import distill, text_distance
from .tokenizer_alignment import aligned

LABELLED = ""  # the owner of samples that bring their labels


Asked = tuple[str, Sample, str]  # who teaches it, what was said, and the question


@dataclass(frozen=True)
class DistillBatch:
    """What one step learns from: `DistillBatch([("big", sample, "2 + 2?")], groups)`; groups are the student's own, and empty
    where rows are learned."""

    asked: Sequence[Asked]
    groups: Sequence[Group] = ()

    @property
    def samples(self) -> dict[str, list[Sample]]:
        """By who teaches them."""
        owners = sorted({owner for owner, _, _ in self.asked})
        return {owner: [sample for mine, sample, _ in self.asked if mine == owner] for owner in owners}

    def questions(self, owner: str) -> list[str]:
        return [question for mine, _, question in self.asked if mine == owner]


@dataclass(frozen=True)
class Teacher:
    """A frozen model that shows its states. `tongues` are the student's tokenizer and its own where they differ: then it
    judges spans of text."""

    learner: Learner
    tongues: tuple[Tokenizer, Tokenizer] | None = None

    def show(
        self, samples: Sequence[Sample], questions: Sequence[str], batch_tokens: int
    ) -> tuple[list[Batch], int]:
        """Micro-batches to learn from, and how many tokens the teacher read."""
        if self.tongues:
            student, own = self.tongues
            marked, read = aligned(samples, questions, student, self.learner, own, batch_tokens)
            return pack(marked, batch_tokens), read
        packed = [replace(batch, teacher=self.learner.states(batch)) for batch in pack(samples, batch_tokens)]
        return packed, sum(len(s.tokens) for s in samples)


class DistillSampler:
    """The step-th lesson is a function of step, seed and the student's weights alone."""

    def __init__(
        self,
        settings: Distill,
        seed: object,
        engine: Sampler,
        tasks: Tasks | None,
        sampling: Any,
        rows: Sequence[Asked],
    ):
        self.settings, self.seed, self.engine, self.tasks, self.sampling, self.rows = (
            settings,
            seed,
            engine,
            tasks,
            sampling,
            rows,
        )

    def __call__(self, step: int) -> DistillBatch:
        own = generator(self.seed, step, "student").random() < self.settings.on_policy
        return self._own(step) if own else self._given(step)

    def _own(self, step: int) -> DistillBatch:
        problems = self.tasks.draw(self.settings.prompts_per_step, (self.seed, step))
        rolled = self.engine.rollout(problems, self.settings.group_size, self.sampling, (self.seed, step))
        groups = [self.tasks.score(group) for group in rolled]
        samples = [to_samples([group], [np.zeros(len(group.completions))], False) for group in groups]
        owners = [self.settings.teachers[domain(group.problem.id)] for group in groups]
        told = zip(owners, samples, groups, strict=True)
        return DistillBatch(
            [(owner, s, group.problem.prompt) for owner, part, group in told for s in part], groups
        )

    def _given(self, step: int) -> DistillBatch:
        count = self.settings.prompts_per_step * self.settings.group_size
        places = (divmod(i, len(self.rows)) for i in range(step * count, (step + 1) * count))
        orders: dict[int, np.ndarray] = {}
        picked = []
        for epoch, place in places:
            if epoch not in orders:
                orders[epoch] = generator(self.seed, "rows", epoch).permutation(len(self.rows))
            picked.append(self.rows[orders[epoch][place]])
        return DistillBatch(picked)


def train_distill(
    learner: Learner, teachers: Mapping[str, Teacher], lessons: DistillSampler, settings: Distill, record: Record, checkpoint: Checkpoint,
    budget: float = math.inf,
) -> None:  # fmt: skip
    """`settings.steps` updates, or fewer if `budget` FLOPs, the teachers' included, are spent before."""
    loss = text_distance if settings.divergence == "text" else distill(settings.divergence, settings.beta)
    first, spent = _resume(learner, checkpoint)
    for step in range(first, settings.steps):
        if spent >= budget:
            break
        lesson = lessons(step)
        batches, read = taught(lesson, teachers, settings.batch_tokens)
        metrics = learner.update(batches, loss, settings.temperature)
        lessons.engine.load(learner.weights())
        costs = {name: (read[name], teachers[name].learner.model.config) for name in read}
        metrics |= _volume(lesson, learner.model.config, costs) | (
            summarize(lesson.groups) if lesson.groups else {}
        )
        spent += metrics["flops"]
        shown = lesson.groups[:1] if step % settings.log_every == 0 or step == settings.steps - 1 else []
        asked = [group.problem.id for group in lesson.groups]
        record.step(step, {"on_policy": float(bool(lesson.groups)), **metrics}, shown, asked)
        checkpoint.offer(lambda: {"learner": learner.state_dict(), "step": step + 1, "flops": spent}, record)  # noqa: B023


def taught(
    lesson: DistillBatch, teachers: Mapping[str, Teacher], batch_tokens: int
) -> tuple[list[Batch], dict[str, int]]:
    """Micro-batches, each with what its teacher or its labels say, whose counts are those of the whole; and how many
    tokens each teacher read."""
    batches, read, tokens, sequences = [], {}, 0, 0
    for owner, part in lesson.samples.items():
        if owner == LABELLED:
            packed = pack(part, batch_tokens)
        else:
            packed, read[owner] = teachers[owner].show(part, lesson.questions(owner), batch_tokens)
        tokens, sequences = tokens + packed[0].tokens, sequences + packed[0].sequences
        batches += packed
    return [replace(batch, tokens=tokens, sequences=sequences) for batch in batches], read


def labelled(
    teacher: Learner, samples: Sequence[Sample], count: int, temperature: float, batch_tokens: int
) -> list[Labels]:
    """The teacher's `count` largest log-probabilities, and the mass of the others, at each learned token of each sample."""
    batches = pack(samples, batch_tokens)
    shown = [teacher.states(batch) for batch in batches]
    tops = [top_k(s.hidden_MC, s.head_VC, count, temperature) for s in shown]
    parts = [
        by_sample(batches, [getattr(t, name) for t in tops], len(samples))
        for name in ("ids_MK", "logprobs_MK", "tail_M")
    ]
    return [Labels(ids.astype(np.int32), logprobs, tail) for ids, logprobs, tail in zip(*parts, strict=True)]


def domain(name: str) -> str:
    """The problems that a problem's or a row's id is of: `clock` of `clock/en-1-2-3-4#0`."""
    return name.partition("/")[0]


def _volume(
    lesson: DistillBatch, student: ModelConfig, teachers: Mapping[str, tuple[int, ModelConfig]]
) -> dict[str, float]:
    """Tokens sampled (prompts once a group) and learned from, and the FLOPs of all: the student samples and learns, a
    teacher reads so many tokens; each sees half of its sequence on average, as `rl` counts."""
    samples = [sample for _, sample, _ in lesson.asked]
    learned, sampled = sum(len(s.tokens) for s in samples), sum(_sampled(group) for group in lesson.groups)
    seen = float(np.mean([(len(s.tokens) + s.start) / 2 for s in samples]))
    teaching = float(sum(read * config.flops_per_token(seen) for read, config in teachers.values()))
    own = sampled * student.flops_per_token(seen) + learned * student.flops_per_token(seen, backward=True)
    return {
        "sampled_tokens": sampled,
        "learned_tokens": learned,
        "flops": own + teaching,
        "teacher_flops": teaching,
    }


def _sampled(group: Group) -> int:
    return len(group.prompt_tokens) + sum(len(c.tokens) for c in group.completions)


def _resume(learner: Learner, checkpoint: Checkpoint) -> tuple[int, float]:
    """The step to go on with, and the FLOPs spent before it."""
    state = checkpoint.restore()
    if state is None:
        return 0, 0.0
    learner.load_state_dict(state["learner"])
    return state["step"], state["flops"]
