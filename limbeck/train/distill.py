"""Distillation of a teacher's distributions, learned on the student's own samples (on-policy), on rows, or
on both in turn (GKD, arXiv 2306.13649, algorithm 1).

A row is one stored training example: a prompt with its response. A domain is a source of problems; the
teacher of a problem is the one that the settings name for its domain. The gradient does not pass through
sampling. No reward is used for learning; accuracies are only logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..activity import phase, track
from ..config.methods import Distill
from ..model.config import ModelConfig
from ..text.prompt_format import conversation
from ..text.tokenizer import Tokenizer
from ..types import Group, Labels, Message, Sample, Sampler, generator
from .batch import Batch, Device, by_sample, pack, to_samples
from .checkpoint import Checkpoint
from .divergence import top_k
from .learned_rewards import Tasks
from .learner import Learner
from .losses import Distillation, Loss, SpanDistance
from .scorer import Scorer
from .tokenizer_alignment import aligned
from .training_log import TrainingLog, count_flops, sampled_tokens, summarize

LABELLED = ""  # stands in for the teacher's name where a sample has stored labels


class Assigned(NamedTuple):
    """A sample, the question or conversation that it answers, and the name of the teacher that it is learned
    from."""

    teacher: str
    sample: Sample
    question: str | Sequence[Message]


@dataclass(frozen=True)
class DistillBatch:
    """The samples of one step, each with its teacher: `DistillBatch([Assigned("big", sample, "2 + 2?")],
    groups)`.

    `groups` are the groups of completions that the student sampled in this step; empty where the step learns
    rows."""

    assigned: Sequence[Assigned]
    groups: Sequence[Group] = ()

    def by_teacher(self) -> dict[str, list[Assigned]]:
        """Return the samples of each teacher, by the teacher's name in alphabetical order."""
        parts: dict[str, list[Assigned]] = {name: [] for name in sorted({a.teacher for a in self.assigned})}
        for assigned in self.assigned:
            parts[assigned.teacher].append(assigned)
        return parts


@dataclass(frozen=True)
class Teacher:
    """A frozen model that a student learns from.

    `tokenizers` are the student's and the teacher's tokenizer where the two differ, else None. With them,
    the teacher gives log-probabilities of spans of text instead of distributions over tokens."""

    scorer: Scorer
    tokenizers: tuple[Tokenizer, Tokenizer] | None = None

    def attach(
        self, samples: Sequence[Sample], questions: Sequence[str | Sequence[Message]], batch_tokens: int
    ) -> tuple[list[Batch], int]:
        """Pack the samples into micro-batches that hold what the teacher says about them.

        That is the teacher's distribution at each prediction or, where the tokenizers differ, its
        log-probability of each span of text. `questions` are the texts of the prompts, one for each sample.
        Returns the micro-batches and the number of tokens that the teacher processed."""
        if self.tokenizers:
            student, own = self.tokenizers
            spanned, tokens = aligned(samples, questions, student, self.scorer, own, batch_tokens)
            return self.scorer.pack(spanned, batch_tokens), tokens
        packed = track(self.scorer.pack(samples, batch_tokens), "asking the teacher", "micro-batches")
        batches = [replace(batch, teacher=self.scorer.states(batch)) for batch in packed]
        return batches, sum(len(sample.tokens) for sample in samples)


@dataclass(frozen=True)
class DistillSampler:
    """Makes the batch of each step. The batch depends only on the step, the seed and the student's weights,
    so a resumed stage repeats it exactly."""

    settings: Distill
    seed: object
    engine: Sampler
    tasks: Tasks | None
    sampling: Any
    rows: Sequence[Assigned]

    def __call__(self, step: int) -> DistillBatch:
        """Return the batch of a step: with probability `settings.on_policy` the student's own samples,
        otherwise rows."""
        on_policy = generator(self.seed, step, "student").random() < self.settings.on_policy
        return self._rollout(step) if on_policy else self._from_rows(step)

    def _rollout(self, step: int) -> DistillBatch:
        """Draw the problems of a step, sample the student's completions, and assign each completion to the
        teacher of its domain."""
        problems = self.tasks.draw(self.settings.prompts_per_step, (self.seed, step))
        rollout = self.engine.rollout(problems, self.settings.group_size, self.sampling, (self.seed, step))
        groups = [self.tasks.score(group) for group in track(rollout, "scoring", "problems")]
        assigned = []
        for group in groups:
            teacher = self.settings.teachers[domain(group.problem.id)]
            no_advantages = [np.zeros(len(group.completions))]
            for sample in to_samples([group], no_advantages, keep_mask=False):
                question = conversation(group.problem.prompt, group.problem.system)
                assigned.append(Assigned(teacher, sample, question))
        return DistillBatch(assigned, groups)

    def _from_rows(self, step: int) -> DistillBatch:
        """Return the rows of a step. Every row is used once in each epoch, and each epoch has its own random
        order."""
        count = self.settings.prompts_per_step * self.settings.group_size
        orders: dict[int, np.ndarray] = {}
        assigned = []
        for i in range(step * count, (step + 1) * count):
            epoch, place = divmod(i, len(self.rows))
            if epoch not in orders:
                orders[epoch] = generator(self.seed, "rows", epoch).permutation(len(self.rows))
            assigned.append(self.rows[orders[epoch][place]])
        return DistillBatch(assigned)


@dataclass
class DistillTrainer:
    """Trains a student by distillation, for `settings.steps` updates.

    Training ends earlier if the log's budget of FLOPs is spent; the teachers' FLOPs count too. `step` is the
    number of the next step, from 0."""

    learner: Learner
    teachers: Mapping[str, Teacher]
    sampler: DistillSampler
    settings: Distill
    log: TrainingLog
    checkpoint: Checkpoint
    step: int = field(default=0, init=False)

    def train(self) -> None:
        """Run the remaining steps, from `self.step` on."""
        loss = distillation_loss(self.settings)
        for step in range(self.step, self.settings.steps):
            if self.log.over_budget:
                break
            batch = self.sampler(step)
            batches, teacher_tokens = attach_teachers(
                batch, self.teachers, self.settings.batch_tokens, self.learner.device
            )
            update = self.learner.update(batches, loss, self.settings.temperature)
            self.sampler.engine.load_weights(self.learner.weights())
            metrics = {
                "on_policy": float(bool(batch.groups)),
                **update,
                **self._volume(batch, teacher_tokens),
            }
            if batch.groups:
                metrics |= summarize(batch.groups)
            self.log.step(step, metrics, batch.groups, batch.groups)
            self.step = step + 1
            self.checkpoint.offer(self.state_dict, self.log)

    def _volume(self, batch: DistillBatch, teacher_tokens: Mapping[str, int]) -> dict[str, float]:
        """Return the number of tokens sampled and learned from in a step, and the FLOPs of the step.

        FLOPs are those of the student's sampling and learning, and of the teachers' forward passes.
        `teacher_tokens` is the number of tokens that each teacher processed. A token is taken to attend to
        its prompt and half of its completion."""
        samples = [assigned.sample for assigned in batch.assigned]
        sampled = sum(sampled_tokens([group]) for group in batch.groups)
        learned = sum(len(sample.tokens) for sample in samples)
        context = float(np.mean([(len(sample.tokens) + sample.start) / 2 for sample in samples]))
        configs: dict[str, ModelConfig] = {
            name: self.teachers[name].scorer.model.config for name in teacher_tokens
        }
        teacher_flops = float(
            sum(tokens * configs[name].flops_per_token(context) for name, tokens in teacher_tokens.items())
        )
        flops = count_flops(self.learner.model.config, sampled, learned, context)
        return {
            "sampled_tokens": sampled,
            "learned_tokens": learned,
            "flops": flops + teacher_flops,
            "teacher_flops": teacher_flops,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state that an exact resume of the stage needs."""
        return {"learner": self.learner.state_dict(), "step": self.step, "flops": self.log.flops}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned, so that training continues from it."""
        self.learner.load_state_dict(state["learner"])
        self.step = state["step"]
        self.log.flops = state["flops"]


def distillation_loss(settings: Distill) -> Loss:
    """Return the loss function for the setting `divergence` of a stage."""
    if settings.divergence == "text":
        return SpanDistance()
    return Distillation(settings.divergence, settings.beta)


def attach_teachers(
    batch: DistillBatch, teachers: Mapping[str, Teacher], batch_tokens: int, device: Device = "cpu"
) -> tuple[list[Batch], dict[str, int]]:
    """Pack a step's samples into micro-batches, each with the distributions or stored labels of its teacher.

    `device` is the student's. The counts in every micro-batch are those of the whole batch. Returns the
    micro-batches, and the number of tokens that each teacher processed, by its name."""
    batches: list[Batch] = []
    forward_tokens: dict[str, int] = {}
    tokens = 0
    sequences = 0
    for name, part in batch.by_teacher().items():
        samples = [assigned.sample for assigned in part]
        if name == LABELLED:
            packed = pack(samples, batch_tokens, device)
        else:
            questions = [assigned.question for assigned in part]
            packed, forward_tokens[name] = teachers[name].attach(samples, questions, batch_tokens)
        tokens += packed[0].tokens
        sequences += packed[0].sequences
        batches += packed
    return [replace(one, tokens=tokens, sequences=sequences) for one in batches], forward_tokens


def teacher_top_k(
    teacher: Scorer, samples: Sequence[Sample], count: int, temperature: float, batch_tokens: int
) -> list[Labels]:
    """Compute the labels of a teacher for each sample: at every token in the loss, the `count` most probable
    token ids with their log-probabilities, and the log-probability of all other ids together.

    `temperature` divides the teacher's logits; `batch_tokens` is the size of a micro-batch in input
    tokens."""
    batches = teacher.pack(samples, batch_tokens)
    tops = []
    with phase("labelling", "rows", len(samples)) as labelled:
        for batch in batches:
            states = teacher.states(batch)
            tops.append(top_k(states.hidden_MC, states.head_VC, count, temperature))
            labelled.advance(len(batch.order_S))

    def of_samples(name: str) -> list[np.ndarray]:
        """Return the field `name` of the labels as one array [predictions, ...] for each sample, in the
        order of the samples."""
        return by_sample(batches, [getattr(top, name) for top in tops], len(samples))

    columns = zip(of_samples("ids_MK"), of_samples("logprobs_MK"), of_samples("tail_M"), strict=True)
    return [Labels(ids.astype(np.int32), logprobs, tail) for ids, logprobs, tail in columns]


def domain(name: str) -> str:
    """Return the name of the problem source that is the first part of the id of a problem or a row.

    >>> domain("clock/en-1-2-3-4#0")
    'clock'
    """
    return name.partition("/")[0]
