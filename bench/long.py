"""One update on a single completion as long as can be: seconds, and the most memory it took.

    python -m bench.long --size 135m --tokens 32768 --threads 2

Everything but the residual stream is computed again on the way back (`recompute: true`), and
log-probabilities are made a chunk at a time.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from limbeck.config.parts import Optimizer, Policy
from limbeck.model import weights
from limbeck.model.decoder import Decoder
from limbeck.train.batch import pack
from limbeck.train.learner import Learner
from limbeck.train.losses import PolicyGradient
from limbeck.types import Sample

from . import models


def main() -> None:
    """Update on one long sequence and print its time and memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(models.SIZES), default="135m")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--keep", action="store_true", help="keep what the way back needs, and recompute nothing"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = weights.load(models.make(options.size))
    decoder = Decoder(replace(known.config, max_positions=options.tokens + 64))
    decoder.load_state_dict(known.state_dict())
    del known
    learner = Learner(decoder, Optimizer(learning_rate=1e-6), 10, recompute=not options.keep)
    random = np.random.default_rng(0)
    tokens = random.integers(0, decoder.config.vocab_size, options.tokens + 16)
    sample = Sample(tokens, 16, 1.0, np.full(options.tokens, -6.0, np.float32))
    begun = time.perf_counter()
    metrics = learner.update(pack([sample], options.tokens), PolicyGradient(Policy(), options.tokens))
    said = {
        "size": options.size,
        "tokens": options.tokens,
        "threads": options.threads,
        "recompute": not options.keep,
        "seconds": time.perf_counter() - begun,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "gradient_norm": metrics["gradient_norm"],
    }
    print(json.dumps(said))
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
