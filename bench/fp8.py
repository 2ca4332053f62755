"""The cost of training in FP8: the same base on the same text, in float32 and rounded as in DeepSeek-V3.

    python -m bench.fp8 --tokens 600000 --seeds 0 1 2
    python -m bench.fp8 --recipe limbeck/recipes/moe.yaml --stage moe

Prints both losses, each the mean over the last tenth of the text, and their gap, seed by seed; the paper
reports less than 0.25 % (arXiv 2412.19437, appendix B.1). How far float32 varies over seeds says what a gap
can show here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from limbeck.config.load import load
from limbeck.model.decoder import Decoder
from limbeck.model.fp8 import simulate
from limbeck.model.from_recipe import to_config
from limbeck.tasks.clock_countdown import Countdown, encode_documents
from limbeck.train.batch import pack
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy
from limbeck.train.sft import batches


def main() -> None:
    """Train in both precisions with every seed and print the losses and their gap."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe",
        type=Path,
        default=Path(__file__).parent.parent / "limbeck" / "recipes" / "quickstart.yaml",
    )
    parser.add_argument("--stage", default="base")
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load(options.recipe, [])
    stage = recipe.stages[options.stage]
    world, losses = recipe.problems[stage.problems], []
    for seed in options.seeds:
        exact, rounded = (grow(world, stage, options.tokens, seed, fp8) for fp8 in (False, True))
        losses.append((exact, rounded))
        print(
            f"seed {seed}: float32 {exact:.5f}   FP8 {rounded:.5f}   gap {rounded / exact - 1:+.3%}",
            flush=True,
        )
    exact, rounded = np.array(losses).T
    gaps = rounded / exact - 1
    print(
        f"gap {gaps.mean():+.3%}, from {gaps.min():+.3%} to {gaps.max():+.3%}; "
        f"float32 over seeds: {exact.min():.5f} to {exact.max():.5f}"
    )


def grow(world, stage, tokens: int, seed: int, fp8: bool) -> float:
    """Mean loss over the last tenth of the text."""
    task = Countdown("clock", world)
    tokenizer = task.tokenizer()
    decoder = Decoder(to_config(stage.shape, tokenizer.size)).initialize(seed)
    decoder = simulate(decoder) if fp8 else decoder
    documents = encode_documents(task.documents(seed, stage.corpus), tokenizer, tokens)
    plan = batches(documents, stage.batch_tokens, seed)
    learner, losses = Learner(decoder, stage.optimizer, len(plan)), []
    for step, batch in enumerate(plan, 1):
        losses.append(
            learner.update(pack([documents[i] for i in batch], 4 * stage.batch_tokens), CrossEntropy())[
                "loss"
            ]
        )
        if step % 100 == 0 or step == len(plan):
            print(
                f"{'FP8' if fp8 else 'float32':8} {step:6} of {len(plan)} updates, "
                f"loss {np.mean(losses[-100:]):.4f}",
                flush=True,
            )
    return float(np.mean(losses[-len(losses) // 10 :]))


if __name__ == "__main__":
    main()
