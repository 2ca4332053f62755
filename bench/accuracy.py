"""Time until 60 % of held-out problems are solved: the miniature's zero stage, here and in TRL's GRPOTrainer.

    python -m bench.accuracy --base runs/store/pretrain-XXXX/model

Both begin with the same base (without --base it grows up first, which takes two minutes), the same problems
in the same order, the same rewards, group, clipping, learning rate and schedule. Sides take turns, a step
each; held-out accuracy is measured every few steps by the same code, and its time does not count. One seed
tells little: steps to a line vary by half.
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

RECIPE = Path(__file__).parent.parent / "limbeck" / "recipes" / "quickstart.yaml"


def main() -> None:
    """Train both sides in turns and print their accuracy over steps and seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, help="a model directory")
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--every", type=int, default=3, help="steps between two looks at accuracy")
    parser.add_argument("--asked", type=int, default=400, help="held-out problems asked at each look")
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = {
        "recipe": str(RECIPE),
        "model": str(options.base or base()),
        "every": options.every,
        "asked": options.asked,
    }
    print("| seed | side | step | seconds of training | held-out accuracy |\n|---|---|---|---|---|")
    found = {seed: race({**settings, "seed": seed}, options) for seed in options.seeds}
    print("\n| seed | limbeck | trl | limbeck is |\n|---|---|---|---|")
    for seed, reached in found.items():
        cells = [
            f"{reached[name][0]} steps, {reached[name][1]:.1f} s" if name in reached else "not reached"
            for name in ("limbeck", "trl")
        ]
        ratio = f"{reached['trl'][1] / reached['limbeck'][1]:.2f}x as fast" if len(reached) == 2 else ""
        print(f"| {seed} | {cells[0]} | {cells[1]} | {ratio} |")
    if options.json:
        with options.json.open("a") as file:
            file.write(
                json.dumps(
                    {"title": "time to accuracy", "reached": found, "roofline": roofline(options.threads)}
                )
                + "\n"
            )


def race(settings: dict, options: argparse.Namespace) -> dict[str, tuple[int, float]]:
    """Steps and seconds of training after which each side reached the target."""
    waiting = [
        Side("limbeck", "limbeck_accuracy.py", sys.executable, settings, options.threads),
        Side("trl", "trl_accuracy.py", python_of("trl"), settings, options.threads),
    ]
    spent, reached = {side.name: 0.0 for side in waiting}, {}
    for step in range(1, options.steps + 1):
        for side in list(waiting):
            said = side.turn()
            spent[side.name] += said["step"]
            if said["accuracy"] >= 0:
                print(
                    f"| {settings['seed']} | {side.name} | {step} | {spent[side.name]:.1f} "
                    f"| {said['accuracy']:.3f} |",
                    flush=True,
                )
            if said["accuracy"] >= options.target:
                reached[side.name] = (step, spent[side.name])
                side.close()
                waiting.remove(side)
    for side in waiting:
        side.close()
    return reached


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
            subprocess.run(
                [str(Path(sys.executable).parent / "limbeck"), "run", file.name, "--runs", str(runs)],
                check=True,
                stdout=sys.stderr,
            )
        found = list(runs.glob("store/pretrain-*/model"))
    return found[0]


if __name__ == "__main__":
    main()
