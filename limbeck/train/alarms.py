"""Alarms of a reinforcement-learning stage: common failures, found in the metrics of each step, so that a
user can stop the run early."""

from __future__ import annotations

from collections import deque
from typing import Any

from ..config.recipe import RL
from ..types import LimbeckError

SAMPLER_GAP = 1e-3  # nats: the largest sampler/learner difference of a token that float32 rounding explains
SAMPLER_KL = 0.01  # nats: the KL between the two above which rounding to 16 bits is no explanation
WINDOW = 20  # steps


class AlarmMonitor:
    """Checks the metrics of each step for common failures, alone and against the first of the last `WINDOW`
    steps."""

    def __init__(self, settings: RL):
        self.rewards = settings.rewards
        self.history: deque[dict[str, Any]] = deque(maxlen=WINDOW)

    def check(self, metrics: dict[str, float]) -> list[str]:
        """Return one sentence for each alarm that the metrics of a step raise; an empty list if there are
        none.

        Raises LimbeckError if the log-probabilities of the sampler and of the learner differ by more than
        rounding."""
        if fault := disagreement(metrics.get("gap", 0.0), metrics.get("gap_kl")):
            raise LimbeckError(
                f"the sampler's log-probabilities differ from the learner's by {fault}: "
                "the engine runs with other weights or another precision; use float32 for both"
            )
        self.history.append(metrics)
        alarms = [*self._sampling(metrics), *self._length(metrics), *self._dominance(metrics)]
        return alarms

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
            part: weight * metrics.get(part, 0.0) for part, weight in self.rewards.items() if weight > 0
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
