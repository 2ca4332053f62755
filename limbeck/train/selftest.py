"""Is this reinforcement-learning run correct? Checks that stop it with a remedy, and alarms that do not."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..config.recipe import RL
from ..types import LimbeckError, Sample
from .batch import pack
from .learner import Learner
from .losses import Loss

GAP = 1e-3  # nats: the largest sampler/learner difference of one token that rounding in float32 explains
FEW = 4


def audit(learner: Learner, samples: Sequence[Sample], loss: Loss, end: int, temperature: float) -> None:
    """Before the first update: end-of-turn learned, prompts masked, sampler = learner, and a gradient that does
    not depend on how the batch is cut."""
    finished = [s for s in samples if s.tokens[-1] == end]
    chosen = (finished or list(samples))[:FEW]
    whole, cut = pack(chosen, 1 << 30), pack(chosen, 1)
    targets = torch.cat([b.targets_M for b in whole])
    if finished and int((targets == end).sum()) < len(chosen):
        raise LimbeckError(
            "self-test: the end-of-turn token is not in the loss; check eos_token in tokenizer_config.json"
        )
    if len(targets) != sum(len(s.tokens) - s.start for s in chosen):
        raise LimbeckError("self-test: the loss sees other tokens than the completions'; please report this")
    scored = torch.cat(learner.logprobs(whole, temperature))
    gap = float((scored - torch.cat([b.logprobs_M for b in whole])).abs().max())
    if gap > GAP:
        raise LimbeckError(
            f"self-test: sampler and learner disagree by {gap:.4f} nats on the same weights; "
            "sample with temperature > 0, and with keep_sampling_mask where top_p < 1"
        )
    one, many = _gradient(learner, whole, loss, temperature), _gradient(learner, cut, loss, temperature)
    difference = float((one - many).norm() / one.norm().clamp(min=1e-12))
    if difference > 1e-3:
        raise LimbeckError(
            f"self-test: the gradient changes by {difference:.1%} with the micro-batches; please report this"
        )


def _gradient(learner: Learner, batches: list, loss: Loss, temperature: float) -> torch.Tensor:
    for batch in batches:
        # before the first update the reference is the policy, and so scores what the sampler scored
        batch = replace(batch, reference_M=batch.logprobs_M)
        loss(learner.forward(batch, temperature)[0], batch)[0].backward()
    gradient = torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])
    learner.model.zero_grad(set_to_none=True)
    return gradient


class Watch:
    """Looks back over a run: what often goes wrong, said while it can still be stopped."""

    def __init__(self, settings: RL):
        self.rewards = settings.rewards
        self.history: deque[dict[str, Any]] = deque(maxlen=20)

    def check(self, metrics: dict[str, float]) -> dict[str, Any]:
        """`{"alarms": [...]}` where something looks wrong, else nothing."""
        if metrics.get("gap", 0.0) > GAP:
            raise LimbeckError(
                f"the sampler's log-probabilities differ from the learner's by {metrics['gap']:.4f} nats: "
                "the engine runs with other weights or another precision; use float32 for both"
            )
        self.history.append(metrics)
        alarms = [text for test, text in self._tests(metrics) if test]
        return {"alarms": alarms} if alarms else {}

    def _tests(self, metrics: dict[str, float]) -> list[tuple[bool, str]]:
        first, long = self.history[0], len(self.history) == self.history.maxlen
        earned = {k: w * metrics.get(k, 0.0) for k, w in self.rewards.items() if w > 0}
        loudest = max(earned, key=earned.get, default="")
        return [
            (
                metrics["truncated"] > 0.5,
                "more than half of the responses run out of tokens: raise max_new_tokens",
            ),
            (
                metrics["informative"] < 0.1,
                "fewer than a tenth of the groups differ in reward: other problems are needed",
            ),
            (long and metrics["length"] > 3 * first["length"], "length tripled within 20 steps"),
            (long and metrics["length"] < first["length"] / 3, "length fell to a third within 20 steps"),
            (
                loudest not in ("accuracy", "") and earned.get("accuracy", 0) < 0.2 * earned[loudest],
                f"the part {loudest!r} outweighs accuracy: lower its weight",
            ),
        ]
