"""The test of a device: does its learner give the tokens that its sampler drew the same log-probabilities, to
the last bit? On a small model with random weights, in company and alone."""

from __future__ import annotations

import numpy as np
import torch

from ..engine.rollout import Engine
from ..engine.sampling import SamplingParams
from ..model.config import ModelConfig
from ..model.decoder import Decoder
from ..model.ops import place
from ..train.batch import MICRO_TOKENS, by_sample
from ..train.scorer import Scorer
from ..types import Problem, Sample, generator

VOCABULARY = 1024  # tokens
PROBLEMS = 4  # prompts, of different lengths
GROUP = 4  # completions of each
NEW_TOKENS = 32  # of a completion
SHARPNESS = 12  # factor of the head: random weights give flat distributions, which hide differences


class _Numbers:
    """A tokenizer whose texts are lengths of prompts."""

    end_id = 0

    def prompt(self, text: str) -> np.ndarray:
        """Return a prompt [N] of as many tokens as the text says."""
        return generator("exactness", text).integers(1, VOCABULARY, int(text))

    def decode(self, tokens: np.ndarray) -> str:
        """Return no text."""
        return ""


def equal_share(device: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the share of sampled tokens whose log-probability has the same bits in sampler and learner.

    `device` is a resolved name (model/ops/devices.py), `dtype` the type of the weights.
    """
    config = ModelConfig("llama", VOCABULARY, 256, 2, 4, 2, 64, 512, max_positions=512, tied=False)
    model = Decoder(config).initialize(0)
    with torch.no_grad():
        model.head.weight.mul_(SHARPNESS)
    place(model, device, dtype)
    problems = [Problem(f"exactness/{n}", str(n)) for n in range(20, 20 + 13 * PROBLEMS, 13)]
    groups = Engine(model, _Numbers()).rollout(problems, GROUP, SamplingParams(max_new_tokens=NEW_TOKENS), 0)
    samples = []
    sampled = []
    for group in groups:
        for completion in group.completions:
            tokens = np.concatenate([group.prompt_tokens, completion.tokens])
            samples.append(Sample(tokens, len(group.prompt_tokens)))
            sampled.append(completion.logprobs)
    scorer = Scorer(model)
    batches = scorer.pack(samples, MICRO_TOKENS)
    learned = by_sample(batches, scorer.logprobs(batches), len(samples))
    return float(np.mean(np.concatenate(learned) == np.concatenate(sampled)))
