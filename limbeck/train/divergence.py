"""Divergences between a student's and a teacher's next-token distributions, over the whole vocabulary.

Logits are computed once, chunk by chunk, and their gradient with them: neither the student's nor the
teacher's logits [M, V] are ever in memory whole. The teacher gives hidden states (full logits) or labels: its
top-k ids, and the mass of all others as one more event. M predicted tokens · R rows of a chunk · C hidden · V
vocabulary · K labels · E events: V, or K and the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 21  # logits of one side in memory at once: 8 MiB in float32, a handful of times
FLOOR = -1e4  # nats: the log-probability in place of minus infinity, so that 0 log 0 is 0

Measure = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Logits:
    """A student's logits, not yet computed: hidden states at M predictions, the head, and the temperature."""

    hidden_MC: Tensor
    head_VC: Tensor
    temperature: float = 1.0


@dataclass(frozen=True)
class States:
    """A teacher's hidden states at the same predictions, and its head: its full logits, computed when
    needed."""

    hidden_MC: Tensor
    head_VC: Tensor

    def width(self, student: int) -> int:
        """The number of ids that are compared: heads may be padded to different sizes."""
        return min(student, len(self.head_VC))

    def events(self, part: slice, logq_RV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of both over the same events [R, E]: teacher, student."""
        return log_softmax(self.hidden_MC[part], self.head_VC[: logq_RV.shape[1]], temperature), logq_RV

    def spread(self, part: slice, slope_RE: Tensor, logq_RE: Tensor, logq_RV: Tensor) -> Tensor:
        """The gradient of the student's logits [R, V] from that of the events [R, E]."""
        return slope_RE


@dataclass(frozen=True)
class TopK:
    """A teacher's top-k ids with their log-probabilities, and the log-probability `tail_M` of all others
    together.

    A divergence of two distributions with the same ids merged is exact, and never above that of the full
    ones."""

    ids_MK: Tensor
    logprobs_MK: Tensor
    tail_M: Tensor

    def width(self, student: int) -> int:
        """The number of ids that are compared: all of the student's."""
        return student

    def events(self, part: slice, logq_RV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of both over the K ids and the rest [R, E]: teacher, student."""
        ids_RK = self.ids_MK[part]
        logp_RE = torch.cat([self.logprobs_MK[part], self.tail_M[part].unsqueeze(1)], 1).to(logq_RV.dtype)
        rest_R1 = logq_RV.scatter(1, ids_RK, float("-inf")).logsumexp(1, keepdim=True)
        logq_RE = torch.cat([logq_RV.gather(1, ids_RK), rest_R1], 1)
        return logp_RE.clamp(min=FLOOR), logq_RE.clamp(min=FLOOR)

    def spread(self, part: slice, slope_RE: Tensor, logq_RE: Tensor, logq_RV: Tensor) -> Tensor:
        """The gradient of the student's logits [R, V]; that of the rest is shared among its ids by their
        probabilities."""
        shared_RV = slope_RE[:, -1:] * (logq_RV - logq_RE[:, -1:]).exp()
        return shared_RV.scatter_(1, self.ids_MK[part], slope_RE[:, :-1])


# ---------------------------------------------------------------- measures of two distributions

# Each takes log-probabilities [R, E] of teacher and student, and returns the divergence [R] and its gradient
# by the
# student's logits [R, E]. With g = dF/dq that is q (g - sum q g); the closed forms below never divide by q.


def forward_kl(logp_RE: Tensor, logq_RE: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student), mode-covering. Hinton et al. 2015, arXiv 1503.02531."""
    p_RE = logp_RE.exp()
    return (p_RE * (logp_RE - logq_RE)).sum(1), logq_RE.exp() - p_RE


def reverse_kl(logp_RE: Tensor, logq_RE: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher), mode-seeking. MiniLLM, arXiv 2306.08543."""
    q_RE = logq_RE.exp()
    ratio_RE = logq_RE - logp_RE
    value_R = (q_RE * ratio_RE).sum(1)
    return value_R, q_RE * (ratio_RE - value_R.unsqueeze(1))


def jensen_shannon(beta: float) -> Measure:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student (GKD, arXiv
    2306.13649, eq. 1); it is of the order of beta times the forward KL for a small beta."""

    def measure(logp_RE: Tensor, logq_RE: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence [R] and its gradient [R, E] from log-probabilities of teacher and student [R, E]."""
        logm_RE = torch.logaddexp(logp_RE + math.log(beta), logq_RE + math.log1p(-beta))
        q_RE = logq_RE.exp()
        ratio_RE = logq_RE - logm_RE
        student_R = (q_RE * ratio_RE).sum(1)
        value_R = beta * (logp_RE.exp() * (logp_RE - logm_RE)).sum(1) + (1 - beta) * student_R
        return value_R, (1 - beta) * q_RE * (ratio_RE - student_R.unsqueeze(1))

    return measure


# ---------------------------------------------------------------- over a batch


def divergence(logits: Logits, teacher: States | TopK, measure: Measure) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence summed over all predictions, differentiable; its terms [M] and the student's entropy
    [M], not differentiable."""
    head_VC = logits.head_VC[: teacher.width(len(logits.head_VC))]
    return _Divergence.apply(logits.hidden_MC, head_VC, teacher, measure, logits.temperature)


class _Divergence(torch.autograd.Function):
    """All terms of the sum have the same weight, so the forward pass computes their gradient; the backward
    pass scales it."""

    @staticmethod
    def forward(ctx, hidden_MC, head_VC, teacher, measure, temperature):
        """The divergence's sum, its terms [M] and the student's entropy [M]."""
        learns = any(ctx.needs_input_grad)
        grad_hidden_MC = torch.zeros_like(hidden_MC) if learns else None
        grad_head_VC = torch.zeros_like(head_VC) if learns else None
        values = []
        entropies = []
        rows = max(1, CHUNK // len(head_VC))
        for begin in range(0, max(1, len(hidden_MC)), rows):
            part = slice(begin, begin + rows)
            logq_RV = log_softmax(hidden_MC[part], head_VC, temperature)
            logp_RE, logq_RE = teacher.events(part, logq_RV, temperature)
            value_R, slope_RE = measure(logp_RE, logq_RE)
            values.append(value_R)
            entropies.append(-(logq_RV.exp() * logq_RV).sum(1))
            if learns:
                slope_RV = teacher.spread(part, slope_RE, logq_RE, logq_RV).div_(temperature)
                torch.mm(slope_RV, head_VC, out=grad_hidden_MC[part])
                grad_head_VC.addmm_(slope_RV.T, hidden_MC[part])
        if learns:
            ctx.save_for_backward(grad_hidden_MC, grad_head_VC)
        value_M = torch.cat(values)
        entropy_M = torch.cat(entropies)
        ctx.mark_non_differentiable(value_M, entropy_M)
        return value_M.sum(), value_M, entropy_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        """Scale the gradients of the forward pass: [M, C] and [V, C]."""
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad, grad_head * grad, None, None, None


def tempered(hidden_RC: Tensor, head_VC: Tensor, temperature: float) -> Tensor:
    """Logits [R, V] divided by the temperature."""
    logits_RV = hidden_RC @ head_VC.T
    if temperature != 1.0:
        logits_RV /= temperature
    return logits_RV


def log_softmax(hidden_RC: Tensor, head_VC: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [R, V] at a temperature."""
    return torch.log_softmax(tempered(hidden_RC, head_VC, temperature), -1)


@torch.no_grad()
def top_k(hidden_MC: Tensor, head_VC: Tensor, count: int, temperature: float) -> TopK:
    """A teacher's labels from its hidden states: its `count` most probable ids, and the mass of the
    others."""
    size = len(head_VC)
    rows = max(1, CHUNK // size)
    ids = []
    logprobs = []
    tails = []
    for begin in range(0, len(hidden_MC), rows):
        logp_RV = log_softmax(hidden_MC[begin : begin + rows], head_VC, temperature)
        top = logp_RV.topk(min(count, size), dim=1)
        ids.append(top.indices)
        logprobs.append(top.values)
        tails.append(logp_RV.scatter_(1, top.indices, float("-inf")).logsumexp(1).clamp(min=FLOOR))
    return TopK(torch.cat(ids), torch.cat(logprobs), torch.cat(tails))
