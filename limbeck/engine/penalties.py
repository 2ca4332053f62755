"""Presence, frequency and repetition penalties: they lower the logits of tokens that a row already has.

The formulas are OpenAI's (presence, frequency) and CTRL's (repetition; Keskar et al. 2019, arXiv 1909.05858,
section 4.1), in vLLM's order (`vllm/model_executor/layers/utils.py`). Dimensions: B rows · P rows with a
penalty · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .sampling import SamplingParams


def penalises(sampling: SamplingParams) -> bool:
    """Return True if one of the three penalties is set."""
    added = sampling.presence_penalty or sampling.frequency_penalty
    return bool(added) or sampling.repetition_penalty != 1


class Penalties:
    """The penalties of the rows of a decode batch. Only rows that ask for a penalty take memory and time.

    A token's logit is first divided by `repetition_penalty` if it is positive and multiplied by it if it is
    negative, where the token is in the row's prompt or completion. Then `frequency_penalty` is subtracted as
    often as the completion has the token, and `presence_penalty` once if it has it.
    """

    def __init__(self, vocabulary: int):
        self.place_B = np.zeros(0, dtype=np.int64)  # of each row among those with a penalty; -1 for others
        self.counts_PV = torch.zeros(0, vocabulary, dtype=torch.int32)  # of each token in the completion
        self.in_prompt_PV = torch.zeros(0, vocabulary, dtype=torch.bool)
        self.presence_P1 = torch.zeros(0, 1, dtype=torch.float64)
        self.frequency_P1 = torch.zeros(0, 1, dtype=torch.float64)
        self.repetition_P1 = torch.zeros(0, 1, dtype=torch.float64)

    def append(self, prompts: Sequence[np.ndarray], sampling: SamplingParams) -> None:
        """Append one row for each prompt (token ids) with the penalties of `sampling`."""
        if not penalises(sampling):
            self.place_B = np.append(self.place_B, np.full(len(prompts), -1))
            return
        before = len(self.counts_PV)
        self.place_B = np.append(self.place_B, before + np.arange(len(prompts)))
        self.counts_PV = _with_zeros(self.counts_PV, len(prompts))
        self.in_prompt_PV = _with_zeros(self.in_prompt_PV, len(prompts))
        for place, prompt in enumerate(prompts, before):
            self.in_prompt_PV[place, torch.from_numpy(prompt)] = True
        self.presence_P1 = _with_value(self.presence_P1, sampling.presence_penalty, len(prompts))
        self.frequency_P1 = _with_value(self.frequency_P1, sampling.frequency_penalty, len(prompts))
        self.repetition_P1 = _with_value(self.repetition_P1, sampling.repetition_penalty, len(prompts))

    def apply(self, logits_BV: Tensor, rows: np.ndarray) -> Tensor:
        """Return the logits of `rows` (indices into the batch) with the penalties; `logits_BV` stays as it
        is. The logits of rows without a penalty are the same."""
        if not len(self.counts_PV):
            return logits_BV
        place_B = self.place_B[rows]
        with_penalty = torch.from_numpy(np.flatnonzero(place_B >= 0))
        places = torch.from_numpy(place_B[place_B >= 0])
        penalised_BV = logits_BV.clone()
        penalised_BV[with_penalty] = self._penalise(logits_BV[with_penalty], places)
        return penalised_BV

    def _penalise(self, logits_PV: Tensor, places: Tensor) -> Tensor:
        """Return the logits of the rows at these places with their penalties."""
        dtype = logits_PV.dtype
        penalties = (self.presence_P1, self.frequency_P1, self.repetition_P1)
        each = [penalty_P1[places].to(dtype) for penalty_P1 in penalties]
        return penalise(logits_PV, self.counts_PV[places], self.in_prompt_PV[places], *each)

    def count(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Count one newly sampled token of each of `rows`."""
        if not len(self.counts_PV):
            return
        places = self.place_B[rows]
        with_penalty = places >= 0
        self.counts_PV[torch.from_numpy(places[with_penalty]), torch.from_numpy(tokens[with_penalty])] += 1

    def select_rows(self, rows: np.ndarray) -> None:
        """Keep only the rows with the indices `rows`, in that order."""
        self.place_B = self.place_B[rows]
        if not len(self.counts_PV):
            return
        with_penalty = self.place_B >= 0
        places = torch.from_numpy(self.place_B[with_penalty])
        for name in ("counts_PV", "in_prompt_PV", "presence_P1", "frequency_P1", "repetition_P1"):
            setattr(self, name, getattr(self, name)[places])
        self.place_B[with_penalty] = np.arange(len(places))


def penalise(
    logits_PV: Tensor,
    counts_PV: Tensor,
    in_prompt_PV: Tensor,
    presence_P1: Tensor,
    frequency_P1: Tensor,
    repetition_P1: Tensor,
) -> Tensor:
    """Return the logits [P, V] with penalties: `counts_PV` says how often each completion has each token,
    `in_prompt_PV` whether the prompt has it."""
    sampled_PV = counts_PV > 0
    repeated_PV = torch.where(logits_PV > 0, logits_PV / repetition_P1, logits_PV * repetition_P1)
    logits_PV = torch.where(sampled_PV | in_prompt_PV, repeated_PV, logits_PV)
    return logits_PV - frequency_P1 * counts_PV - presence_P1 * sampled_PV


def _with_zeros(x: Tensor, rows: int) -> Tensor:
    """Return `x` [P, V] with `rows` rows of zeros appended."""
    return torch.cat([x, x.new_zeros(rows, x.shape[1])])


def _with_value(x_P1: Tensor, value: float, rows: int) -> Tensor:
    """Return `x_P1` with `rows` rows of `value` appended."""
    return torch.cat([x_P1, x_P1.new_full((rows, 1), value)])
