"""Time to accuracy: the miniature's zero stage here and in TRL's GRPOTrainer, until 60 % of held-out problems are solved.

    python -m bench.accuracy --base runs/store/pretrain-XXXX/model

Both begin with the same base (without --base it grows up first, which takes two minutes), the same problems in the
same order, the same rewards, group, clipping, learning rate and schedule. Sides take turns, a step each; held-out
accuracy is measured every few steps by the same code, and its time does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from .sides import CACHE, Side, python_of, roofline

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a model directory")
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--every", type=int, default=3, help="steps between two looks at accuracy")
    parser.add_argument("--asked", type=int, default=400, help="held-out problems asked at each look")
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = {
        "recipe": str(RECIPE), "model": str(options.base or base()), "seed": options.seed, "every": options.every, "asked": options.asked,
    }  # fmt: skip
    waiting = [
        Side("limbeck", "limbeck_accuracy.py", sys.executable, settings, options.threads),
        Side("trl", "trl_accuracy.py", python_of("trl"), settings, options.threads),
    ]
    print("| side | step | seconds of training | held-out accuracy |\n|---|---|---|---|")
    spent, reached = {side.name: 0.0 for side in waiting}, {}
    for step in range(1, options.steps + 1):
        for side in list(waiting):
            said = side.turn()
            spent[side.name] += said["step"]
            if said["accuracy"] >= 0:
                print(f"| {side.name} | {step} | {spent[side.name]:.1f} | {said['accuracy']:.3f} |", flush=True)
            if said["accuracy"] >= options.target:
                reached[side.name] = (step, spent[side.name])
                side.close()
                waiting.remove(side)
        if not waiting:
            break
    for name, (step, seconds) in reached.items():
        print(f"\n{name}: {options.target:.0%} after {step} steps and {seconds:.1f} s")
    if len(reached) == 2:
        print(f"limbeck is {reached['trl'][1] / reached['limbeck'][1]:.2f}x as fast")
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps({"title": "time to accuracy", "reached": reached, "spent": spent, "roofline": roofline(options.threads)}) + "\n")


def base() -> Path:
    """The quickstart's base, grown once."""
    runs = CACHE / "runs"
    found = list(runs.glob("store/pretrain-*/model"))
    if not found:
        recipe = yaml.safe_load(RECIPE.read_text())
        recipe["stages"] = {"base": recipe["stages"]["base"]}
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(recipe, file)
            file.flush()
            subprocess.run([str(Path(sys.executable).parent / "limbeck"), "run", file.name, "--runs", str(runs)], check=True, stdout=sys.stderr)
        found = list(runs.glob("store/pretrain-*/model"))
    return found[0]


if __name__ == "__main__":
    main()
