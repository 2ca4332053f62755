"""What one NVIDIA card does: what is exact, and what it costs.

    python -m bench.gpu                         # everything but the quickstart, under five minutes
    python -m bench.gpu floor rollout resume    # some parts
    python -m bench.gpu --quick --out gpu.json  # fewer shapes and turns; all numbers as JSON
    python -m bench.gpu quickstart              # a whole recipe, in its own time
    python -m bench.gpu --rehearse              # without a card: every part at tiny sizes

Needs a card, torch built for it, and the Triton that comes with it. The parts come in the order of their
worth, each with the seconds that it may take (three times as many if it is named); what does not fit in is
left out, and said. Each part prints what it measures and the promises it checks, and the JSON file is written
after each. The exit code is 1 if a promise is broken or a part fails. Models have random weights in the
shapes of real ones, scaled so that the next token is neither open nor certain.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from . import adapters, engine, kernels, memory, peers, quickstart, report, training
from .card import Card, Rehearsal

LIMIT = 300  # seconds of all parts together
NAMED = 3  # times as long may a part take that the command line names


class Part(NamedTuple):
    """A part, and the seconds that it may take on an H100."""

    run: Callable[[Card, bool], None]
    seconds: float


PARTS = {
    "floor": Part(kernels.floor_part, 4),
    "rollout": Part(engine.rollout_part, 32),
    "resume": Part(training.resume_part, 14),
    "exact": Part(training.exact_part, 32),
    "decode": Part(engine.decode_part, 22),
    "workload": Part(engine.workload_part, 16),
    "learner": Part(training.learner_part, 26),
    "lora": Part(adapters.lora_part, 20),
    "memory": Part(memory.memory_part, 28),
    "mixture": Part(engine.mixture_part, 20),
    "trl": Part(peers.trl_part, 34),
    "transformers": Part(peers.transformers_part, 28),
    "attention": Part(kernels.attention_part, 8),
    "products": Part(kernels.products_part, 8),
    "draw": Part(kernels.draw_part, 3),
}
APART = {"quickstart": Part(quickstart.quickstart_part, 3600)}  # only where it is named


def main() -> int:
    """Run the parts that the command line names, all without any; return 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=", ".join([*PARTS, *APART]))
    parser.add_argument("--quick", action="store_true", help="fewer shapes and turns")
    parser.add_argument("--rehearse", action="store_true", help="without a card, at tiny sizes")
    parser.add_argument("--out", type=Path, help="a file for all numbers, as JSON")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS) - set(APART)
    if unknown:
        parser.error(
            f"there is no part {', '.join(sorted(unknown))}; there are {', '.join([*PARTS, *APART])}"
        )
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no NVIDIA card; --rehearse runs every part without one")
    card = Rehearsal() if options.rehearse else Card()
    chosen = {name: {**PARTS, **APART}[name] for name in options.parts or PARTS}
    print(", ".join(f"{name} {part.seconds:g} s" for name, part in chosen.items()), flush=True)
    failed = [name for name in chosen if not run(card, name, chosen[name], options)]
    for promise in report.broken():
        print(f"BROKEN{' (a rehearsal promises nothing)' * card.rehearsed}: {promise}")
    return int(bool(failed) or (not card.rehearsed and bool(report.broken())))


def run(card: Card, name: str, part: Part, options: argparse.Namespace) -> bool:
    """Run one part, unless it does not fit into the time of all and was not named; return False if it
    failed."""
    begin = time.monotonic()
    if not options.parts and begin - BEGIN + part.seconds > LIMIT:
        report.note(name, left_out="the part", because=f"all parts together have {LIMIT} s")
        return True
    torch.manual_seed(0)
    report.begin(part.seconds * (NAMED if options.parts else 1))
    try:
        part.run(card, options.quick)
        done = True
    except Exception as problem:  # noqa: BLE001 - the other parts are to be measured
        traceback.print_exc()
        report.note(name, failed=f"{type(problem).__name__}: {str(problem)[:200]}")
        done = False
    card.free()
    report.note(name, took=round(time.monotonic() - begin, 1), of=part.seconds)
    if options.out:
        report.save(options.out)
    return done


BEGIN = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
