"""A recipe over several seeds, and one table of what came out.

    python -m bench.seeds quickstart --seeds 0 1 2 > docs/results/quickstart-table.md

Each seed is a run of its own (`runs/NAME-SEED`); what is done already is not done again. The table is that of
`limbeck results`, to which options that are not known here are handed on: `--pool`, `--stat attempts`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

from limbeck.config.load import find


def main() -> None:
    """Run the recipe with every seed and print the table, and what each run took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options, more = parser.parse_known_args()
    name = yaml.safe_load(find(options.recipe).read_text())["name"]
    names = [f"{name}-{seed}" for seed in options.seeds]
    for run, seed in zip(names, options.seeds, strict=True):
        changed = ("--set", f"name={run}", "--set", f"seed={seed}")
        limbeck("run", options.recipe, "--auto", "--runs", str(options.runs), *changed, stdout=sys.stderr)
    limbeck("results", *names, "--runs", str(options.runs), "--markdown", *more)
    for run in names:
        print(f"\n{run}: {costs(options.runs / run)}")


def limbeck(*arguments: str, **options) -> None:
    """Carry a command out. Raises CalledProcessError if it fails."""
    subprocess.run([str(Path(sys.executable).parent / "limbeck"), *arguments], check=True, **options)


def costs(run: Path) -> str:
    """Return what a run took, from its report."""
    report = json.loads((run / "report" / "report.json").read_text())
    machine = report["machine"]
    return (
        f"{report['seconds']:.0f} s, peak memory {report['peak_memory_bytes'] / 2**30:.2f} GiB, "
        f"{machine['cores']:g} cores of {machine['processor']}."
    )


if __name__ == "__main__":
    main()
