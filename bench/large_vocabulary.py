"""The cost of a large vocabulary: Gemma 3 270M's shape with 49,152 tokens and with 262,144, random weights.

    python -m bench.large_vocabulary
    python -m bench.large_vocabulary --layers 6 --repeats 3 --threads 2

Prints for each vocabulary the tokens a second of decoding and of an update of 1,024 predicted tokens, the
head's share of the time of each (logits and draws; log-probabilities and their gradients), and the memory of
the log-probabilities with their gradients: in parts as the learner computes them, and from all logits at
once. Memory is what a process's peak rises by, each in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor

from limbeck.config.parts import Optimizer
from limbeck.engine.decode_batch import DecodeBatch
from limbeck.engine.sampling import SamplingParams, draw
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy
from limbeck.train.scorer import token_logprobs
from limbeck.types import Sample

VOCABULARIES = (49_152, 262_144)
HIDDEN = 640
ROWS = (1, 8, 64)
SEQUENCES, LENGTH, PROMPT = 32, 48, 16
PREDICTED = SEQUENCES * (LENGTH - PROMPT)
MIB = 1 << 20


def main() -> None:
    """Measure both vocabularies and print a table, whose last column is the ratio of the two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = [measure(size, options.layers, options.repeats) for size in VOCABULARIES]
    print(f"{options.layers} layers, {options.threads} thread(s)\n")
    print("| | " + " | ".join(f"{size:,}" for size in VOCABULARIES) + " | ratio |\n|---|---|---|---|")
    for name, small in columns[0].items():
        large = columns[1][name]
        ratio = large / small if small else float("inf")
        print(f"| {name} | {small:,.3g} | {large:,.3g} | {ratio:.2f} |")


def measure(vocabulary: int, layers: int, repeats: int) -> dict[str, float]:
    """Return what is printed of one vocabulary, by name."""
    decoder = make(vocabulary, layers)
    found: dict[str, float] = {}
    for rows in ROWS:
        step, head = decoding(decoder, rows, repeats)
        found[f"decoding {rows} rows, tokens/s"] = rows / step
        found[f"decoding {rows} rows, share of the head, %"] = 100 * head / step
    update, head = learning(decoder, repeats)
    found["update, predicted tokens/s"] = PREDICTED / update
    found["update, share of the head, %"] = 100 * head / update
    del decoder
    for way in ("in parts", "whole"):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found[f"log-probabilities and gradients {way}, MiB"] = pool.submit(peak, way, vocabulary).result()
    return found


def make(vocabulary: int, layers: int) -> Decoder:
    """A decoder with random weights in Gemma 3 270M's shape."""
    windows = tuple(0 if layer % 6 == 5 else 512 for layer in range(layers))
    config = ModelConfig(
        "gemma3", vocabulary, HIDDEN, layers, 4, 1, 256, 2048, qk_norm="before", max_positions=512,
        windows=windows, gelu=True, norms_from_one=True, post_norms=True, scaled_embeddings=True,
        rope_theta=1e6, local_theta=1e4,
    )  # fmt: skip
    return Decoder(config).initialize(0)


@torch.no_grad()
def decoding(decoder: Decoder, rows: int, repeats: int) -> tuple[float, float]:
    """Return the seconds of a decode step, and those of its logits and draws."""
    params = SamplingParams(max_new_tokens=repeats + 2)
    batch = DecodeBatch(decoder, decoder.config.vocab_size - 1, params)
    random = np.random.default_rng(0)
    batch.admit([(0, np.arange(PROMPT))], random.random((rows, params.max_new_tokens)), rows)
    uniform_B, previous_B = torch.from_numpy(random.random(rows)), torch.zeros(rows, dtype=torch.long)
    hidden_BC = batch.hidden_BC.clone()

    def head() -> Tensor:
        """The next tokens [B] of the rows."""
        logits_BV = decoder.ops.logits(hidden_BC, decoder.head.weight)
        return draw(logits_BV, uniform_B, previous_B, params).tokens_B

    return seconds(batch.step, repeats), seconds(head, repeats)


def learning(decoder: Decoder, repeats: int) -> tuple[float, float]:
    """Return the seconds of an update, and those of the log-probabilities and their gradients."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, decoder.config.vocab_size, (SEQUENCES, LENGTH))
    learner = Learner(decoder, Optimizer(learning_rate=1e-5), repeats + 1)
    batches = learner.pack([Sample(row, start=PROMPT) for row in tokens], SEQUENCES * LENGTH)
    whole = seconds(lambda: learner.update(batches, CrossEntropy()), repeats)
    return whole, seconds(lambda: scores("in parts", decoder.head.weight), repeats)


def scores(way: str, head_VC: Tensor) -> None:
    """Compute log-probabilities and their gradients, by the hidden states and by the head."""
    random = torch.Generator().manual_seed(0)
    hidden_MC = torch.randn(PREDICTED, HIDDEN, generator=random).requires_grad_()
    head_VC = head_VC.detach().requires_grad_()
    targets_M = torch.randint(0, len(head_VC), (PREDICTED,), generator=random)
    if way == "in parts":
        logprobs_M, _ = token_logprobs(hidden_MC, head_VC, targets_M)
    else:
        logprobs_MV = torch.log_softmax(hidden_MC @ head_VC.T, -1)
        logprobs_M = logprobs_MV.gather(1, targets_M.unsqueeze(1))
    logprobs_M.sum().backward()


def peak(way: str, vocabulary: int) -> float:
    """Return by how many MiB this process's peak rises with the scores of one way."""
    torch.set_num_threads(1)
    head_VC = torch.randn(vocabulary, HIDDEN)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores(way, head_VC)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / MIB


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median of the seconds that some work takes, after a first time that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
