"""The learner: a model, its optimiser, and one update. RL, SFT and distillation differ in the loss they pass.

N input tokens · M predicted tokens · C hidden · V vocabulary · K kept ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.parts import Optimizer as OptimizerSettings
from ..model.decoder import Decoder
from ..model.ffn import MixtureOfExperts, Routes, balance_experts
from ..types import LimbeckError
from .batch import Batch
from .divergence import Logits, States, tempered
from .losses import Loss
from .optimizer import Optimizer
from .overflow import SLOWER, blamed, finite, spoiled, stopped

CHUNK = 1 << 22  # logits that may stand in memory at once: 16 MiB in float32


class Learner:
    """Owns the weights that learn. `step` counts updates and drives the schedule; `recompute` trades time for memory
    (model/decoder.py)."""

    def __init__(self, model: Decoder, settings: OptimizerSettings, steps: int, recompute: bool = False):
        self.model, self.settings, self.step = model, settings, 0
        if recompute and (model.config.experts or model.config.share_kv > 1):
            raise LimbeckError(
                "recompute: mixtures of experts and shared keys keep notes of a forward pass; leave it out"
            )
        model.recompute = recompute
        self.optimizer = Optimizer(model, settings, steps)
        self.parameters = list(model.parameters())
        self.mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]

    def update(self, batches: Sequence[Batch], loss: Loss, temperature: float = 1.0) -> dict[str, Any]:
        """One optimiser step over all micro-batches; returns the batch's metrics. A loss or gradient that is not finite is
        an error, and the step is not taken; so is a step that has made a weight so."""
        totals: dict[str, Tensor] = {}
        for batch in batches:
            hidden_NC = self._hidden(batch)
            value, metrics = self._lose(hidden_NC, batch, loss, temperature)
            if self.model.ahead and batch.logprobs_M is None:
                metrics["loss_ahead"] = self._ahead(hidden_NC, batch)
                value = value + self.settings.mtp_loss_weight * metrics["loss_ahead"]
            value = sum(self._penalties(batch, metrics), value)
            if not math.isfinite(value.detach()):
                raise self._stopped(*blamed(self.model, batch))
            value.backward()
            for name, part in metrics.items():
                before = totals.get(name)
                join = torch.maximum if name.startswith("max_") else torch.add
                totals[name] = part.detach() if before is None else join(before, part.detach())
        norm = self.optimizer.step(self.step)
        if not math.isfinite(norm):
            gradients = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
            raise self._stopped(f"the gradient of {spoiled(gradients)} is", SLOWER)
        if not finite(self.parameters):
            raise self._stopped(f"the new weight {spoiled(self.model.named_parameters())} is", SLOWER)
        self.step += 1
        routing = self._balance(batches) if self.mixtures else {}
        return {**{name: float(value) for name, value in totals.items()}, **routing, "gradient_norm": norm}

    def _stopped(self, what: str, remedy: str) -> LimbeckError:
        """What a step that cannot be taken ends with; its gradients are forgotten."""
        self.model.zero_grad(set_to_none=True)
        return stopped(what, remedy, self.step, self.optimizer.steps)

    def _lose(
        self, hidden_NC: Tensor, batch: Batch, loss: Loss, temperature: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss sees the log-probabilities of tokens; beside a teacher, what makes the logits."""
        if batch.teacher is not None:
            return loss(Logits(hidden_NC[batch.predict_M], self.model.head.weight, temperature), batch)
        logprobs_M, entropy_M = self._logprobs(hidden_NC, batch, temperature)
        value, metrics = loss(logprobs_M, batch)
        return value, {**metrics, "entropy": entropy_M.sum() / batch.tokens}

    @torch.no_grad()
    def states(self, batch: Batch) -> States:
        """What this model, as a teacher, has to say at the batch's predictions. Experts are its own choice."""
        hidden_NC = self._hidden(replace(batch, routes_NLK=None))
        batch.context.routes = None
        return States(hidden_NC[batch.predict_M], self.model.head.weight.detach())

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Batch], temperature: float = 1.0) -> list[Tensor]:
        """Log-probabilities of the predicted tokens, micro-batch by micro-batch."""
        return [self.forward(batch, temperature)[0] for batch in batches]

    def forward(self, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability of each predicted token [M], with its gradient, and the entropy it was chosen at [M]."""
        return self._logprobs(self._hidden(batch), batch, temperature)

    def _hidden(self, batch: Batch) -> Tensor:
        if self.mixtures:
            balance = self.settings.balance_loss / batch.sequences if torch.is_grad_enabled() else 0.0
            sequences_N = batch.context.sequences if balance else None
            batch.context.routes = Routes(batch.routes_NLK, balance, sequences_N)
        return self.model(batch.tokens_N, batch.context)

    def _logprobs(self, hidden_NC: Tensor, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        hidden_MC = hidden_NC[batch.predict_M]
        return token_logprobs(hidden_MC, self.model.head.weight, batch.targets_M, temperature, batch.kept_MK)

    def _ahead(self, hidden_NC: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of what the modules that look ahead predict (arXiv 2412.19437, eq. 24-25): each
        target again, from one position further back."""
        positions_M, losses, next_N = batch.context.positions[batch.predict_M], [], batch.next_N
        for depth in range(len(self.model.ahead)):
            hidden_NC = self.model.predict_next(hidden_NC, next_N, batch.context, depth)
            far_M = positions_M > depth
            rows_M = batch.predict_M[far_M] - depth - 1
            logprobs_M, _ = token_logprobs(hidden_NC[rows_M], self.model.head.weight, batch.targets_M[far_M])
            losses.append(-logprobs_M.sum() / batch.tokens)
            next_N = next_N.roll(-1).masked_fill(
                batch.context.positions.roll(-1) == 0, 0
            )  # nothing follows an end
        return torch.stack(losses).mean()

    def _penalties(self, batch: Batch, metrics: dict[str, Tensor]) -> list[Tensor]:
        routes = batch.context.routes
        if routes is None or not routes.penalties:
            return []
        metrics["loss_balance"] = torch.stack(routes.penalties).sum()
        return [metrics["loss_balance"]]

    def _balance(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Move the routers' biases by the whole batch's load; that load, at most over mean, and the entropy; and which
        share of its layer's tokens each expert had."""
        routes = [batch.context.routes for batch in batches]
        loads = [torch.stack(layer).sum(0) for layer in zip(*(r.loads for r in routes), strict=True)]
        if batches[0].routes_NLK is None:  # a replayed choice is not the router's
            balance_experts(self.mixtures, loads, self.settings.balance_rate)
        entropy = sum(float(sum(r.entropies)) for r in routes) / sum(int(load.sum()) for load in loads)
        return {
            "expert_load": float(np.mean([float(load.max() / load.float().mean()) for load in loads])),
            "router_entropy": entropy * self.mixtures[0].experts.top_k,
            "expert_loads": [[round(share, 4) for share in (load / load.sum()).tolist()] for load in loads],
        }

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs; randomness is keyed by step and so needs nothing."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def weights(self) -> dict[str, Tensor]:
        """The weights as they are, not a copy: who keeps them clones them."""
        return self.model.state_dict()


def token_logprobs(
    hidden_MC: Tensor,
    head_VC: Tensor,
    targets_M: Tensor,
    temperature: float = 1.0,
    kept_MK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ head / temperature)[target], and the entropy, without [M, V] ever standing whole.

    Where `kept_MK` is given, the softmax runs over those ids alone: the choice the sampler really had.
    """
    return _TokenLogprobs.apply(hidden_MC, head_VC, targets_M, temperature, kept_MK)


class _TokenLogprobs(torch.autograd.Function):
    """Logits are made chunk by chunk, and made again on the way back: memory for arithmetic."""

    @staticmethod
    def forward(ctx, hidden_MC, head_VC, targets_M, temperature, kept_MK):
        ctx.rows = max(1, CHUNK // len(head_VC))
        ctx.temperature = temperature
        ctx.save_for_backward(hidden_MC, head_VC, targets_M, *([kept_MK] if kept_MK is not None else []))
        logprobs, entropies = [], []
        for hidden, targets, kept in _chunks(ctx.rows, hidden_MC, targets_M, kept_MK):
            logp = _log_softmax(hidden, head_VC, temperature, kept)
            logprobs.append(logp.gather(1, targets.unsqueeze(1)).squeeze(1))
            entropies.append(-(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(1))
        entropy_M = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy_M)
        return torch.cat(logprobs), entropy_M

    @staticmethod
    def backward(ctx, grad_M, _):
        hidden_MC, head_VC, targets_M, *kept = ctx.saved_tensors
        grad_hidden, grad_head = torch.empty_like(hidden_MC), torch.zeros_like(head_VC)
        begin = 0
        for hidden, targets, kept_ in _chunks(ctx.rows, hidden_MC, targets_M, kept[0] if kept else None):
            end = begin + len(hidden)
            grad = grad_M[begin:end].unsqueeze(1)
            grad_logits = -_log_softmax(hidden, head_VC, ctx.temperature, kept_).exp_() * grad
            grad_logits.scatter_add_(1, targets.unsqueeze(1), grad)
            grad_logits /= ctx.temperature
            torch.mm(grad_logits, head_VC, out=grad_hidden[begin:end])
            grad_head.addmm_(grad_logits.T, hidden)
            begin = end
        return grad_hidden, grad_head, None, None, None


def _log_softmax(hidden: Tensor, head_VC: Tensor, temperature: float, kept: Tensor | None) -> Tensor:
    logits = tempered(hidden, head_VC, temperature)
    if kept is not None:
        outside = torch.ones_like(logits, dtype=torch.bool).scatter_(1, kept.clamp(min=0), False)
        # padding points at id 0, which is kept only where the sampler kept it
        outside[:, 0] = ~(kept == 0).any(1)
        logits.masked_fill_(outside, float("-inf"))
    return torch.log_softmax(logits, -1)


def _chunks(rows: int, hidden: Tensor, targets: Tensor, kept: Tensor | None):
    for begin in range(0, max(1, len(hidden)), rows):
        part = slice(begin, begin + rows)
        yield hidden[part], targets[part], None if kept is None else kept[part]
