"""The learner: a model, its optimizer, and one update. RL, SFT and distillation differ in the loss they pass.

N input tokens · M predicted tokens · C hidden · L sparse layers · E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.parts import Optimizer as OptimizerSettings
from ..model.decoder import Decoder
from ..model.ffn import RouterTrace, balance_experts
from ..types import LimbeckError
from .batch import Batch
from .divergence import Logits
from .losses import Loss, Metrics
from .optimizer import Optimizer
from .overflow import SLOWER, blamed, finite, spoiled, stopped
from .scorer import Scorer, token_logprobs


class Learner(Scorer):
    """A model that learns. `step` counts updates and drives the learning-rate schedule; `recompute` saves
    memory by recomputing activations (model/decoder.py)."""

    def __init__(self, model: Decoder, settings: OptimizerSettings, steps: int, recompute: bool = False):
        super().__init__(model)
        if recompute and (model.config.experts or model.config.share_kv > 1):
            raise LimbeckError(
                "recompute: mixtures of experts and shared keys keep notes of a forward pass; leave it out"
            )
        model.recompute = recompute
        self.settings = settings
        self.step = 0
        self.optimizer = Optimizer(model, settings, steps)
        self.parameters = list(model.parameters())
        self._routes: list[RouterTrace] = []  # of the micro-batches since the last apply()
        self._replayed = False

    def update(self, batches: Sequence[Batch], loss: Loss, temperature: float = 1.0) -> dict[str, Any]:
        """One optimizer step over all micro-batches of a batch; returns its metrics.

        Raises LimbeckError, with the step not taken, if the loss, a gradient or a new weight is not finite.
        """
        metrics = self.accumulate(batches, loss, temperature)
        return {**metrics, **self.apply()}

    def accumulate(self, batches: Sequence[Batch], loss: Loss, temperature: float = 1.0) -> dict[str, float]:
        """Add the gradients of these micro-batches to those that are there; returns the metrics of the
        loss."""
        totals: Metrics = {}
        for batch in batches:
            value, metrics = self._loss(batch, loss, temperature)
            if not math.isfinite(value.detach()):
                raise self._stopped(*blamed(self.model, batch))
            value.backward()
            _add(totals, metrics)
            if self.mixtures:
                self._routes.append(batch.context.routes)
                self._replayed = batch.routes_NLK is not None
        return {name: float(value) for name, value in totals.items()}

    def apply(self) -> dict[str, Any]:
        """Clip the accumulated gradients, take the optimizer step, balance the experts; returns the
        gradient's norm before clipping and the experts' load."""
        norm = self.optimizer.step(self.step)
        if not math.isfinite(norm):
            gradients = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
            raise self._stopped(f"the gradient of {spoiled(gradients)} is", SLOWER)
        if not finite(self.parameters):
            raise self._stopped(f"the new weight {spoiled(self.model.named_parameters())} is", SLOWER)
        self.step += 1
        routing = self._balance() if self.mixtures else {}
        self._routes = []
        return {**routing, "gradient_norm": norm}

    def _stopped(self, what: str, remedy: str) -> LimbeckError:
        """The error of a step that cannot be taken; the gradients are dropped."""
        self.model.zero_grad(set_to_none=True)
        self._routes = []
        return stopped(what, remedy, self.step, self.optimizer.steps)

    def _loss(self, batch: Batch, loss: Loss, temperature: float) -> tuple[Tensor, Metrics]:
        """The loss of a micro-batch with its penalties, and its metrics. A loss gets log-probabilities of
        tokens, or with a teacher the student's hidden states and head."""
        hidden_NC = self._hidden(batch)
        if batch.teacher is not None:
            logits = Logits(hidden_NC[batch.predict_M], self.model.head.weight, temperature)
            value, metrics = loss(logits, batch)
        else:
            logprobs_M, entropy_M = self._logprobs(hidden_NC, batch, temperature)
            value, metrics = loss(logprobs_M, batch)
            metrics = {**metrics, "entropy": entropy_M.sum() / batch.tokens}
        if self.model.ahead and batch.logprobs_M is None:
            metrics["loss_ahead"] = self._mtp_loss(hidden_NC, batch)
            value = value + self.settings.mtp_loss_weight * metrics["loss_ahead"]
        routes = batch.context.routes
        if routes is not None and routes.penalties:
            metrics["loss_balance"] = torch.stack(routes.penalties).sum()
            value = value + metrics["loss_balance"]
        return value, metrics

    def _hidden(self, batch: Batch) -> Tensor:
        """Final hidden states [N, C]; with gradients, the experts' balance loss is computed too."""
        if self.mixtures:
            balance = self.settings.balance_loss / batch.sequences if torch.is_grad_enabled() else 0.0
            sequences_N = batch.context.sequences if balance else None
            batch.context.routes = RouterTrace(batch.routes_NLK, balance, sequences_N)
        return self.model(batch.tokens_N, batch.context)

    def _mtp_loss(self, hidden_NC: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of the multi-token prediction modules (arXiv 2412.19437, eq. 24-25): each target
        again, predicted from one position further back per module."""
        positions_M = batch.context.positions[batch.predict_M]
        ends_N = batch.context.positions.roll(-1) == 0  # the next token begins another sequence
        next_N = batch.next_N
        losses = []
        for depth in range(len(self.model.ahead)):
            hidden_NC = self.model.predict_next(hidden_NC, next_N, batch.context, depth)
            far_M = positions_M > depth
            rows_M = batch.predict_M[far_M] - depth - 1
            targets_M = batch.targets_M[far_M]
            logprobs_M, _ = token_logprobs(hidden_NC[rows_M], self.model.head.weight, targets_M)
            losses.append(-logprobs_M.sum() / batch.tokens)
            next_N = next_N.roll(-1).masked_fill(ends_N, 0)
        return torch.stack(losses).mean()

    def _balance(self) -> dict[str, Any]:
        """Adjust the routers' biases by the whole batch's load. Metrics: the largest load over the mean, the
        routers' entropy, and each expert's share of its layer's tokens."""
        layers = zip(*(routes.loads for routes in self._routes), strict=True)
        loads_LE = [torch.stack(loads).sum(0) for loads in layers]
        if not self._replayed:  # replayed routes are not the router's choice
            balance_experts(self.mixtures, loads_LE, self.settings.balance_rate)
        entropy = sum(float(sum(routes.entropies)) for routes in self._routes)
        choices = sum(int(load_E.sum()) for load_E in loads_LE)
        peaks = [float(load_E.max() / load_E.float().mean()) for load_E in loads_LE]
        return {
            "expert_load": float(np.mean(peaks)),
            "router_entropy": entropy / choices * self.mixtures[0].experts.top_k,
            "expert_loads": [_shares(load_E) for load_E in loads_LE],
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs; random draws are keyed by step and need no state."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def weights(self) -> dict[str, Tensor]:
        """The live weights, not a copy: clone what must outlast the next update."""
        return self.model.state_dict()


def _add(totals: Metrics, metrics: Metrics) -> None:
    """Add the metrics of a micro-batch; of `max_...` the larger counts."""
    for name, value in metrics.items():
        value = value.detach()
        if name in totals:
            join = torch.maximum if name.startswith("max_") else torch.add
            value = join(totals[name], value)
        totals[name] = value


def _shares(load_E: Tensor) -> list[float]:
    """Each expert's share of the tokens [E], to four digits."""
    return [round(share, 4) for share in (load_E / load_E.sum()).tolist()]
