"""Fit the planner's constants to public benchmark sweeps: `python -m limbeck.plan.calibrate runs.csv`.

A row is one measured run of the table. The table is the user's own copy; it is not part of the package. The
fit uses every second combination of model and number of chips of the Ultrascale rows, the single-node rows of
vTrain, and the rows of BLOOM's prequel and of MPT; vTrain's multi-node rows are left for checking. Rows are
grouped into sets by their source. The loss is the mean over sets of the mean of min(|log(predicted /
measured)|, 0.5), so that no set and no outlier dominates.
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

LEAST_MFU = 0.08  # share of the peak, below which a run was broken, not slow
MOST_ROWS = 24  # rows of a set that are used, about
MOST_ERROR = 0.5  # absolute logarithm of predicted over measured; larger errors count as this
MOST_CHIPS = 128  # Ultrascale rows with more chips than this are not fitted to
GAIN = 1e-5  # a change is kept only if it lowers the loss by more than this
FIRST_FACTOR = 1.25  # factor by which a constant is changed in the first round
SHRINK = 0.6  # exponent of the factor from one round to the next
SAME_RUN = ("layers", "hidden", "heads", "seq", "n_chips", "global_batch_tokens", "chip", "precision")


def seconds(row: Row) -> float:
    """Return the measured seconds of one training step, or 0 if the row has no such measurement."""
    if row.metric == "step_time_s":
        return row.value
    tokens = row.number("global_batch_tokens")
    if row.metric == "tokens_per_s_per_gpu" and tokens and row.chips:
        return tokens / row.value / row.chips
    return 0.0


def utilisation(row: Row) -> float:
    """Return 6 x parameters x tokens / time, as a share of the chips' 16-bit peak FLOP/s.

    It is a rough estimate, used to leave out broken runs.
    """
    peak = row.cluster.chip.rate("fp16")
    flops = 6 * row.number("active_params") * row.number("global_batch_tokens")
    return flops / seconds(row) / row.chips / peak


def sets(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows to fit to, grouped by source; each group is thinned to about MOST_ROWS rows."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if _is_fitted(row):
            groups[_set_name(row)].append(row)
    return {name: group[:: max(1, len(group) // MOST_ROWS)] for name, group in groups.items()}


def _is_fitted(row: Row) -> bool:
    """Return True if the row has a step time and is not reserved for checking the fit."""
    if not seconds(row) or not row.complete or utilisation(row) < LEAST_MFU:
        return False
    if row.precision == "fp8":
        return False
    if row.name.startswith("ultrascale"):
        odd = (row.integer("layers") + row.chips.bit_length()) % 2
        return row.chips <= MOST_CHIPS and not odd
    return True


def _set_name(row: Row) -> str:
    """Return the name of the row's set: source and chip, and for Ultrascale also the kind of parallelism."""
    source = row.name.split()[0]
    if row.name.startswith("vTrain"):
        return source
    chip = row["chip"].split("-")[0]
    name = f"{row.name.split('-')[0].split()[0]} {chip}"
    if not row.name.startswith("ultrascale"):
        return name
    if row.integer("pp") > 1:
        return f"{name} pp"
    return f"{name} tp" if row.integer("tp") > 1 else f"{name} dp"


def loss(numbers: Constants, groups: dict[str, list[Row]], exact: bool = False) -> float:
    """Return the mean over sets of the mean absolute error of a row, which is cut at MOST_ERROR.

    `exact` simulates pipeline schedules instead of using their formulas.
    """
    total = 0.0
    for rows in groups.values():
        errors = [min(MOST_ERROR, abs(error(row, numbers, exact))) for row in rows]
        total += sum(errors) / len(rows)
    return total / len(groups)


def error(row: Row, numbers: Constants, exact: bool = True) -> float:
    """Return log(predicted / measured) of the step time, or MOST_ERROR if the planner refuses the run.

    `exact` simulates pipeline schedules instead of using their formulas.
    """
    try:
        roof = Roofline(row.cluster.chip, row.precision, row.software, numbers)
        step = Foresight(row.model, row.cluster, row.layout, row.batch, row.seq, roof, exact).step()
    except LimbeckError:
        return MOST_ERROR
    return log(step.seconds / seconds(row))


def fit(groups: dict[str, list[Row]], numbers: Constants, rounds: int = 5) -> Constants:
    """Return the constants that lower the loss, found by coordinate descent.

    One constant after the other is multiplied and divided by a factor, which gets smaller in each round.
    """
    fitted = [name for name, entry in provenance().items() if entry["kind"] == "fitted"]
    names = [name for name in fitted if name != "waste"]
    least = loss(numbers, groups)
    factor = FIRST_FACTOR
    for _ in range(rounds):
        for name in names:
            for scale in (factor, 1 / factor):
                numbers, least = _descend(groups, numbers, least, name, scale)
        factor = factor**SHRINK
        values = {name: float(f"{getattr(numbers, name):.3g}") for name in names}
        print(f"{least:.4f}", values, flush=True)
    return numbers


def _descend(
    groups: dict[str, list[Row]], numbers: Constants, least: float, name: str, scale: float
) -> tuple[Constants, float]:
    """Scale the constant `name` by `scale` for as long as the loss falls.

    Return the constants and their loss. `least` is the loss of `numbers`.
    """
    while True:
        trial = replace(numbers, **{name: getattr(numbers, name) * scale})
        trial_loss = loss(trial, groups)
        if trial_loss >= least - GAIN:
            return numbers, least
        least = trial_loss
        numbers = trial


def regrets(rows: list[Row]) -> list[float]:
    """Return, for each group of runs, the relative time lost by choosing the layout by forecast.

    The chosen run is the one with the shortest forecast; the runs of a group differ only in their layout. 0.1
    means that the chosen run took 10 % longer than the fastest one. Groups of fewer than three runs are left
    out.
    """
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if seconds(row) and row.complete:
            model = row.name.split()[0].split("-h=")[0]
            groups[model, *(row[key] for key in SAME_RUN)].append(row)
    return [_regret(group) for group in groups.values() if len(group) > 2]


def _regret(group: list[Row]) -> float:
    """Return the relative time lost in one group.

    It is the measured time of the run with the shortest forecast over the shortest measured time, less 1.
    """
    numbers = constants()

    def predicted(row: Row) -> float:
        return error(row, numbers, exact=False) + log(seconds(row))

    chosen = min(group, key=predicted)
    return seconds(chosen) / min(map(seconds, group)) - 1


def fitting(rows: list[Row]) -> str:
    """Return one line on how well the planner predicts memory, measured on every third row.

    It counts the runs that were wrongly predicted to fit or not to fit in memory, and gives the relative
    error of the peak memory of the runs that fitted.
    """
    ran = [row for row in rows if row.metric == "peak_mem_reserved_gb"][::3]
    failed = [row for row in rows if row.metric == "oom"][::3]
    memories = [row.memory for row in ran]
    errors: list[float] = []
    for row, memory in zip(ran, memories, strict=True):
        errors.append(abs(memory.reserved / 1e9 / row.value - 1))
    refused = sum(not memory.fits for memory in memories)
    admitted = sum(row.memory.fits for row in failed)
    right = len(failed) - admitted
    f1 = 2 * right / (2 * right + refused + admitted)
    return (
        f"{len(ran) + len(failed)} rows: {refused} wrongly refused, {admitted} wrongly admitted, "
        f"F1 {f1:.3f}; "
        f"peak memory median {median(errors):.1%}, 95th percentile {percentile(errors, 0.95):.1%}"
    )


def main() -> None:
    """Fit the constants to the table `FILE`, the first argument.

    With the second argument `regret`, print the time lost by choosing layouts by forecast instead; with
    `memory`, print the errors of the memory forecast.
    """
    rows = read(Path(sys.argv[1]))
    if sys.argv[2:] == ["regret"]:
        for name in ("BLOOM", "vTrain-multi", "vTrain-single", "ultrascale"):
            lost = regrets([row for row in rows if row.name.startswith(name)])
            high = percentile(lost, 0.95)
            line = f"{len(lost)} groups, regret median {median(lost):.1%}, 95th percentile {high:.1%}"
            print(f"{name}: {line}")
        return
    if sys.argv[2:] == ["memory"]:
        print(fitting([row for row in rows if row.name.startswith("ultrascale")]))
        return
    groups = sets(rows)
    print({name: len(group) for name, group in groups.items()})
    fit(groups, constants())


if __name__ == "__main__":
    main()
