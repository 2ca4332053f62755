"""Divergences between the next-token distributions of a student and a teacher, over the whole vocabulary.

Logits are computed chunk by chunk, together with their gradient, so the logits [M, V] of the student and of
the teacher are never in memory as a whole. A teacher is given as hidden states, from which its full logits
are computed, or as labels: its top-k token ids, with all other ids merged into one more event.

Dimensions: M predicted tokens · R rows of a chunk (predicted tokens computed at once) · C hidden size · V
vocabulary · K labels of a token · E events that are compared (all V ids, or the K ids and one for the rest).
In names, p is the teacher's distribution and q the student's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 21  # logits of one model per chunk: 8 MiB in float32; a few such tensors exist at once
LEAST = 32  # rows of a chunk at least: each chunk reads the heads, and reads and writes the gradient of one
FLOOR = -1e4  # nats: the log-probability in place of minus infinity, so that 0 log 0 is 0

Measure = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Logits:
    """The student's logits in the form of hidden states at the M predictions, the weights of the output
    head, and the temperature. The logits are computed from these when they are needed."""

    hidden_MC: Tensor
    head_VC: Tensor
    temperature: float = 1.0


@dataclass(frozen=True)
class States:
    """A teacher in the form of its hidden states, at the same predictions as the student's, and the weights
    of its output head. The full logits are computed from these when they are needed."""

    hidden_MC: Tensor
    head_VC: Tensor

    def width(self, student: int) -> int:
        """Return the number of token ids that are compared. `student` is the number of ids of the student's
        head; the two heads may be padded to different sizes, and the smaller one counts."""
        return min(student, len(self.head_VC))

    def events(self, part: slice, logq_RV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of the teacher and of the student over the same events, each [R, E].

        `part` selects the rows of the chunk; `logq_RV` are the student's log-probabilities. Here the events
        are all ids."""
        return log_softmax(self.hidden_MC[part], self.head_VC[: logq_RV.shape[1]], temperature), logq_RV

    def spread(self, part: slice, slope_RE: Tensor, logq_RE: Tensor, logq_RV: Tensor) -> Tensor:
        """Return the gradient with respect to the student's logits [R, V], given `slope_RE`, the gradient
        with respect to the logits of the events. Here they are the same, since every id is an event."""
        return slope_RE


@dataclass(frozen=True)
class TopK:
    """A teacher in the form of its top-k token ids at each prediction with their log-probabilities, and the
    log-probability `tail_M` of all other ids together.

    The divergence over these K + 1 events is exact for the merged distributions, and never larger than the
    divergence of the full distributions."""

    ids_MK: Tensor
    logprobs_MK: Tensor
    tail_M: Tensor

    def width(self, student: int) -> int:
        """Return the number of token ids that are compared: all `student` ids of the student's head."""
        return student

    def events(self, part: slice, logq_RV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of the teacher and of the student over the K ids and the rest as one
        event, each [R, E].

        `part` selects the rows of the chunk; `logq_RV` are the student's log-probabilities over all ids."""
        ids_RK = self.ids_MK[part]
        logp_RE = torch.cat([self.logprobs_MK[part], self.tail_M[part].unsqueeze(1)], 1).to(logq_RV.dtype)
        rest_R1 = logq_RV.scatter(1, ids_RK, float("-inf")).logsumexp(1, keepdim=True)
        logq_RE = torch.cat([logq_RV.gather(1, ids_RK), rest_R1], 1)
        return logp_RE.clamp(min=FLOOR), logq_RE.clamp(min=FLOOR)

    def spread(self, part: slice, slope_RE: Tensor, logq_RE: Tensor, logq_RV: Tensor) -> Tensor:
        """Return the gradient with respect to the student's logits [R, V], given `slope_RE`, the gradient
        with respect to the logits of the events. The gradient of the rest is divided among the ids in the
        rest in proportion to their probabilities."""
        shared_RV = slope_RE[:, -1:] * (logq_RV - logq_RE[:, -1:]).exp()
        return shared_RV.scatter_(1, self.ids_MK[part], slope_RE[:, :-1])


# ---------------------------------------------------------------- measures of two distributions

# Each takes log-probabilities [R, E] of teacher and student, and returns the divergence [R] and its gradient
# with respect to the logits of the events [R, E], for the student's distribution q. With g = dF/dq, where F
# is the divergence, it is q (g - sum q g); the closed forms below never divide by q.


def forward_kl(logp_RE: Tensor, logq_RE: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) of each row [R], and its gradient with respect to the student's logits
    [R, E].

    This divergence is mode-covering: the student is penalised where it gives too little probability. Hinton
    et al. 2015, arXiv 1503.02531."""
    p_RE = logp_RE.exp()
    return (p_RE * (logp_RE - logq_RE)).sum(1), logq_RE.exp() - p_RE


def reverse_kl(logp_RE: Tensor, logq_RE: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(student || teacher) of each row [R], and its gradient with respect to the student's logits
    [R, E].

    This divergence is mode-seeking: the student is penalised where it gives too much probability. MiniLLM,
    arXiv 2306.08543."""
    q_RE = logq_RE.exp()
    ratio_RE = logq_RE - logp_RE
    value_R = (q_RE * ratio_RE).sum(1)
    return value_R, q_RE * (ratio_RE - value_R.unsqueeze(1))


def jensen_shannon(beta: float) -> Measure:
    """Return the function that computes the generalised Jensen-Shannon divergence with the weight `beta`.

    The divergence is beta KL(teacher || m) + (1 - beta) KL(student || m), where m = beta teacher + (1 -
    beta) student (GKD, arXiv 2306.13649, eq. 1). For a small beta it is approximately beta times the forward
    KL."""

    def measure(logp_RE: Tensor, logq_RE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence of each row [R], and its gradient with respect to the student's logits [R,
        E], from the log-probabilities of the teacher and of the student [R, E]."""
        logm_RE = torch.logaddexp(logp_RE + math.log(beta), logq_RE + math.log1p(-beta))
        q_RE = logq_RE.exp()
        ratio_RE = logq_RE - logm_RE
        student_R = (q_RE * ratio_RE).sum(1)
        value_R = beta * (logp_RE.exp() * (logp_RE - logm_RE)).sum(1) + (1 - beta) * student_R
        return value_R, (1 - beta) * q_RE * (ratio_RE - student_R.unsqueeze(1))

    return measure


# ---------------------------------------------------------------- over a batch


def divergence(logits: Logits, teacher: States | TopK, measure: Measure) -> tuple[Tensor, Tensor, Tensor]:
    """Return three values: the divergence summed over all predictions, which is differentiable; the
    divergence of each prediction [M]; and the entropy of the student at each prediction [M]. The last two
    are not differentiable.

    `measure` computes the divergence of one chunk, such as `forward_kl`."""
    head_VC = logits.head_VC[: teacher.width(len(logits.head_VC))]
    return _Divergence.apply(logits.hidden_MC, head_VC, teacher, measure, logits.temperature)


class _Divergence(torch.autograd.Function):
    """Computes the divergence and its gradient in the forward pass. This is possible because the divergences
    are only summed, so the backward pass merely multiplies the gradients by a scalar."""

    @staticmethod
    def forward(ctx, hidden_MC, head_VC, teacher, measure, temperature):
        """Return the sum of the divergences, the divergence of each prediction [M], and the student's
        entropy [M]."""
        learns = any(ctx.needs_input_grad)
        grad_hidden_MC = torch.zeros_like(hidden_MC) if learns else None
        precision = torch.promote_types(head_VC.dtype, torch.float32)
        learns_head = ctx.needs_input_grad[1]
        grad_head_VC = torch.zeros_like(head_VC, dtype=precision) if learns_head else None
        values = []
        entropies = []
        rows = max(LEAST, CHUNK // len(head_VC))
        for begin in range(0, max(1, len(hidden_MC)), rows):
            part = slice(begin, begin + rows)
            logq_RV = log_softmax(hidden_MC[part], head_VC, temperature)
            logp_RE, logq_RE = teacher.events(part, logq_RV, temperature)
            value_R, slope_RE = measure(logp_RE, logq_RE)
            values.append(value_R)
            entropies.append(-(logq_RV.exp() * logq_RV).sum(1))
            if learns:
                slope_RV = teacher.spread(part, slope_RE, logq_RE, logq_RV).div_(temperature)
                grad_hidden_MC[part] = torch.mm(slope_RV, head_VC.to(precision))
                if learns_head:
                    grad_head_VC.addmm_(slope_RV.T, hidden_MC[part].to(precision))
        if learns:
            ctx.save_for_backward(grad_hidden_MC, grad_head_VC.to(head_VC.dtype) if learns_head else None)
        value_M = torch.cat(values)
        entropy_M = torch.cat(entropies)
        ctx.mark_non_differentiable(value_M, entropy_M)
        return value_M.sum(), value_M, entropy_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        """Return the gradients of the hidden states [M, C] and of the head [V, C]: those of the forward pass
        times the scalar `grad`."""
        grad_hidden, grad_head = ctx.saved_tensors
        by_head = None if grad_head is None else grad_head * grad
        return grad_hidden * grad, by_head, None, None, None


def tempered(hidden_RC: Tensor, head_VC: Tensor, temperature: float) -> Tensor:
    """Return the logits of a chunk [R, V], divided by the temperature, in float32 at least."""
    precision = torch.promote_types(hidden_RC.dtype, torch.float32)
    logits_RV = hidden_RC.to(precision) @ head_VC.to(precision).T
    if temperature != 1.0:
        logits_RV /= temperature
    return logits_RV


def log_softmax(hidden_RC: Tensor, head_VC: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of a chunk [R, V] at a temperature."""
    return torch.log_softmax(tempered(hidden_RC, head_VC, temperature), -1)


@torch.no_grad()
def top_k(hidden_MC: Tensor, head_VC: Tensor, count: int, temperature: float) -> TopK:
    """Return a teacher's labels, computed from its hidden states: at each prediction the `count` most
    probable token ids with their log-probabilities, and the log-probability of all other ids together."""
    size = len(head_VC)
    rows = max(LEAST, CHUNK // size)
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
