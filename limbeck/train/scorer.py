"""The forward pass of a frozen model over packed micro-batches: log-probabilities, entropies and hidden
states.

Dimensions: N input tokens · M predicted tokens · C hidden size · V vocabulary · K token ids that top-p
sampling left to choose from · R rows of a chunk (predicted tokens computed at once)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.ffn import MixtureOfExperts, RouterTrace
from ..model.ops import PlainOps
from .batch import Batch
from .divergence import States, tempered

CHUNK = 1 << 22  # logits in memory at once: 16 MiB in float32


class Scorer:
    """The forward pass of a frozen model: a reference, a teacher or a reward model. `Learner` is a `Scorer`
    with an optimizer."""

    def __init__(self, model: Decoder):
        self.model = model
        self.mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]

    def forward(self, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each predicted token [M], which is differentiable, and the entropy
        of the distribution at each predicted token [M]."""
        return self._logprobs(self._hidden(batch), batch, temperature)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Batch], temperature: float = 1.0) -> list[Tensor]:
        """Return the log-probabilities of the predicted tokens, one tensor [M] for each micro-batch, without
        gradients."""
        return [self.forward(batch, temperature)[0] for batch in batches]

    @torch.no_grad()
    def states(self, batch: Batch) -> States:
        """Return this model's hidden states at the predictions of a batch, and its output head. As a
        teacher's, they stand for its full logits.

        The model's own routers choose its experts; the routes in the batch belong to the student and are
        ignored."""
        hidden_NC = self._hidden(replace(batch, routes_NLK=None))
        batch.context.routes = None
        return States(hidden_NC[batch.predict_M], self.model.head.weight.detach())

    def _hidden(self, batch: Batch) -> Tensor:
        """Return the final hidden states [N, C]."""
        if self.mixtures:
            batch.context.routes = RouterTrace(batch.routes_NLK, 0.0, None)
        return self.model(batch.tokens_N, batch.context)

    def _logprobs(self, hidden_NC: Tensor, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities [M] and entropies [M] at the predictions, from the final hidden
        states [N, C]."""
        hidden_MC = hidden_NC[batch.predict_M]
        return token_logprobs(
            hidden_MC, self.model.head.weight, batch.targets_M, temperature, batch.kept_MK, self.model.ops
        )


def token_logprobs(
    hidden_MC: Tensor,
    head_VC: Tensor,
    targets_M: Tensor,
    temperature: float = 1.0,
    kept_MK: Tensor | None = None,
    ops: PlainOps | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log softmax(hidden @ head / temperature)[target] and the entropy of the distribution, both [M].

    The logits [M, V] are never in memory as a whole. With `kept_MK`, the softmax is over these token ids
    alone: the distribution that top-p sampling drew from. `ops` are the operations of the model's device, which
    may compute all this in kernels of their own."""
    if ops is not None and ops.logits_at_once and kept_MK is None:
        return _DeviceLogprobs.apply(hidden_MC, head_VC, targets_M, temperature, ops)
    return _TokenLogprobs.apply(hidden_MC, head_VC, targets_M, temperature, kept_MK)


class _TokenLogprobs(torch.autograd.Function):
    """Computes the logits chunk by chunk in the forward pass, and again in the backward pass. This needs
    less memory and more arithmetic than storing them."""

    @staticmethod
    def forward(ctx, hidden_MC, head_VC, targets_M, temperature, kept_MK):
        """Return the log-probabilities [M] and the entropies [M]."""
        ctx.rows = max(1, CHUNK // len(head_VC))
        ctx.temperature = temperature
        saved = [hidden_MC, head_VC, targets_M]
        if kept_MK is not None:
            saved.append(kept_MK)
        ctx.save_for_backward(*saved)
        logprobs = []
        entropies = []
        for hidden_RC, targets_R, kept_RK in _chunks(ctx.rows, hidden_MC, targets_M, kept_MK):
            logp_RV = _log_softmax(hidden_RC, head_VC, temperature, kept_RK)
            logprobs.append(logp_RV.gather(1, targets_R.unsqueeze(1)).squeeze(1))
            entropies.append(-(logp_RV.exp() * logp_RV.nan_to_num(neginf=0.0)).sum(1))
        entropy_M = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy_M)
        return torch.cat(logprobs), entropy_M

    @staticmethod
    def backward(ctx, grad_M, _):
        """Return the gradients of the hidden states [M, C] and of the head [V, C]. `grad_M` is the gradient
        of the log-probabilities; the entropies have none."""
        hidden_MC, head_VC, targets_M, *rest = ctx.saved_tensors
        kept_MK = rest[0] if rest else None
        grad_hidden_MC = torch.empty_like(hidden_MC)
        grad_head_VC = torch.zeros_like(head_VC) if ctx.needs_input_grad[1] else None
        begin = 0
        for hidden_RC, targets_R, kept_RK in _chunks(ctx.rows, hidden_MC, targets_M, kept_MK):
            end = begin + len(hidden_RC)
            grad_R1 = grad_M[begin:end].unsqueeze(1)
            logp_RV = _log_softmax(hidden_RC, head_VC, ctx.temperature, kept_RK)
            grad_RV = -logp_RV.exp_() * grad_R1
            grad_RV.scatter_add_(1, targets_R.unsqueeze(1), grad_R1)
            grad_RV /= ctx.temperature
            torch.mm(grad_RV, head_VC, out=grad_hidden_MC[begin:end])
            if grad_head_VC is not None:
                grad_head_VC.addmm_(grad_RV.T, hidden_RC)
            begin = end
        return grad_hidden_MC, grad_head_VC, None, None, None


class _DeviceLogprobs(torch.autograd.Function):
    """The same with the kernels of a device: log-probabilities with the bits of the sampler."""

    @staticmethod
    def forward(ctx, hidden_MC, head_VC, targets_M, temperature, ops):
        """Return the log-probabilities [M] and the entropies [M]."""
        ctx.rows = max(1, ops.logits_at_once // len(head_VC))
        ctx.settings = temperature, ops
        chunks = _chunks(ctx.rows, hidden_MC, targets_M, None)
        scores = [ops.score(hidden_RC, head_VC, targets_R, temperature) for hidden_RC, targets_R, _ in chunks]
        logprob_M, entropy_M, logsum_M = map(torch.cat, zip(*scores, strict=True))
        ctx.save_for_backward(hidden_MC, head_VC, targets_M, logsum_M)
        ctx.mark_non_differentiable(entropy_M)
        return logprob_M, entropy_M

    @staticmethod
    def backward(ctx, grad_M, _):
        """Return the gradients of the hidden states [M, C] and of the head [V, C]."""
        hidden_MC, head_VC, targets_M, logsum_M = ctx.saved_tensors
        temperature, ops = ctx.settings
        grad_hidden_MC = torch.empty_like(hidden_MC)
        grad_head_VC = torch.zeros_like(head_VC, dtype=torch.float32)
        for begin in range(0, max(1, len(hidden_MC)), ctx.rows):
            part = slice(begin, begin + ctx.rows)
            ops.score_backward(
                grad_M[part],
                hidden_MC[part],
                head_VC,
                targets_M[part],
                logsum_M[part],
                temperature,
                grad_hidden_MC[part],
                grad_head_VC,
            )
        return grad_hidden_MC, grad_head_VC.to(head_VC.dtype), None, None, None


def _log_softmax(hidden_RC: Tensor, head_VC: Tensor, temperature: float, kept_RK: Tensor | None) -> Tensor:
    """Return the log-probabilities of a chunk [R, V]; those of ids that are not in `kept_RK` are minus
    infinity."""
    logits_RV = tempered(hidden_RC, head_VC, temperature)
    if kept_RK is not None:
        outside_RV = torch.ones_like(logits_RV, dtype=torch.bool).scatter_(1, kept_RK.clamp(min=0), False)
        # padding is -1 and so clamped to id 0, which is inside only where the sampler kept it
        outside_RV[:, 0] = ~(kept_RK == 0).any(1)
        logits_RV.masked_fill_(outside_RV, float("-inf"))
    return torch.log_softmax(logits_RV, -1)


def _chunks(
    rows: int, hidden_MC: Tensor, targets_M: Tensor, kept_MK: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield the predictions in chunks of `rows`: hidden states [R, C], targets [R], and the kept token ids
    [R, K] or None."""
    for begin in range(0, max(1, len(hidden_MC)), rows):
        part = slice(begin, begin + rows)
        yield hidden_MC[part], targets_M[part], None if kept_MK is None else kept_MK[part]
