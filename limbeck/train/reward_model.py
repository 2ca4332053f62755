"""A reward model: the decoder with one more row, which says of a response how good it is; learned from preferences.

It reads a question and the final answer, never the thought (DeepSeek-R1, arXiv 2501.12948v2, 3.1: a thought that is
judged is a thought that pleases). Bradley and Terry (1952): P(a is preferred to b) = sigmoid(value(a) - value(b)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.parts import Optimizer
from ..model.decoder import Decoder
from ..run_log import Record
from ..text.reasoning_parser import split_thought
from ..text.tokenizer import Tokenizer
from ..types import Group, Sample, Score, fingerprint, generator
from .batch import MICRO_TOKENS, Batch, by_sample, pack
from .checkpoint import Checkpoint
from .learner import Learner
from .losses import Loss, Metrics


class RewardModelLearner(Learner):
    """A learner whose `logprobs` are values: one for each sequence, read off its last token."""

    def __init__(self, model: Decoder, settings: Optimizer, steps: int):
        model.value = nn.Linear(model.config.hidden_size, 1, bias=False)
        nn.init.zeros_(model.value.weight)  # all responses begin alike
        super().__init__(model, settings, steps)

    def _logprobs(self, hidden_NC: Tensor, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        values_M = self.model.value(hidden_NC[batch.predict_M]).squeeze(1)
        return values_M, torch.zeros_like(values_M).detach()

    def values(self, samples: Sequence[Sample], batch_tokens: int = MICRO_TOKENS) -> np.ndarray:
        """The value of each sample, in their order."""
        batches = pack(samples, batch_tokens)
        return np.concatenate(by_sample(batches, self.logprobs(batches), len(samples)))


def to_sample(tokenizer: Tokenizer, question: str, response: str) -> Sample:
    """A question and its final answer. The value is read at the end of the turn, the last token that is an input.
    It has no `start` of its own, so that a pair is not parted where others share its answer (`pack`)."""
    tokens = np.concatenate(
        [tokenizer.prompt(question), tokenizer.response(split_thought(response).answer), [tokenizer.end_id]]
    )
    return Sample(
        tokens,
        start=1,
        learned=np.arange(1, len(tokens)) == len(tokens) - 1,
        logprobs=np.zeros(1, np.float32),
    )


def bradley_terry(pairs: int) -> Loss:
    """-log sigmoid(value of the better - value of the worse), the mean over `pairs`. A sequence's advantage says whose
    half it is: +3 the better and -3 the worse of the third pair."""

    def loss(values_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        marks_M = batch.advantages_M
        _, rank_M = marks_M.abs().unique(return_inverse=True)
        gap_P = values_M.new_zeros(len(marks_M) // 2).index_add(0, rank_M, values_M * marks_M.sign())
        total = F.softplus(-gap_P).sum() / pairs
        right = (gap_P.detach() > 0).float().sum() / pairs
        return total, {"loss": total.detach(), "accuracy": right, "margin": gap_P.detach().sum() / pairs}

    return loss


def plan_pairs(count: int, epochs: float, batch: int, seed: object) -> list[list[int]]:
    """Indices of pairs, batch by batch, each epoch in its own order; a part of an epoch is its start."""
    orders = [generator(seed, "pairs", epoch).permutation(count) for epoch in range(int(np.ceil(epochs)))]
    order = np.concatenate(orders)[: max(1, round(epochs * count))]
    return [order[i : i + batch].tolist() for i in range(0, len(order), batch)]


def fit(
    learner: RewardModelLearner, pairs: Sequence[tuple[Sample, Sample]], plan: list[list[int]], micro_tokens: int, log_every: int,
    record: Record, checkpoint: Checkpoint,
) -> None:  # fmt: skip
    """One update a batch of pairs (better, worse), in the order of `plan`, from where the learner stands."""
    while learner.step < len(plan):
        step = learner.step
        chosen = [pairs[i] for i in plan[step]]
        metrics = learner.update(pack_pairs(chosen, micro_tokens), bradley_terry(len(chosen)))
        tokens = sum(len(half.tokens) for pair in chosen for half in pair)
        if step % log_every == 0 or step == len(plan) - 1:
            record.step(
                step, {name: value for name, value in metrics.items() if name != "entropy"}, tokens=tokens
            )
        else:
            record.beat(step, tokens)
        checkpoint.offer(lambda: {"learner": learner.state_dict()}, record)


def pack_pairs(pairs: Sequence[tuple[Sample, Sample]], micro_tokens: int) -> list[Batch]:
    """Micro-batches of whole pairs, at most `micro_tokens` each, one pair at least."""
    pieces: list[list[Sample]] = []
    size = 0
    for i, (better, worse) in enumerate(pairs, start=1):
        halves, cost = [_numbered(better, i), _numbered(worse, -i)], len(better.tokens) + len(worse.tokens)
        if pieces and size + cost <= micro_tokens:
            pieces[-1] += halves
            size += cost
        else:
            pieces.append(halves)
            size = cost
    return [batch for piece in pieces for batch in pack(piece, 1 << 30)]


def split(
    rows: Sequence[Mapping[str, Any]], share: float, seed: object
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """(learned, held out): a share of the questions is kept, with all their pairs; one at least."""
    order = sorted({row["prompt"] for row in rows}, key=lambda prompt: fingerprint(seed, "held out", prompt))
    kept = set(order[: max(1, round(share * len(order)))])
    return [row for row in rows if row["prompt"] not in kept], [row for row in rows if row["prompt"] in kept]


class RewardModel:
    """A voice: the part `preference`, the chance that a final answer would be preferred to one of value `centre`."""

    def __init__(self, learner: RewardModelLearner, tokenizer: Tokenizer, centre: float):
        self.learner, self.tokenizer, self.centre, self.tokens, self.flops = (
            learner,
            tokenizer,
            centre,
            0,
            0.0,
        )

    def opinions(self, groups: Sequence[Group]) -> list[list[Score]]:
        """One score for each completion; without a final answer nothing is earned. The same answer is read once, so that
        rounding tells no twins apart."""
        told = [
            (group.problem.prompt, split_thought(c.text).answer)
            for group in groups
            for c in group.completions
        ]
        different = list(dict.fromkeys(told))
        samples = [to_sample(self.tokenizer, *one) for one in different]
        self.tokens += sum(len(s.tokens) for s in samples)
        self.flops += sum(
            len(s.tokens) * self.learner.model.config.flops_per_token(len(s.tokens) / 2) for s in samples
        )
        values = dict(zip(different, self.learner.values(samples), strict=True))
        scores = iter([self._score(values[one], one[1]) for one in told])
        return [[next(scores) for _ in group.completions] for group in groups]

    def _score(self, value: float, answer: str) -> Score:
        if not answer:
            return Score({"preference": 0.0}, {"preference": "no final answer"})
        return Score({"preference": float(1 / (1 + np.exp(self.centre - value)))})

    def bill(self) -> dict[str, float]:
        """Tokens that were read since the last bill, and their FLOPs."""
        told = {"preference_tokens": self.tokens, "preference_flops": self.flops}
        self.tokens, self.flops = 0, 0.0
        return told


def _numbered(sample: Sample, number: int) -> Sample:
    return replace(sample, advantage=float(number))
