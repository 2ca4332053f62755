"""The forward pass of a frozen model over packed micro-batches: log-probabilities, entropies and hidden
states.

Dimensions: N input tokens · M predicted tokens · C hidden size · V vocabulary · K token ids that top-p
sampling left to choose from · R rows of a chunk (predicted tokens computed at once)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..activity import add_tokens, track
from ..model.decoder import Decoder
from ..model.ffn import MixtureOfExperts, RouterTrace
from ..model.ops import CPU, Ops
from ..model.ops.table import Predictions
from ..types import Sample
from .batch import Batch, pack
from .divergence import States

CHUNK = 1 << 22  # logits in memory at once: 16 MiB in float32


class Scorer:
    """The forward pass of a frozen model: a reference, a teacher or a reward model. `Learner` is a `Scorer`
    with an optimizer."""

    def __init__(self, model: Decoder):
        self.model = model
        self.mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]

    @property
    def device(self) -> torch.device:
        """The device that the model lies on."""
        return self.model.embed.weight.device

    @property
    def exact(self) -> bool:
        """True if a sampler with these weights gives a token the same log-probability, up to what float32
        rounds; False in 16 bits where the order of sums depends on the batch."""
        return self.model.embed.weight.dtype.itemsize > 2 or self.model.ops.exact

    def pack(self, samples: Sequence[Sample], batch_tokens: int) -> list[Batch]:
        """Pack samples into micro-batches on the model's device (see `batch.pack`)."""
        return pack(samples, batch_tokens, self.device)

    def forward(self, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each predicted token [M], which is differentiable, and the entropy
        of the distribution at each predicted token [M]."""
        return self._logprobs(self._hidden(batch), batch, temperature)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Batch], temperature: float = 1.0) -> list[Tensor]:
        """Return the log-probabilities of the predicted tokens, one tensor [M] for each micro-batch, without
        gradients."""
        parts = track(batches, "computing log-probabilities", "micro-batches")
        logprobs = []
        for batch in parts:
            logprobs.append(self.forward(batch, temperature)[0])
            add_tokens(len(batch.tokens_N))
        return logprobs

    @torch.no_grad()
    def states(self, batch: Batch) -> States:
        """Return this model's hidden states at the predictions of a batch, and its output head. As a
        teacher's, they stand for its full logits.

        The model's own routers choose its experts; the routes in the batch belong to the student and are
        ignored."""
        hidden_NC = self._hidden(replace(batch, routes_NLK=None))
        batch.context.routes = None
        add_tokens(len(batch.tokens_N))
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
    ops: Ops = CPU,
) -> tuple[Tensor, Tensor]:
    """Return log softmax(hidden @ head / temperature)[target] and the entropy of the distribution, both [M].

    The logits [M, V] are never in memory as a whole. With `kept_MK`, the softmax is over these token ids
    alone: the distribution that top-p sampling drew from. `ops` are the operations of the model's device."""
    return _TokenLogprobs.apply(hidden_MC, head_VC, targets_M, temperature, kept_MK, ops)


class _TokenLogprobs(torch.autograd.Function):
    """Computes the logits chunk by chunk in the forward pass, and again in the backward pass. This needs
    less memory and more arithmetic than storing them."""

    @staticmethod
    def forward(ctx, hidden_MC, head_VC, targets_M, temperature, kept_MK, ops):
        """Return the log-probabilities [M] and the entropies [M]."""
        ctx.settings = temperature, ops
        chunks = _chunks(ops, hidden_MC, head_VC, targets_M, temperature, kept_MK)
        scores = [ops.score(predictions) for _, predictions in chunks]
        logprob_M, entropy_M, needed_M = map(torch.cat, zip(*scores, strict=True))
        ctx.save_for_backward(hidden_MC, head_VC, targets_M, kept_MK, needed_M)
        ctx.mark_non_differentiable(entropy_M)
        return logprob_M, entropy_M

    @staticmethod
    def backward(ctx, grad_M, _):
        """Return the gradients of the hidden states [M, C] and of the head [V, C]. `grad_M` is the gradient
        of the log-probabilities; the entropies have none. The head's gradient is summed in float32 at
        least."""
        hidden_MC, head_VC, targets_M, kept_MK, needed_M = ctx.saved_tensors
        temperature, ops = ctx.settings
        grad_hidden_MC = torch.empty_like(hidden_MC)
        precision = torch.promote_types(head_VC.dtype, torch.float32)
        learns_head = ctx.needs_input_grad[1]
        grad_head_VC = torch.zeros_like(head_VC, dtype=precision) if learns_head else None
        for part, predictions in _chunks(ops, hidden_MC, head_VC, targets_M, temperature, kept_MK):
            grad_hidden_MC[part] = ops.score_backward(predictions, grad_M[part], needed_M[part], grad_head_VC)
        by_head_VC = grad_head_VC.to(head_VC.dtype) if learns_head else None
        return grad_hidden_MC, by_head_VC, None, None, None, None


def _chunks(
    ops: Ops,
    hidden_MC: Tensor,
    head_VC: Tensor,
    targets_M: Tensor,
    temperature: float,
    kept_MK: Tensor | None,
) -> Iterator[tuple[slice, Predictions]]:
    """Yield the predictions in chunks of so many logits as the device has in memory at once."""
    rows = max(1, (ops.logits_at_once or CHUNK) // ops.ids_at_once(len(head_VC)))
    for begin in range(0, max(1, len(hidden_MC)), rows):
        part = slice(begin, begin + rows)
        kept_RK = None if kept_MK is None else kept_MK[part]
        yield part, Predictions(hidden_MC[part], head_VC, targets_M[part], temperature, kept_RK)
