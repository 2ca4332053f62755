"""How the next token is chosen. B rows · V vocabulary.

Randomness is one number a token, drawn beforehand from (seed, problem, sample), and looked up in the cumulative
distribution: what a row samples never depends on which rows happen to run beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.parts import Sampling
from ..model import kernels

FEW = 256  # tokens that nearly always hold what top-p leaves


@dataclass(frozen=True)
class SamplingParams:
    """`SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=512)`; temperature 0 is greedy.

    `keep_mask` remembers what top-p left to choose from, and gives log-probabilities within it (DeepSeek-V3.2,
    arXiv 2512.02556, section 3.1). `force` puts a token after another one, whatever the model would say:
    `{no: wait}` is the budget forcing of s1 (arXiv 2501.19393). `stop_ids` end a completion like the end of turn.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 160
    keep_mask: bool = False
    force: dict[int, int] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()


def params_of(sampling: Sampling) -> SamplingParams:
    """As a recipe says it."""
    return SamplingParams(sampling.temperature, sampling.top_p, sampling.max_new_tokens)


class Draw(NamedTuple):
    """Chosen ids, their log-probabilities, and [B, V] of what top-p left (None where it left all)."""

    tokens_B: Tensor
    logprobs_B: Tensor
    kept_BV: Tensor | None


def draw(logits_BV: Tensor, uniform_B: Tensor, previous_B: Tensor, params: SamplingParams) -> Draw:
    """Choose one token a row. The log-probability is that of the tempered softmax over all tokens (over those
    kept, with `keep_mask`); greedy reports the softmax at temperature 1."""
    if (
        params.temperature
        and params.top_p == 1
        and not params.force
        and kernels.serves("draw", logits_BV.shape[-1], logits_BV)
    ):
        return Draw(*kernels.sample(logits_BV, uniform_B, params.temperature), None)
    logprobs_BV = torch.log_softmax(
        logits_BV / params.temperature if params.temperature not in (0, 1) else logits_BV, -1
    )
    kept_BV = None
    if params.temperature == 0:
        tokens_B = logits_BV.argmax(-1)
    else:
        probabilities_BV = logprobs_BV.exp()
        if params.top_p < 1:
            kept_BV = nucleus(probabilities_BV, params.top_p)
            probabilities_BV = probabilities_BV * kept_BV
        tokens_B = sample_inverse_cdf(probabilities_BV, uniform_B)
    if params.force:
        tokens_B = _forced(tokens_B, previous_B, params.force)
    if kept_BV is not None and params.keep_mask:
        logprobs_BV = torch.log_softmax(logprobs_BV.masked_fill(~kept_BV, float("-inf")), -1)
    return Draw(
        tokens_B,
        logprobs_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1),
        kept_BV if params.keep_mask else None,
    )


def sample_inverse_cdf(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token at which the cumulative distribution passes the uniform number; sums in float64."""
    cumulative_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)
    threshold_B1 = uniform_B.unsqueeze(1) * cumulative_BV[:, -1:]
    tokens_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1)
    return tokens_B.clamp_(max=probabilities_BV.shape[1] - 1)


def nucleus(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """The smallest set of most likely tokens whose mass reaches `top_p` (Holtzman et al. 2019). It is looked for among
    the likeliest few first: sorting a large vocabulary takes longer than everything else about a token."""
    for few in sorted({min(FEW, probabilities_BV.shape[1]), probabilities_BV.shape[1]}):
        sorted_BK, order_BK = probabilities_BV.topk(few)
        before_BK = sorted_BK.cumsum(-1) - sorted_BK
        if bool((before_BK[:, -1] >= top_p).all()):
            break
    return torch.zeros_like(probabilities_BV, dtype=torch.bool).scatter_(1, order_BK, before_BK < top_p)


def _forced(tokens_B: Tensor, previous_B: Tensor, force: dict[int, int]) -> Tensor:
    for after, then in force.items():
        tokens_B = tokens_B.masked_fill(previous_B == after, then)
    return tokens_B
