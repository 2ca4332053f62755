"""A recipe over several seeds, and one table of what came out.

    python -m bench.seeds quickstart --seeds 0 1 2 > docs/results/quickstart-table.md

Each seed is a run of its own (`runs/NAME-SEED`); what is done already is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

MODES = {"t1": "T = 1", "t06": "T = 0.6", "greedy": "greedy", "pass@8": "pass@8"}


def main() -> None:
    """Run the recipe with every seed and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    name = yaml.safe_load(options.recipe.read_text())["name"]
    reports = {seed: run(options.recipe, f"{name}-{seed}", seed, options.runs) for seed in options.seeds}
    print(table(reports))


def run(recipe: Path, name: str, seed: int, runs: Path) -> dict:
    """One seed's report."""
    command = [
        "limbeck",
        "run",
        str(recipe),
        "--auto",
        "--runs",
        str(runs),
        "--set",
        f"name={name}",
        "--set",
        f"seed={seed}",
    ]
    subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]], check=True, stdout=sys.stderr
    )
    return json.loads((runs / name / "report" / "report.json").read_text())


def table(reports: dict[int, dict]) -> str:
    """Models down, ways of sampling across; each cell is one seed's share with its 95 % interval."""
    modes = " | ".join(MODES.values())
    lines = [f"| model | seed | {modes} | length | attempts | P(again \\| no) | one language |"]
    lines.append("|---" * (len(MODES) + 6) + "|")
    for model in next(iter(reports.values()))["models"]:
        for seed, report in reports.items():
            entry = report["models"][model]
            cells = [cell(entry["accuracy"].get(mode)) for mode in MODES]
            rest = [number(entry.get(key), form) for key, form in _REST.items()]
            lines.append(f"| {model} | {seed} | {' | '.join([*cells, *rest])} |")
    for seed, report in reports.items():
        machine = report["machine"]
        lines.append(
            f"\nSeed {seed}: {report['seconds']:.0f} s, "
            f"peak memory {report['peak_memory_bytes'] / 2**30:.2f} GiB, "
            f"{machine['cores']:g} cores of {machine['processor']}."
        )
    return "\n".join(lines)


_REST = {"length": ".0f", "attempts": ".2f", "persist": ".2f", "language_consistency": ".3f"}


def cell(entry: dict | None) -> str:
    """An accuracy with its interval; empty where it was not measured."""
    if not entry:
        return ""
    return f"{entry['mean']:.1%} ({entry['low']:.1%} to {entry['high']:.1%}, n = {entry['n']})"


def number(value: float | None, form: str) -> str:
    """A formatted number; empty where it was not measured."""
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main()
