"""What one NVIDIA card does: what is exact, and what it costs.

    python -m bench.gpu                         # everything, under five minutes
    python -m bench.gpu floor rollout resume    # some parts
    python -m bench.gpu --quick --out gpu.json  # fewer shapes and turns; all numbers as JSON

Needs a card, torch built for it, and the Triton that comes with it. Each part prints what it measures and the
promises it checks; the exit code is 1 if a promise is broken or a part fails. Models have random weights in
the shapes of Qwen2.5 and Qwen3, scaled so that the next token is neither open nor certain.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import torch

from . import adapters, engine, kernels, training
from .report import RESULTS, broken, free_memory

PARTS = {
    "floor": kernels.floor,
    "products": kernels.products_part,
    "attention": kernels.attention_part,
    "draw": kernels.draw_part,
    "decode": engine.decode_part,
    "rollout": engine.rollout_part,
    "workload": engine.workload_part,
    "learner": training.learner_part,
    "exact": training.exact_part,
    "resume": training.resume_part,
    "lora": adapters.lora_part,
    "peer": engine.peer_part,
}


def main() -> int:
    """Run the parts that the command line names, all without any; return 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="fewer shapes and turns")
    parser.add_argument("--out", type=Path, help="a file for all numbers, as JSON")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    failed = False
    for name in options.parts or PARTS:
        torch.manual_seed(0)
        begin = time.perf_counter()
        try:
            PARTS[name](options.quick)
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            failed = True
        free_memory()
        print(f"-- {name}: {time.perf_counter() - begin:.1f} s", flush=True)
        if options.out:
            options.out.write_text(json.dumps(RESULTS, indent=1))
    for promise in broken():
        print(f"BROKEN: {promise}")
    return int(failed or bool(broken()))


if __name__ == "__main__":
    sys.exit(main())
