"""Alarms of a reinforcement-learning stage: common failures, found in the metrics of each step, so that a
user can stop the run early."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from ..config.recipe import RL, Problems
from ..types import Group, LimbeckError, Resumable
from .learning_signal import NO_ANSWER, NO_SIGNAL, Diagnosis, has_signal

SAMPLER_GAP = 1e-3  # nats: the largest sampler/learner difference of a token that float32 rounding explains
SAMPLER_KL = 0.01  # nats: the KL between the two above which rounding to 16 bits is no explanation
WINDOW = 20  # steps


class AlarmMonitor:
    """Checks the metrics and the groups of each step for common failures, alone and against the first of the
    last `WINDOW` steps.

    `name` is the stage's name in the recipe and `problems` are the settings of its sources of problems, by
    name: messages name their keys. `without_signal` is the number of steps so far if none of them had a
    learning signal, else None."""

    def __init__(self, settings: RL, name: str = "rl", problems: Mapping[str, Problems] | None = None):
        self.settings = settings
        self.name = name
        self.diagnosis = Diagnosis(settings, name, problems or {})
        self.history: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self.without_signal: int | None = 0
        self._seen = ""  # of the latest step without a learning signal

    def check(self, metrics: dict[str, float], groups: Sequence[Group]) -> list[str]:
        """Return one sentence for each alarm that a step raises; an empty list if there are none. `groups`
        are its scored groups.

        Raises LimbeckError if the log-probabilities of the sampler and of the learner differ by more than
        rounding."""
        if fault := disagreement(metrics.get("gap", 0.0), metrics.get("gap_kl")):
            raise LimbeckError(
                f"the sampler's log-probabilities differ from the learner's by {fault}: "
                "the engine has other weights or another precision: use float32; a server must load the new"
            )
        self.history.append(metrics)
        alarms = self._signal(groups) or [*self._sampling(metrics), *self._dominance(metrics)]
        return [*alarms, *self._length(metrics)]

    @property
    def hopeless(self) -> bool:
        """True if no step had a learning signal for as many steps as the setting `steps_without_signal`
        allows."""
        allowed = self.settings.steps_without_signal
        return self.without_signal is not None and 0 < allowed <= self.without_signal

    @property
    def outlook(self) -> str:
        """A sentence that says when a stage without a learning signal stops; empty if it never does."""
        allowed = self.settings.steps_without_signal
        return f"After {allowed} such steps the stage stops. " if allowed else ""

    def refuse_hopeless(self) -> None:
        """Raise Resumable, with what was seen and the remedy, if the stage is hopeless."""
        if not self.hopeless:
            return
        raise Resumable(
            f"{NO_SIGNAL} in {self.without_signal} steps{self._seen}, or go on from the checkpoint with "
            f"--set stages.{self.name}.steps_without_signal=0"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs, under the keys of stored checkpoints."""
        return {"watched": list(self.history), "without_signal": self.without_signal, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned. A checkpoint of an older version does not tell whether
        there was a learning signal; there was, for all that is known."""
        self.history.extend(state["watched"])
        self.without_signal = state.get("without_signal")
        self._seen = state.get("seen", "")

    def _signal(self, groups: Sequence[Group]) -> list[str]:
        """Count the step, and return an alarm if no step so far had a learning signal, or if no response has
        an answer that the verifier can find."""
        if has_signal(groups, self.settings.policy):
            self.without_signal = None
        if self.without_signal is None:
            finding = self.diagnosis.unanswered(groups)
            return [f"{NO_ANSWER}: {finding}"] if finding else []
        self.without_signal += 1
        finding = self.diagnosis.of(groups)
        self._seen = f": {finding}"
        tell = finding.evident or self.without_signal > 1
        return [f"{NO_SIGNAL}: {finding}"] if tell else []

    def _sampling(self, metrics: dict[str, float]) -> list[str]:
        """Return alarms if most responses are truncated, or if hardly any group of responses has rewards
        that differ."""
        alarms = []
        if metrics["truncated"] > 0.5:
            alarms.append("more than half of the responses run out of tokens: raise max_new_tokens")
        if metrics["informative"] < 0.1:
            alarms.append("fewer than a tenth of the groups differ in reward: other problems are needed")
        return alarms

    def _length(self, metrics: dict[str, float]) -> list[str]:
        """Return an alarm if the mean response length (in tokens) tripled, or fell to a third, within the
        last `WINDOW` steps."""
        if len(self.history) < WINDOW:
            return []
        first = self.history[0]["length"]
        alarms = []
        if metrics["length"] > 3 * first:
            alarms.append("length tripled within 20 steps")
        if metrics["length"] < first / 3:
            alarms.append("length fell to a third within 20 steps")
        return alarms

    def _dominance(self, metrics: dict[str, float]) -> list[str]:
        """Return an alarm if one part of the reward, times its weight, contributes over five times as much
        as accuracy."""
        earned = {
            part: weight * metrics.get(part, 0.0)
            for part, weight in self.settings.rewards.items()
            if weight > 0
        }
        largest = max(earned, key=earned.get, default="")
        if largest in ("accuracy", "") or earned.get("accuracy", 0) >= 0.2 * earned[largest]:
            return []
        return [f"the part {largest!r} outweighs accuracy: lower its weight"]


def disagreement(gap: float, kl: float | None = None) -> str:
    """Return by how much sampler and learner differ, in words, if rounding does not explain it, else "".

    `gap` is the largest difference of a token's log-probabilities, in nats. Where the two compute in 16 bits
    and in different orders, single tokens may differ by much: then `kl` is given, the KL between the two, and
    judged instead.
    """
    if kl is None:
        return f"{gap:.4f} nats" if gap > SAMPLER_GAP else ""
    return f"a KL of {kl:.4f} nats a token" if kl > SAMPLER_KL else ""
