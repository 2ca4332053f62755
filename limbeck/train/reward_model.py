"""A reward model: the decoder with a value head, which gives each response one number, learned from
preference pairs.

It reads a question and the final answer, not the thought: a model whose thought is rewarded learns to write
thoughts that the reward model likes (DeepSeek-R1, arXiv 2501.12948v2, 3.1). Bradley and Terry (1952): P(a is
preferred to b) = sigmoid(value(a) - value(b)). The loss is `BradleyTerry`, the training loop is
`sft.SFTTrainer`.

Dimensions: N input tokens · M predictions, one for each sequence · C hidden size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.parts import Optimizer
from ..model.decoder import Decoder
from ..model.lora import LoRA
from ..text.reasoning_parser import split_thought
from ..text.tokenizer import Tokenizer
from ..types import Group, Sample, Score, fingerprint
from .batch import MICRO_TOKENS, Batch, by_sample
from .learner import Learner
from .losses import Metrics
from .pairs import pair_margins
from .scorer import Scorer

Row = Mapping[str, Any]  # a preference row: prompt, chosen, rejected


@dataclass(frozen=True)
class BradleyTerry:
    """The loss of a reward model (Bradley and Terry 1952): -log sigmoid(value of chosen - value of
    rejected), as a mean over pairs. Each sequence has one prediction, which is its value."""

    def __call__(self, values_M: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the loss and metrics of a micro-batch that holds both responses of every pair
        (`batch.pairs_S`), from one value for each sequence."""
        values_S = values_M.new_zeros(len(batch.lengths_S)).index_add(0, batch.rows_M, values_M)
        margin_P = pair_margins(values_S, batch.pairs_S)
        pairs = batch.sequences / 2
        loss = F.softplus(-margin_P).sum() / pairs
        margin_P = margin_P.detach()
        accuracy = (margin_P > 0).float().sum() / pairs
        return loss, {"loss": loss.detach(), "accuracy": accuracy, "margin": margin_P.sum() / pairs}


class _ValueHead:
    """Makes a `Scorer` or `Learner` return values instead of log-probabilities: one value for each sequence,
    computed at its last input token."""

    model: Decoder

    def _logprobs(self, hidden_NC: Tensor, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the values [M], and zeros [M] in the place of the entropies."""
        values_M = self.model.value(hidden_NC[batch.predict_M]).squeeze(1)
        values_M = values_M.to(torch.promote_types(values_M.dtype, torch.float32))
        return values_M, torch.zeros_like(values_M).detach()

    def values(self, samples: Sequence[Sample], batch_tokens: int = MICRO_TOKENS) -> np.ndarray:
        """Return the value of each sample, an array [samples] in the order of the samples. `batch_tokens` is
        the size of a micro-batch in input tokens."""
        batches = self.pack(samples, batch_tokens)
        return np.concatenate(by_sample(batches, self.logprobs(batches), len(samples)))


def add_value_head(model: Decoder) -> None:
    """Give a decoder a value head with zero weights, so that every response has the value 0 at first."""
    model.value = nn.Linear(model.config.hidden_size, 1, bias=False).to(model.embed.weight)
    nn.init.zeros_(model.value.weight)


class RewardModelLearner(_ValueHead, Learner):
    """A reward model that is trained."""

    def __init__(
        self, model: Decoder, settings: Optimizer, steps: int, lora: LoRA | None = None, seed: object = 0
    ):
        add_value_head(model)
        super().__init__(model, settings, steps, lora=lora, seed=seed)


class RewardModelScorer(_ValueHead, Scorer):
    """A frozen reward model, used as a reward function. The part `preference` of a score is the probability
    that the final answer is preferred to an answer whose value is `centre`."""

    def __init__(self, model: Decoder, value_1C: Tensor, tokenizer: Tokenizer, centre: float):
        add_value_head(model)
        with torch.no_grad():
            model.value.weight.copy_(value_1C)
        super().__init__(model)
        self.tokenizer = tokenizer
        self.centre = centre
        self.tokens = 0
        self.flops = 0.0

    def score_groups(self, groups: Sequence[Group]) -> list[list[Score]]:
        """Return the score of each completion of each group; a completion without a final answer gets 0.

        Equal answers are computed only once, so that rounding cannot give them different scores."""
        answers = [
            [
                (group.problem.prompt, split_thought(completion.text).answer)
                for completion in group.completions
            ]
            for group in groups
        ]
        distinct = list(dict.fromkeys(answer for row in answers for answer in row))
        samples = [to_sample(self.tokenizer, question, answer) for question, answer in distinct]
        self._count(samples)
        values = dict(zip(distinct, self.values(samples), strict=True))
        return [[self._score(values[answer], answer[1]) for answer in row] for row in answers]

    def _count(self, samples: Sequence[Sample]) -> None:
        """Add the tokens and FLOPs of a forward pass over the samples to the usage."""
        for sample in samples:
            tokens = len(sample.tokens)
            self.tokens += tokens
            self.flops += tokens * self.model.config.flops_per_token(tokens / 2)

    def _score(self, value: float, answer: str) -> Score:
        """Return the score with the part `preference`, computed from an answer's value."""
        if not answer:
            return Score({"preference": 0.0}, {"preference": "no final answer"})
        return Score({"preference": float(1 / (1 + np.exp(self.centre - value)))})

    def take_usage(self) -> dict[str, float]:
        """Return the tokens and FLOPs that were spent since the last call, by name."""
        usage = {"preference_tokens": self.tokens, "preference_flops": self.flops}
        self.tokens = 0
        self.flops = 0.0
        return usage


def to_sample(tokenizer: Tokenizer, question: str, response: str, pair: int = 0) -> Sample:
    """Encode a question and the final answer of a response as a sample; `pair` is the number of its
    preference pair (train/pairs.py).

    The value is computed at the end-of-turn token. The last token of a sample is never an input, so one more
    token follows the end-of-turn token. The sample has no prompt of its own: question and answer are packed
    as one sequence."""
    answer = tokenizer.response(split_thought(response).answer)
    tokens = np.concatenate([tokenizer.prompt(question), answer, [tokenizer.end_id]])
    last = np.arange(1, len(tokens)) == len(tokens) - 1
    return Sample(tokens, start=1, learned=last, logprobs=np.zeros(1, np.float32), pair=pair)


def to_samples(tokenizer: Tokenizer, rows: Sequence[Row]) -> list[Sample]:
    """Encode preference rows (each a question with a chosen and a rejected response) as samples, the chosen
    sample directly before the rejected one."""
    samples = []
    for number, row in enumerate(rows, start=1):
        samples.append(to_sample(tokenizer, row["prompt"], row["chosen"], number))
        samples.append(to_sample(tokenizer, row["prompt"], row["rejected"], -number))
    return samples


def split(rows: Sequence[Row], share: float, seed: object) -> tuple[list[Row], list[Row]]:
    """Divide preference rows into rows to learn from and held-out rows.

    `share` is the share of the questions that is held out, at least one question. All pairs of one question
    are on the same side."""
    questions = {row["prompt"] for row in rows}
    order = sorted(questions, key=lambda question: fingerprint(seed, "held out", question))
    held_out = set(order[: max(1, round(share * len(order)))])
    learned = [row for row in rows if row["prompt"] not in held_out]
    return learned, [row for row in rows if row["prompt"] in held_out]
