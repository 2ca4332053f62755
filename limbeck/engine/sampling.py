"""Sampling of the next token: temperature, top-p, greedy.

Each token uses one uniform random number, drawn beforehand from (seed, problem, sample) and looked up in the
cumulative distribution, so a row's tokens do not depend on which other rows are in the batch. Dimensions: B
rows · V vocabulary · K most likely tokens that are searched for the top-p set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.parts import Sampling
from ..model.ops import CPU, Ops
from ..model.ops.plain import sample_inverse_cdf

NUCLEUS_CANDIDATES = 256  # number of most likely tokens, which nearly always contain the whole top-p set


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters, for instance `SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=512)`;
    temperature 0 is greedy.

    With `keep_mask` the ids inside top-p are returned, and log-probabilities are renormalised over them
    (DeepSeek-V3.2, arXiv 2512.02556, section 3.1). `force` maps a token id to the id that must follow it,
    whatever was sampled: `{no: wait}` is the budget forcing of s1 (arXiv 2501.19393). `stop_ids` are token
    ids that end a completion, in addition to the end-of-turn token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 160
    keep_mask: bool = False
    force: dict[int, int] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()


def to_sampling_params(sampling: Sampling) -> SamplingParams:
    """Return the `SamplingParams` for the `sampling` section of a recipe."""
    return SamplingParams(sampling.temperature, sampling.top_p, sampling.max_new_tokens)


class Draw(NamedTuple):
    """The sampled ids [B], their log-probabilities [B], and the mask [B, V] of the ids inside top-p (None if
    no id was excluded or the mask was not requested)."""

    tokens_B: Tensor
    logprobs_B: Tensor
    top_p_BV: Tensor | None


def draw(
    logits_BV: Tensor, uniform_B: Tensor, previous_B: Tensor, params: SamplingParams, ops: Ops = CPU
) -> Draw:
    """Sample one token per row. `uniform_B` has a random number in [0, 1) for each row and `previous_B` the
    token before.

    The log-probability of a token is taken from the softmax at the sampling temperature, over all tokens or,
    with `keep_mask`, over the tokens inside top-p. Greedy sampling reports the softmax at temperature 1.
    """
    if params.temperature and params.top_p == 1 and not params.force:
        return Draw(*ops.draw(logits_BV, uniform_B, params.temperature), None)
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


def _choose(
    logits_BV: Tensor, logprobs_BV: Tensor, uniform_B: Tensor, params: SamplingParams
) -> tuple[Tensor, Tensor | None]:
    """Return the sampled ids [B] and the mask [B, V] of the ids inside top-p, or None in its place if top-p
    excludes nothing."""
    if params.temperature == 0:
        return logits_BV.argmax(-1), None
    probabilities_BV = logprobs_BV.exp()
    if params.top_p >= 1:
        return sample_inverse_cdf(probabilities_BV, uniform_B, torch.float64), None
    top_p_BV = nucleus(probabilities_BV, params.top_p)
    return sample_inverse_cdf(probabilities_BV * top_p_BV, uniform_B, torch.float64), top_p_BV


def nucleus(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """Return the mask [B, V] of the smallest set of most likely tokens whose total probability reaches
    `top_p` (Holtzman et al. 2019).

    The `NUCLEUS_CANDIDATES` most likely tokens are searched first: sorting a large vocabulary takes longer
    than all other work for a token.
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
    """Return `tokens_B`, with a row's token replaced by `force[previous]` if the row's previous token is a
    key of `force`."""
    for after, forced in force.items():
        tokens_B = tokens_B.masked_fill(previous_B == after, forced)
    return tokens_B
