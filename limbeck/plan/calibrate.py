"""Fit the planner's constants to public benchmark sweeps: `python -m limbeck.plan.calibrate published_runs_ext.csv`.

The table is the user's own copy; it is not part of the package. A fit uses every second model x chips group of the
Ultrascale rows, the single-node rows of vTrain, BLOOM's prequel and MPT; vTrain's multi-node rows are left for checking.
The loss is the mean over sets of the mean of min(|log(foreseen / measured)|, 0.5), so that no set and no outlier rules.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import median

from ..types import LimbeckError
from .constants import Constants, constants, provenance
from .published import Row, read
from .roofline import Roofline
from .step import Foresight
from .verify import percentile

LEAST_MFU = 0.08  # below it a run was broken, not slow
MOST_ROWS = 24  # of a set


def seconds(row: Row) -> float:
    """Measured seconds of a step; 0 where the row tells none."""
    if row.metric == "step_time_s":
        return row.value
    if row.metric == "tokens_per_s_per_gpu" and row.number("global_batch_tokens") and row.chips:
        return row.number("global_batch_tokens") / row.value / row.chips
    return 0.0


def utilisation(row: Row) -> float:
    """6ND over the 16-bit peak: rough, to leave out what was broken."""
    peak = row.cluster.chip.rate("fp16")
    return (
        6 * row.number("active_params") * row.number("global_batch_tokens") / seconds(row) / row.chips / peak
    )


def sets(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows to fit to, by where they come from."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if not seconds(row) or not row.complete or utilisation(row) < LEAST_MFU:
            continue
        name = row.name.split("-")[0].split()[0] + " " + row["chip"].split("-")[0]
        if row.precision == "fp8":
            continue
        if row.name.startswith("vTrain"):
            name = row.name.split()[0]
        if row.name.startswith("ultrascale"):
            if row.chips > 128 or (row.integer("layers") + row.chips.bit_length()) % 2:
                continue
            name += " pp" if row.integer("pp") > 1 else " tp" if row.integer("tp") > 1 else " dp"
        found[name].append(row)
    return {name: few[:: max(1, len(few) // MOST_ROWS)] for name, few in found.items()}


def loss(numbers: Constants, chosen: dict[str, list[Row]], exact: bool = False) -> float:
    total = 0.0
    for rows in chosen.values():
        total += sum(min(0.5, abs(error(row, numbers, exact))) for row in rows) / len(rows)
    return total / len(chosen)


def error(row: Row, numbers: Constants, exact: bool = True) -> float:
    """log(foreseen / measured)."""
    try:
        roof = Roofline(row.cluster.chip, row.precision, row.software, numbers)
        step = Foresight(row.model, row.cluster, row.layout, row.batch, row.seq, roof, exact).step()
    except LimbeckError:
        return 0.5
    return log(step.seconds / seconds(row))


def fit(chosen: dict[str, list[Row]], numbers: Constants, rounds: int = 5) -> Constants:
    """One constant after the other, by smaller and smaller factors."""
    names = [name for name, told in provenance().items() if told["kind"] == "fitted" and name != "waste"]
    least, factor = loss(numbers, chosen), 1.25
    for _ in range(rounds):
        for name in names:
            for scale in (factor, 1 / factor):
                while (
                    now := loss(trial := replace(numbers, **{name: getattr(numbers, name) * scale}), chosen)
                ) < least - 1e-5:
                    least, numbers = now, trial
        factor = factor**0.6
        print(f"{least:.4f}", {name: float(f"{getattr(numbers, name):.3g}") for name in names}, flush=True)
    return numbers


def regrets(rows: list[Row]) -> list[float]:
    """By how much the layout that is foreseen to be fastest is slower than the fastest measured, a group of runs that
    differ in nothing else."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if seconds(row) and row.complete:
            shape = tuple(
                row[key]
                for key in (
                    "layers",
                    "hidden",
                    "heads",
                    "seq",
                    "n_chips",
                    "global_batch_tokens",
                    "chip",
                    "precision",
                )
            )
            groups[row.name.split()[0].split("-h=")[0], *shape].append(row)
    found = []
    for group in groups.values():
        if len(group) > 2:
            chosen = min(group, key=lambda row: error(row, constants(), exact=False) + log(seconds(row)))
            found.append(seconds(chosen) / min(map(seconds, group)) - 1)
    return found


def fitting(rows: list[Row]) -> str:
    """How often it is foreseen whether a run fits, and the error of its peak memory, on every third row."""
    told = {
        metric: [row for row in rows if row.metric == metric][::3]
        for metric in ("peak_mem_reserved_gb", "oom")
    }
    ran, broke = ([row.memory for row in some] for some in told.values())
    refused, admitted = sum(not held.fits for held in ran), sum(held.fits for held in broke)
    right = len(broke) - admitted
    errors = [
        abs(held.reserved / 1e9 / row.value - 1)
        for held, row in zip(ran, told["peak_mem_reserved_gb"], strict=True)
    ]
    return (
        f"{len(ran) + len(broke)} rows: {refused} wrongly refused, {admitted} wrongly admitted, F1 {2 * right / (2 * right + refused + admitted):.3f}; "
        f"peak memory median {median(errors):.1%}, 95th percentile {percentile(errors, 0.95):.1%}"
    )


def main() -> None:
    """`FILE` fits; `FILE regret` tells what choosing by forecast costs, `FILE memory` how well it is known what fits."""
    rows = read(Path(sys.argv[1]))
    if sys.argv[2:] == ["regret"]:
        for name in ("BLOOM", "vTrain-multi", "vTrain-single", "ultrascale"):
            lost = regrets([row for row in rows if row.name.startswith(name)])
            print(
                f"{name}: {len(lost)} groups, regret median {median(lost):.1%}, 95th percentile {percentile(lost, 0.95):.1%}"
            )
        return
    if sys.argv[2:] == ["memory"]:
        return print(fitting([row for row in rows if row.name.startswith("ultrascale")]))
    chosen = sets(rows)
    print({name: len(few) for name, few in chosen.items()})
    fit(chosen, constants())


if __name__ == "__main__":
    main()
