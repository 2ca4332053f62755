"""GRPO: reinforcement learning with verifiable rewards (arXiv 2402.03300), with the variants of DAPO, Dr.
GRPO and DeepSeek-V3.2.

A step samples a group of completions for each of a few problems, scores them, takes the reward minus the
group's mean as the advantage, and makes one or more clipped policy-gradient updates. There is no critic.
Sampling and learning alternate: in every step, the completions are sampled with the learner's newest
weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..activity import track
from ..config.parts import Policy
from ..config.recipe import RL
from ..model.checksum import checksum
from ..run_log import quote, rollout_row
from ..types import Group, Sample, Sampler, generator
from .alarms import AlarmMonitor
from .batch import Batch, to_samples
from .checkpoint import Checkpoint
from .learned_rewards import HeldOut, LearnedRewards
from .learner import Learner
from .learning_signal import NO_SIGNAL, UNTAUGHT
from .losses import PolicyGradient, correct
from .scorer import Scorer
from .selftest import selftest
from .training_log import TrainingLog, merge, summarize, volume

ATTEMPTS = 3  # rollouts of a step that looks for groups whose rewards differ


@dataclass
class GRPOTrainer:
    """Trains a learner with GRPO, for `settings.steps` steps.

    Training ends earlier if the log's budget of FLOPs is spent or if an alarm stops the stage. `rewards`
    draws the problems and scores the completions; `reference` is the frozen model of the KL term, None if
    there is no such term; `alarms` checks each step, and `tell` is called with what it finds about the
    learning signal; `step` is the number of the next step, from 0."""

    learner: Learner
    engine: Sampler
    rewards: LearnedRewards
    settings: RL
    seed: object
    log: TrainingLog
    checkpoint: Checkpoint
    reference: Scorer | None = None
    alarms: AlarmMonitor | None = None
    tell: Callable[[str], None] = lambda text: None
    step: int = field(default=0, init=False)

    def __post_init__(self):
        self.loss = PolicyGradient(self.settings.policy, self.settings.sampling.max_new_tokens)
        self.alarms = self.alarms or AlarmMonitor(self.settings)
        self.told: set[str] = set()

    def train(self) -> None:
        """Run the remaining steps, from `self.step` on.

        Raises Resumable, with the state saved, if none of the steps allowed had a learning signal."""
        policy = self.settings.policy
        temperature = self.settings.sampling.temperature
        for step in range(self.step, self.settings.steps):
            if self.log.over_budget or self.rewards.stopped:
                break
            self.alarms.refuse_hopeless()
            self._refresh_reference(step)
            weights = checksum(self.learner.model)
            groups = self._sample_groups(step)
            informative = [group for group in groups if is_informative(group, policy)]
            advantages = group_advantages(informative, policy.advantage_scale)
            samples = to_samples(informative, advantages, policy.keep_sampling_mask, policy.mask_truncated)
            if step == 0 and samples:
                selftest(self.learner, samples, self.loss, self.engine.tokenizer.end_id, temperature)
            updates = [
                {**self.learner.update(batches, self.loss, temperature), **correction}
                for batches, correction in self._batches(samples, step)
            ]
            self.engine.load_weights(self.learner.weights())
            held_out = self.rewards.evaluate(step, groups, self.engine)
            metrics = self._metrics(groups, informative, samples, updates, held_out)
            self.log.step(step, metrics, groups, informative, weights)
            self._tell_alarms(metrics.get("alarms", []), groups)
            self.step = step + 1
            self.checkpoint.offer(self.state_dict, self.log)
            if self.alarms.hopeless:
                self.checkpoint.save(self.state_dict, self.log)
        self.alarms.refuse_hopeless()

    def _tell_alarms(self, alarms: Sequence[str], groups: Sequence[Group]) -> None:
        """Tell each alarm about the learning signal once, with one of the responses that raised it."""
        for alarm in alarms:
            if alarm.startswith(UNTAUGHT) and alarm not in self.told:
                self.told.add(alarm)
                outlook = self.alarms.outlook if alarm.startswith(NO_SIGNAL) else ""
                self.tell(f"{alarm}. {outlook}{quote(rollout_row(groups[0]))}")

    def _refresh_reference(self, step: int) -> None:
        """Copy the learner's weights into the reference model, if `reference_every` updates have passed
        since the last copy."""
        policy = self.settings.policy
        if self.reference is None or not policy.reference_every:
            return
        if step % max(1, policy.reference_every // policy.updates_per_rollout) == 0:
            self.reference.model.load_state_dict(self.learner.weights())

    def _sample_groups(self, step: int) -> list[Group]:
        """Sample and score the groups of a step.

        With the setting `zero_variance: replace` (DAPO's dynamic sampling), groups whose rewards are all
        equal are replaced by groups of new problems. At most `ATTEMPTS` rollouts are made; if too few groups
        differ by then, the others are returned too."""
        policy = self.settings.policy
        tasks = self.rewards.at(step)
        resample = policy.zero_variance == "replace"
        kept: list[Group] = []
        rejected: list[Group] = []
        for attempt in range(ATTEMPTS if resample else 1):
            seed = (self.seed, step, attempt)
            problems = tasks.draw(policy.prompts_per_step - len(kept), seed)
            rollout = self.engine.rollout(problems, policy.group_size, self.rewards.sampling, seed)
            for group in track(rollout, "scoring", "problems"):
                group = tasks.score(group)
                accepted = not resample or len(set(group.rewards)) > 1
                (kept if accepted else rejected).append(group)
            if len(kept) >= policy.prompts_per_step:
                break
        return kept + rejected

    def _batches(self, samples: list[Sample], step: int) -> Iterable[tuple[list[Batch], Mapping[str, float]]]:
        """Return the micro-batches of each update of a step, with the metrics of their correction. If another
        engine sampled, all are corrected, before the first update; else there is none."""
        parts = minibatches(samples, self.settings.policy.updates_per_rollout, (self.seed, step))
        packed = map(self._with_reference, parts)
        if self.settings.engine is None:
            return ((batches, {}) for batches in packed)
        temperature = self.settings.sampling.temperature
        return [correct(batches, self.learner.logprobs(batches, temperature)) for batches in packed]

    def _with_reference(self, samples: list[Sample]) -> list[Batch]:
        """Pack samples into micro-batches. If there is a reference model, each holds its log-probabilities
        for the KL term."""
        batches = self.learner.pack(samples, self.settings.batch_tokens)
        if self.reference is None:
            return batches
        logprobs = self.reference.logprobs(batches, self.settings.sampling.temperature)
        return [
            replace(batch, reference_M=reference_M)
            for batch, reference_M in zip(batches, logprobs, strict=True)
        ]

    def _metrics(
        self,
        groups: Sequence[Group],
        informative: Sequence[Group],
        samples: Sequence[Sample],
        updates: Sequence[dict[str, Any]],
        held_out: HeldOut,
    ) -> dict[str, Any]:
        """Return the metrics of a step, with its FLOPs, and with its alarms if there are any.

        `groups` are all groups sampled, `informative` those learned from, `samples` their completions as
        samples, `updates` the metrics of each update, and `held_out` the measurement on held-out
        problems."""
        config = self.learner.model.config
        metrics = {**summarize(groups), **volume(groups, samples, config), **merge(updates)}
        metrics["flops"] += held_out.flops(config)
        if updates and not self.learner.exact:
            metrics.setdefault("gap_kl", updates[0]["kl_old"])
        metrics["informative"] = len(informative) / len(groups)
        alarms = [*held_out.alarms, *self.alarms.check(metrics, groups)]
        metrics = {**metrics, **held_out.metrics}
        return {**metrics, "alarms": alarms} if alarms else metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the state that an exact resume of the stage needs, under the keys of stored checkpoints."""
        state = {
            "learner": self.learner.state_dict(),
            **self.alarms.state_dict(),
            "panel": self.rewards.state_dict(),
            "step": self.step,
            "flops": self.log.flops,
        }
        if self.reference is not None and self.settings.policy.reference_every:
            state["reference"] = self.reference.model.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned, so that training continues from it."""
        self.learner.load_state_dict(state["learner"])
        self.alarms.load_state_dict(state)
        self.rewards.load_state_dict(state["panel"])
        self.step = state["step"]
        self.log.flops = state["flops"]
        if "reference" in state:
            self.reference.model.load_state_dict(state["reference"])


def is_informative(group: Group, policy: Policy) -> bool:
    """Return True if a group is learned from: either its rewards differ, or the setting `zero_variance` is
    `keep`."""
    return len(set(group.rewards)) > 1 or policy.zero_variance == "keep"


def minibatches(samples: list[Sample], count: int, seed: object) -> list[list[Sample]]:
    """Shuffle the samples and divide them into `count` parts of about equal size; empty parts are left
    out."""
    order = generator(seed, "minibatches").permutation(len(samples))
    parts = [[samples[i] for i in part] for part in np.array_split(order, count)]
    return [part for part in parts if part]


def group_advantages(groups: Sequence[Group], scale: str) -> list[np.ndarray]:
    """Return the advantages of each group, one array per group: the rewards minus the group's mean reward,
    divided as `scale` says.

    For `group` the divisor is the standard deviation of the group's rewards (GRPO), for `batch` that of all
    rewards of the batch; otherwise there is none. It is the sample standard deviation plus 1e-4, as in TRL.
    A group of equal rewards gives zeros."""
    centred = [np.asarray(group.rewards) - np.mean(group.rewards) for group in groups]
    if scale == "group":
        deviations = [np.std(group.rewards, ddof=1) + 1e-4 for group in groups]
        return [rewards / deviation for rewards, deviation in zip(centred, deviations, strict=True)]
    if scale == "batch" and groups:
        deviation = np.std(np.concatenate([group.rewards for group in groups]), ddof=1) + 1e-4
        return [rewards / deviation for rewards in centred]
    return centred
