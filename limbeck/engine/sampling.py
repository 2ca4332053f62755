"""Sampling of the next token: temperature, top-p, greedy. B rows · V vocabulary · K candidates of top-p.

Randomness is one uniform number per token, drawn beforehand from (seed, problem, sample) and looked up in the
cumulative distribution: a row's tokens never depend on which rows happen to run beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.parts import Sampling
from ..model import kernels

NUCLEUS_CANDIDATES = 256  # tokens, the most likely ones: they nearly always hold the whole nucleus


@dataclass(frozen=True)
class SamplingParams:
    """`SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=512)`; temperature 0 is greedy.

    `keep_mask` returns the ids inside top-p and log-probabilities renormalised over them (DeepSeek-V3.2,
    arXiv 2512.02556, section 3.1). `force` puts a token after another one, in place of the sampled one: `{no:
    wait}` is the budget forcing of s1 (arXiv 2501.19393). `stop_ids` end a completion like the end of turn.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 160
    keep_mask: bool = False
    force: dict[int, int] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()


def to_sampling_params(sampling: Sampling) -> SamplingParams:
    """The sampling parameters of a recipe's `sampling`."""
    return SamplingParams(sampling.temperature, sampling.top_p, sampling.max_new_tokens)


class Draw(NamedTuple):
    """Sampled ids [B], their log-probabilities [B], and the top-p mask [B, V] (None where top-p excludes
    nothing)."""

    tokens_B: Tensor
    logprobs_B: Tensor
    top_p_BV: Tensor | None


def draw(logits_BV: Tensor, uniform_B: Tensor, previous_B: Tensor, params: SamplingParams) -> Draw:
    """Sample one token per row. Its log-probability is that of the tempered softmax over all tokens (with
    `keep_mask` over those inside top-p); greedy reports the softmax at temperature 1."""
    if _compiled(logits_BV, params):
        tokens_B, logprobs_B = kernels.sample(logits_BV, uniform_B, params.temperature)
        return Draw(tokens_B, logprobs_B, None)
    if params.temperature not in (0, 1):
        logits_BV = logits_BV / params.temperature
    logprobs_BV = torch.log_softmax(logits_BV, -1)
    tokens_B, top_p_BV = _choose(logits_BV, logprobs_BV, uniform_B, params)
    if params.force:
        tokens_B = _force(tokens_B, previous_B, params.force)
    if not params.keep_mask:
        top_p_BV = None
    if top_p_BV is not None:
        logprobs_BV = torch.log_softmax(logprobs_BV.masked_fill(~top_p_BV, float("-inf")), -1)
    logprobs_B = logprobs_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)
    return Draw(tokens_B, logprobs_B, top_p_BV)


def _compiled(logits_BV: Tensor, params: SamplingParams) -> bool:
    """True if the kernels can sample this: a plain tempered softmax on a supported machine and dtype."""
    plain = params.temperature and params.top_p == 1 and not params.force
    return bool(plain) and kernels.serves("draw", logits_BV.shape[-1], logits_BV)


def _choose(
    logits_BV: Tensor, logprobs_BV: Tensor, uniform_B: Tensor, params: SamplingParams
) -> tuple[Tensor, Tensor | None]:
    """Sampled ids [B] and the top-p mask [B, V], None without one."""
    if params.temperature == 0:
        return logits_BV.argmax(-1), None
    probabilities_BV = logprobs_BV.exp()
    if params.top_p >= 1:
        return sample_inverse_cdf(probabilities_BV, uniform_B), None
    top_p_BV = nucleus(probabilities_BV, params.top_p)
    return sample_inverse_cdf(probabilities_BV * top_p_BV, uniform_B), top_p_BV


def sample_inverse_cdf(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token [B] at which the cumulative distribution passes the uniform number; sums in float64."""
    cumulative_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)
    threshold_B1 = uniform_B.unsqueeze(1) * cumulative_BV[:, -1:]
    tokens_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1)
    return tokens_B.clamp_(max=probabilities_BV.shape[1] - 1)


def nucleus(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """The mask [B, V] of the smallest set of most likely tokens whose mass reaches `top_p` (Holtzman et al.
    2019).

    The most likely few are searched first: sorting a large vocabulary takes longer than all other work for a
    token.
    """
    vocabulary = probabilities_BV.shape[1]
    for candidates in sorted({min(NUCLEUS_CANDIDATES, vocabulary), vocabulary}):
        sorted_BK, order_BK = probabilities_BV.topk(candidates)
        before_BK = sorted_BK.cumsum(-1) - sorted_BK
        if bool((before_BK[:, -1] >= top_p).all()):
            break
    mask_BV = torch.zeros_like(probabilities_BV, dtype=torch.bool)
    return mask_BV.scatter_(1, order_BK, before_BK < top_p)


def _force(tokens_B: Tensor, previous_B: Tensor, force: dict[int, int]) -> Tensor:
    """Tokens [B], with `force[previous]` in place of those whose previous token is a key of `force`."""
    for after, forced in force.items():
        tokens_B = tokens_B.masked_fill(previous_B == after, forced)
    return tokens_B
