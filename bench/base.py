"""How soon a base of the miniature can calculate and check: the two skills that reinforcement amplifies.

    python -m bench.base --tokens 800000 --seeds 0 1 2
    python -m bench.base --stage small_base --tokens 3000000
    python -m bench.base --set stages.base.shape.rope_theta=10000

Trains the quickstart's base and, every 200 updates, asks on clean thoughts about held-out problems how
often the most likely next token is the right result (arith) and the right yes or no (verdict); each in
brackets: the probability given to it, which is what sampling at temperature 1 meets.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from limbeck.config.load import load
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.model.kv_cache import Packed
from limbeck.tasks.clock_countdown import WORDS, Countdown, encode_documents
from limbeck.train.batch import pack
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy
from limbeck.train.sft import batches
from limbeck.types import Sample, fingerprint

CLEAN = {
    "textbook": 0,
    "general": 0,
    "plain": 0,
    "tagged": 0,
    "guessed": 0,
    "slip": 0,
    "misjudged": 0,
    "unverified": 0,
    "same": 1,
}
THOUGHTS = 300  # problems


def main() -> None:
    """Train the base with every seed and print its answers every 200 updates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=800_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--stage", default="base", help="which pretraining of the recipe: base or small_base")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="as in limbeck run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load(Path(__file__).parent.parent / "limbeck" / "recipes" / "quickstart.yaml", options.overrides)
    for seed in options.seeds:
        grow(
            recipe.problems["clock"], recipe.stages[options.stage], options.tokens, f"{seed}/{options.stage}"
        )


def grow(world, stage, tokens: int, seed: str) -> None:
    """Train a base on `tokens` tokens, telling on the way what it can do."""
    task = Countdown("clock", world)
    tokenizer, shape = task.tokenizer(), stage.shape
    config = ModelConfig(
        "llama",
        tokenizer.size,
        shape.hidden_size,
        shape.layers,
        shape.heads,
        shape.kv_heads,
        shape.hidden_size // shape.heads,
        shape.intermediate_size,
        shape.rope_theta,
    )
    decoder = Decoder(config).initialize(fingerprint(seed, "weights"))
    documents = encode_documents(task.documents(seed, stage.corpus), tokenizer, tokens)
    lengths = np.array([len(document.tokens) for document in documents])
    print(
        f"seed {seed}: {len(documents)} documents, mean length {lengths.mean():.1f}; "
        f"{lengths[lengths > 100].sum() / lengths.sum():.1%} of the tokens in documents of more than 100"
    )
    plan, thoughts = batches(documents, stage.batch_tokens, seed), clean_thoughts(task, tokenizer)
    learner = Learner(decoder, stage.optimizer, len(plan))
    seen = 0
    for step, batch in enumerate(plan, 1):
        metrics = learner.update(pack([documents[i] for i in batch], 4 * stage.batch_tokens), CrossEntropy())
        seen += int(lengths[batch].sum())
        if step % 200 == 0 or step == len(plan):
            print(
                f"{step:6} updates {seen:9} tokens  loss {metrics['loss']:.3f}  "
                f"{probe(decoder, thoughts, tokenizer)}",
                flush=True,
            )


def clean_thoughts(task: Countdown, tokenizer) -> list[Sample]:
    """Worked documents without slips, about problems that no corpus holds."""
    held_out = Countdown("clock", task.settings)
    held_out.sets = {"train": task.sets["test"], "test": task.sets["test"]}
    return encode_documents(islice(held_out.documents("probe", CLEAN), THOUGHTS), tokenizer, tokens=1 << 40)


@torch.no_grad()
def probe(decoder: Decoder, thoughts: list[Sample], tokenizer) -> str:
    """Teacher-forced: how often, and how surely, results and verdicts are foreseen."""
    ids = tokenizer.backend.get_vocab(with_added_tokens=True)
    gives, verdicts = (
        [ids[WORDS[language][word]] for language in WORDS for word in words]
        for words in (["gives"], ["yes", "no"])
    )
    before = np.concatenate([thought.tokens[:-1] for thought in thoughts])
    after = np.concatenate([thought.tokens[1:] for thought in thoughts])
    hidden = decoder(torch.from_numpy(before), Packed([len(thought.tokens) - 1 for thought in thoughts]))
    probabilities = (hidden @ decoder.head.weight.T).softmax(-1).numpy()
    right, sure = probabilities.argmax(1) == after, probabilities[np.arange(len(after)), after]
    told = {"arith": np.isin(before, gives), "verdict": np.isin(after, verdicts)}
    return "  ".join(
        f"{name} {right[where].mean():.3f} ({sure[where].mean():.3f})" for name, where in told.items()
    )


if __name__ == "__main__":
    main()
