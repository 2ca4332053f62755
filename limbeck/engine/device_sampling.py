"""Sampling of the next token on a device, without waiting for the host: see `sampling.draw`.

In training all rows have the same parameters, in serving each has its own. B rows · V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.ops import Ops
from ..types import LimbeckError
from .sampling import Draw, SamplingParams, force_tokens, likely

SUPPORTED = {"temperature", "top_p", "top_k", "min_p", "max_new_tokens", "keep_mask", "force", "stop_ids"}
SUPPORTED |= {"response_prefix"}  # part of the prompt


def check(params: SamplingParams) -> None:
    """Raise LimbeckError if the parameters ask for what `draw_on_device` does not do."""
    for field in fields(params):
        default = field.default if field.default is not MISSING else field.default_factory()
        if field.name not in SUPPORTED and getattr(params, field.name) != default:
            raise LimbeckError(
                f"sampling.{field.name}: rollouts on a GPU do not apply it; leave it out, or run on the CPU"
            )


def draw_on_device(
    logits_BV: Tensor, uniform_B: Tensor, previous_B: Tensor, params: SamplingParams, ops: Ops
) -> Draw:
    """Sample one token per row; arguments and results as in `sampling.draw`.

    The mask is returned where it is asked for, even if it excludes nothing.
    """
    temperature = params.temperature
    open_BV = logits_BV
    kept_BV = None
    if params.excludes:
        kept_BV = _kept(torch.log_softmax(logits_BV / temperature, -1), params, ops)
        open_BV = logits_BV.masked_fill(~kept_BV, float("-inf"))
    tokens_B, logprobs_B = ops.draw(open_BV, uniform_B, temperature)
    tokens_B = force_tokens(tokens_B, previous_B, params.force)
    if params.force or (params.excludes and not params.keep_mask):
        scored_BV = open_BV if params.keep_mask else logits_BV
        logprobs_B = ops.logprob(scored_BV, tokens_B, temperature)
    return Draw(tokens_B, logprobs_B, kept_BV if params.keep_mask else None)


def _kept(logprobs_BV: Tensor, params: SamplingParams, ops: Ops) -> Tensor:
    """Return the mask [B, V] of the tokens that top-p, top-k and min-p leave."""
    kept_BV = likely(logprobs_BV, params)
    if params.top_p >= 1:
        return torch.ones_like(logprobs_BV, dtype=torch.bool) if kept_BV is None else kept_BV
    probabilities_BV = logprobs_BV.exp()
    if kept_BV is None:
        return _nucleus(probabilities_BV, params.top_p, ops)
    probabilities_BV = probabilities_BV * kept_BV
    probabilities_BV = probabilities_BV / ops.cumulate(probabilities_BV)[:, -1:]
    return kept_BV & _nucleus(probabilities_BV, params.top_p, ops)


def _nucleus(probabilities_BV: Tensor, top_p: float, ops: Ops) -> Tensor:
    """Return the mask [B, V] of the smallest set of most likely tokens whose total probability reaches
    `top_p`: all tokens are sorted, so that the host need not look whether a few were enough."""
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = ops.cumulate(sorted_BV) - sorted_BV
    mask_BV = torch.zeros_like(probabilities_BV, dtype=torch.bool)
    return mask_BV.scatter_(1, order_BV, before_BV < top_p)


# ---------------------------------------------------------------- parameters of each row


class RowSampling(NamedTuple):
    """The parameters of each row of a batch, [B, 1] each. Temperature 0 is greedy, `top_k` 0 keeps all
    tokens; of `min_p` there is the logarithm; a `top_p` that excludes nothing is infinite."""

    temperature_B1: Tensor
    top_p_B1: Tensor
    top_k_B1: Tensor
    log_min_p_B1: Tensor

    def fill(self, rows: slice, params: SamplingParams) -> None:
        """Set the parameters of some rows."""
        self.temperature_B1[rows] = params.temperature
        self.top_p_B1[rows] = params.top_p if params.top_p < 1 else math.inf
        self.top_k_B1[rows] = params.top_k
        self.log_min_p_B1[rows] = math.log(params.min_p) if params.min_p > 0 else -math.inf


def draw_rows(
    logits_BV: Tensor, uniform_B: Tensor, sampling: RowSampling, excludes: bool, ops: Ops
) -> Tensor:
    """Sample one token per row, each with its own parameters, and return them [B].

    `uniform_B` has a random number in [0, 1) for each row. Without `excludes` no row has a top-p, top-k or
    min-p.
    """
    greedy_B1 = sampling.temperature_B1 == 0
    scaled_BV = logits_BV / sampling.temperature_B1.masked_fill(greedy_B1, 1.0)
    if excludes:
        kept_BV = _kept_rows(torch.log_softmax(scaled_BV, -1), sampling, ops)
        scaled_BV = scaled_BV.masked_fill(~kept_BV, -math.inf)
    drawn_B, _ = ops.draw(scaled_BV, uniform_B, 1.0)
    return torch.where(greedy_B1.squeeze(1), logits_BV.argmax(-1), drawn_B)


def _kept_rows(logprobs_BV: Tensor, sampling: RowSampling, ops: Ops) -> Tensor:
    """Return the mask [B, V] of the tokens that each row's top-p, top-k and min-p leave; see `likely` and
    `nucleus`. Of tokens that are as likely as the last one that is left all are left."""
    vocabulary = logprobs_BV.shape[1]
    sorted_BV, _ = logprobs_BV.sort(dim=-1, descending=True)
    last_B1 = (sampling.top_k_B1 - 1).clamp(max=vocabulary - 1) % vocabulary  # top-k 0: the last of all
    least_B1 = torch.maximum(sorted_BV.gather(1, last_B1), sorted_BV[:, :1] + sampling.log_min_p_B1)
    kept_BV = sorted_BV >= least_B1
    probabilities_BV = sorted_BV.exp() * kept_BV
    probabilities_BV = probabilities_BV / ops.cumulate(probabilities_BV)[:, -1:]
    before_BV = ops.cumulate(probabilities_BV) - probabilities_BV
    kept_B1 = (kept_BV & (before_BV < sampling.top_p_B1)).sum(1, keepdim=True)
    return logprobs_BV >= sorted_BV.gather(
        1, (kept_B1 - 1).clamp(min=0)
    )  # rows that were never set keep none
