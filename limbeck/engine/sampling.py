"""Sampling of the next token: temperature, min-p, top-k, top-p, greedy.

The order is vLLM's (`vllm/v1/sample/sampler.py`): penalties (`penalties.py`) change the logits, the
temperature divides them, min-p and top-k exclude tokens, and top-p is taken of the probabilities of those
that are left.

Each token uses one uniform random number, drawn beforehand from (seed, problem, sample) and looked up in the
cumulative distribution, so a row's tokens do not depend on which other rows are in the batch. Dimensions: B
rows · V vocabulary · K most likely tokens that are searched for the top-p set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.parts import OPTIONAL_SAMPLING, Sampling
from ..model.ops import CPU, Ops
from ..model.ops.plain import sample_inverse_cdf

AT_ONCE = 1 << 24  # logits that are drawn from at once, 64 MiB in float32: a draw makes some copies of them
NUCLEUS_CANDIDATES = 256  # number of most likely tokens, which nearly always contain the whole top-p set


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters, for instance `SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=512)`;
    temperature 0 is greedy.

    `top_k` keeps the k most likely tokens, and those as likely as the last of them (0: all). `min_p` keeps
    the tokens that have at least this share of the greatest probability (Nguyen et al. 2024, arXiv
    2407.01082). The penalties are applied by `Penalties`, not by `draw`.

    With `keep_mask` the ids that top-p, top-k and min-p left are returned, and log-probabilities are
    renormalised over them (DeepSeek-V3.2, arXiv 2512.02556, section 3.1). `force` maps a token id to the id
    that must follow it, whatever was sampled: `{no: wait}` is the budget forcing of s1 (arXiv 2501.19393).
    `stop_ids` are token ids that end a completion, in addition to the end-of-turn token. Every response
    begins with the ids of `response_prefix`, which belong to the prompt and not to the completion.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 160
    keep_mask: bool = False
    force: dict[int, int] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    response_prefix: tuple[int, ...] = ()

    @property
    def excludes(self) -> bool:
        """True if top-p, top-k or min-p may exclude tokens."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


def to_sampling_params(sampling: Sampling) -> SamplingParams:
    """Return the `SamplingParams` for the `sampling` section of a recipe."""
    optional = sampling.model_dump(include=set(OPTIONAL_SAMPLING), exclude_none=True)
    return SamplingParams(sampling.temperature, sampling.top_p, sampling.max_new_tokens, **optional)


class Draw(NamedTuple):
    """The sampled ids [B], their log-probabilities [B], and the mask [B, V] of the ids that top-p, top-k and
    min-p left (None if no id was excluded or the mask was not requested)."""

    tokens_B: Tensor
    logprobs_B: Tensor
    kept_BV: Tensor | None


def draw(
    logits_BV: Tensor, uniform_B: Tensor, previous_B: Tensor, params: SamplingParams, ops: Ops = CPU
) -> Draw:
    """Sample one token per row. `uniform_B` has a random number in [0, 1) for each row and `previous_B` the
    token before.

    The log-probability of a token is taken from the softmax at the sampling temperature, over all tokens or,
    with `keep_mask`, over the tokens that were left. Greedy sampling reports the softmax at temperature 1.
    """
    rows = max(1, AT_ONCE // logits_BV.shape[1])
    if len(logits_BV) > rows:
        parts = zip(logits_BV.split(rows), uniform_B.split(rows), previous_B.split(rows), strict=True)
        tokens, logprobs, kept = zip(*(draw(*part, params, ops) for part in parts), strict=True)
        return Draw(torch.cat(tokens), torch.cat(logprobs), None if kept[0] is None else torch.cat(kept))
    if params.temperature and not params.excludes and not params.force:
        return Draw(*ops.draw(logits_BV, uniform_B, params.temperature), None)
    if params.temperature not in (0, 1):
        logits_BV = logits_BV / params.temperature
    logprobs_BV = torch.log_softmax(logits_BV, -1)
    tokens_B, kept_BV = _choose(logits_BV, logprobs_BV, uniform_B, params)
    if params.force:
        tokens_B = force_tokens(tokens_B, previous_B, params.force)
    if not params.keep_mask:
        kept_BV = None
    if kept_BV is not None:
        logprobs_BV = torch.log_softmax(logprobs_BV.masked_fill(~kept_BV, float("-inf")), -1)
    logprobs_B = logprobs_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)
    return Draw(tokens_B, logprobs_B, kept_BV)


def _choose(
    logits_BV: Tensor, logprobs_BV: Tensor, uniform_B: Tensor, params: SamplingParams
) -> tuple[Tensor, Tensor | None]:
    """Return the sampled ids [B] and the mask [B, V] of the ids that were left, or None in its place if none
    is excluded."""
    if params.temperature == 0:
        return logits_BV.argmax(-1), None
    probabilities_BV = logprobs_BV.exp()
    if not params.excludes:
        return sample_inverse_cdf(probabilities_BV, uniform_B, torch.float64), None
    kept_BV = likely(logprobs_BV, params)
    if kept_BV is not None:
        probabilities_BV = probabilities_BV * kept_BV
        probabilities_BV = probabilities_BV / probabilities_BV.sum(-1, keepdim=True)
    if params.top_p < 1:
        nucleus_BV = nucleus(probabilities_BV, params.top_p)
        kept_BV = nucleus_BV if kept_BV is None else kept_BV & nucleus_BV
    return sample_inverse_cdf(probabilities_BV * kept_BV, uniform_B, torch.float64), kept_BV


def likely(logprobs_BV: Tensor, params: SamplingParams) -> Tensor | None:
    """Return the mask [B, V] of the tokens that min-p and top-k leave, or None if neither is set. Of tokens
    that are as likely as the k-th all are left, so that their order decides nothing."""
    kept_BV = None
    if params.min_p > 0:
        least_B1 = logprobs_BV.amax(-1, keepdim=True) + math.log(params.min_p)
        kept_BV = logprobs_BV >= least_B1
    if 0 < params.top_k < logprobs_BV.shape[1]:
        least_B1 = logprobs_BV.topk(params.top_k).values[:, -1:]
        likeliest_BV = logprobs_BV >= least_B1
        kept_BV = likeliest_BV if kept_BV is None else kept_BV & likeliest_BV
    return kept_BV


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


def force_tokens(tokens_B: Tensor, previous_B: Tensor, force: dict[int, int]) -> Tensor:
    """Return `tokens_B`, with a row's token replaced by `force[previous]` if the row's previous token is a
    key of `force`."""
    for after, forced in force.items():
        tokens_B = tokens_B.masked_fill(previous_B == after, forced)
    return tokens_B
