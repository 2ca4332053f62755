"""The planner's accuracy: published runs beside their forecasts, errors, and skill against a constant.

A row is one measured figure of a published run; a check is a row beside its forecast. As a baseline, called
the floor, every run is predicted by one number: the median utilisation of its kind (chip, precision, dense or
mixture) in the same table. This makes the floor look better than it is, as it knows the table. Skill is 1 -
error / error of the floor. Utilisation is the FLOPs of a step over those at the chips' peak. An interval
covers a measurement if it contains it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median

from ..types import LimbeckError
from . import card_runs, cost, models, pipeline_schedules, search
from . import cluster as clusters
from .collectives import decode_bound, free_experts
from .constants import constants
from .energy import circular
from .inference import Day, Replica, production, unit_cost
from .published import FILE, SOME, Row, read
from .step import Foresight, Step, foresee

WIDER = 1.3  # factor of a whole run's interval on a step's: goodput and side runs are not published
LARGE_CLUSTER = 1024  # chips of a run whose data parallelism is not published
SMALL_CLUSTER = 64  # chips on which a run with an unpublished layout is laid out first
NEAR = 0.2  # relative error below which forecasts of memory and phases count as covered
DAY = 86400  # seconds
LONGEST_REASON = 110  # characters
GOALS = {  # median and 95th percentile of the relative error
    "step, dense": (0.06, 0.20), "step, mixture": (0.08, 0.25), "V3's phases": (0.20, 0.35),
    "whole runs": (0.15, 0.40), "peak memory": (0.06, 0.20), "memory by formula": (0.06, 0.20),
}  # fmt: skip
USER_SPEED = 21  # tokens a second of a user of DeepSeek's service (day 6)
USER_CONTEXT = 4989  # tokens, on average (day 6)
SECONDS = (
    "step_time_s",
    "tokens_per_s_per_gpu",
    "model_tflops_per_gpu",
    "hw_tflops_per_gpu",
    "mfu_pct",
    "hfu_pct",
    "tokens_per_day_1e9",
)
HOURS = ("gpu_hours", "gpu_hours_per_1T_tokens", "days_for_300B_tokens")
MEMORY = ("peak_mem_gib", "peak_mem_gb", "peak_mem_reserved_gb")
FORMULA = ("params_opt_mem_gib", "activation_mem_gib")


@dataclass(frozen=True)
class Check:
    """One measured figure beside its forecast.

    `foreseen` is the forecast in the unit of the row's metric. `ratio` is forecast over measured time (or
    bytes). `covered` is True if the forecast's interval contains the measurement. `why` is the reason if
    there is no forecast, otherwise empty. `utilisation` is the measured utilisation, from 6 FLOPs a parameter
    and token, or 0 if the row has no step time.
    """

    row: Row
    kind: str
    foreseen: float = 0.0
    ratio: float = 0.0
    covered: bool = False
    why: str = ""
    utilisation: float = 0.0

    @property
    def error(self) -> float:
        """The relative error of the forecast, without sign."""
        return abs(self.ratio - 1)

    def tell(self) -> str:
        """Return the check as one line of the table."""
        line = f"{self.row.name[:46]:46} {self.row.metric[:24]:24} {self.row.value:>12.5g}"
        if self.why:
            return f"{line}  {self.why}"
        outside = "" if self.covered else "  outside"
        return f"{line} {self.foreseen:>12.5g} {self.ratio - 1:>+7.1%}{outside}"


def checks(rows: list[Row]) -> Iterator[Check]:
    """Yield a check of every row.

    A row without a forecast has the reason in `why`, and is not part of the errors in the summary.
    """
    for row in rows:
        try:
            yield check(row)
        except LimbeckError as error:
            yield _unforeseen(row, str(error)[:LONGEST_REASON])


def check(row: Row) -> Check:
    """Return the check of one row. Raises LimbeckError if the planner refuses the run."""
    metric = row.metric
    if metric.startswith("phase_"):
        return _check_phase(row)
    if metric in MEMORY or metric in FORMULA:
        return _check_memory(row)
    if metric == "oom":
        fits = row.memory.fits
        return Check(row, "fits or not", float(not fits), 1.0 + float(fits), not fits)
    if metric in HOURS:
        return _check_hours(row)
    base = metric.removesuffix("_bf16peak").removesuffix("_noncausal").removesuffix("_causal")
    if base not in SECONDS:
        return _unforeseen(row, "the planner foresees no such figure")
    if not row.complete:
        return _unforeseen(row, "its layout is not published")
    return _check_step(row)


def _unforeseen(row: Row, why: str) -> Check:
    """Return the check of a row without a forecast; `why` is the reason."""
    return Check(row, "not foreseen", why=why)


def _plan(row: Row) -> Foresight:
    """Return the forecast of a step with the row's model, cluster and layout."""
    return foresee(row.model, row.cluster, row.layout, row.batch, row.seq, row.precision, row.software)


def _check_step(row: Row) -> Check:
    """Return the check of a step time, or of a rate or utilisation that follows from it."""
    step = _plan(row).step()
    measured = measured_seconds(row)
    ratio = step.seconds / measured
    power = 1 if row.metric == "step_time_s" else -1
    kind = "step, mixture" if row.model.experts else "step, dense"
    covered = step.low <= measured <= step.high
    utilisation = _utilisation(row, measured)
    return Check(row, kind, row.value * ratio**power, ratio, covered, utilisation=utilisation)


def measured_seconds(row: Row) -> float:
    """Return the seconds of a step that follow from the row's measured figure.

    TFLOPS and utilisation are converted by the convention by which the source counts FLOPs: hardware FLOPs
    include recomputation; attention counts over the whole sequence on older chips (A100, V100, TPU), and over
    half of it on newer ones, unless the metric says otherwise.
    """
    tokens = row.batch * row.seq
    if row.metric == "step_time_s":
        return row.value
    if row.metric == "tokens_per_s_per_gpu":
        return tokens / row.value / row.chips
    if row.metric == "tokens_per_day_1e9":
        return tokens / (1e9 * row.value) * DAY
    recomputed = float(row.layout.recompute == "full")
    flops = cost.flops_per_token(row.model, row.seq, _convention(row), recomputed)
    if "tflops" in row.metric:
        rate = 1e12 * row.value
    else:
        rate = row.value / 100 * row.cluster.chip.rate("bf16")
    return flops * tokens / row.chips / rate


def _convention(row: Row) -> str:
    """Return the name in `cost.CONVENTIONS` of the convention by which the row's source counts FLOPs."""
    if row.metric.startswith(("hw_", "hfu")):
        return "hardware"
    if "_causal" in row.metric:
        return "causal"
    early = row.cluster.chip.generation in ("ampere", "tpu", "volta")
    return "non-causal" if "noncausal" in row.metric or early else "causal"


def _utilisation(row: Row, seconds: float) -> float:
    """Return the utilisation of a step of `seconds`: 6 FLOPs a parameter and token over the 16-bit peak."""
    flops = cost.flops_per_token(row.model, row.seq, "6n") * row.batch * row.seq
    return flops / seconds / row.chips / row.cluster.chip.rate("bf16")


# ------------------------------------------------------------ whole runs


def _check_hours(row: Row) -> Check:
    """Return the check of the chip-hours or days of a whole run.

    The forecast is a step at the published layout, or at the best one if none is published, times the number
    of steps, over the useful share of time.
    """
    practice = 1.0
    if row.complete and row.number("dp"):
        step = _plan(row).step()
        chips = row.chips
    else:
        step = best_effort(row)
        chips = step.chips
        practice = 1.0 if row["pp"] else constants().practice
    tokens = _tokens_of_run(row)
    if not tokens:
        return _unforeseen(row, "its tokens are not published")
    in_days = row.metric.startswith("days")
    is_running = in_days or "logged step time" in row.schedule
    share = practice * (1.0 if is_running else constants().goodput)
    hours = step.seconds / step.tokens * chips * tokens / 3600 / share
    value = hours / 24 / row.chips if in_days else hours
    ratio = value / row.value
    wide = step.high / step.seconds * WIDER
    return Check(row, "whole runs", value, ratio, 1 / wide <= ratio <= wide)


def _tokens_of_run(row: Row) -> float:
    """Return the tokens that the figure of a whole run is for; 0 if they are not published."""
    if row.metric == "gpu_hours":
        return row.number("tokens_total")
    return 1e12 if row.metric == "gpu_hours_per_1T_tokens" else 3e11


def best_effort(row: Row) -> Step:
    """Return a step of a run whose layout is not fully published.

    If only the data parallelism is unknown, the published tensor and pipeline parallelism is taken on about a
    thousand chips. Otherwise the best layout is taken, on the fewest chips tried that hold the model. Raises
    LimbeckError if no layout fits.
    """
    if row["tp"] and row["pp"]:
        return _step_with_unknown_dp(row)
    for count in (SMALL_CLUSTER, 4 * SMALL_CLUSTER):
        try:
            return _best_step(row, min(row.chips or count, count))
        except LimbeckError:
            continue
    return _best_step(row, 16 * SMALL_CLUSTER)


def _step_with_unknown_dp(row: Row) -> Step:
    """Return a step with the published tensor and pipeline parallelism, and an assumed data parallelism."""
    dp = row.integer("dp", LARGE_CLUSTER // (row.integer("tp") * row.integer("pp")))
    layout = row.layout.change(dp=dp)
    multiple = layout.dp * layout.micro
    batch = row.batch - row.batch % multiple or multiple
    chips = row.cluster if row.chips else row.cluster.across(layout.chips)
    return foresee(row.model, chips, layout, batch, row.seq, row.precision, row.software).step()


def _best_step(row: Row, count: int) -> Step:
    """Return a step with the best layout on `count` of the run's chips, with their share of the batch.

    Raises LimbeckError if no layout fits.
    """
    sequences = (row.number("global_batch_tokens") or SOME) / row.seq
    chips = max(row.chips or LARGE_CLUSTER, count)
    batch = max(1, round(sequences * count / chips))
    batch = max(count, batch - batch % count)
    cluster = row.cluster.across(count)
    choices = search.best(row.model, cluster, batch, row.seq, row.precision, row.software, top=1)
    return choices[0].step


# ------------------------------------------------------------ memory and phases


def _check_memory(row: Row) -> Check:
    """Return the check of the memory of the chip that needs the most, or of one part of it."""
    memory = row.memory
    if row.metric == "params_opt_mem_gib":
        size = memory.weights + memory.gradients + memory.optimizer
    elif row.metric == "activation_mem_gib":
        size = memory.activations
    else:
        size = memory.reserved
    unit = 2**30 if row.metric.endswith("gib") else 1e9
    ratio = size / unit / row.value
    kind = "memory by formula" if row.metric in FORMULA else "peak memory"
    return Check(row, kind, size / unit, ratio, abs(ratio - 1) < NEAR)


def _check_phase(row: Row) -> Check:
    """Return the check of one phase of DeepSeek-V3's step."""
    phase = row.metric.removeprefix("phase_").removesuffix("_s")
    seconds = phases(row)[phase]
    ratio = seconds / row.value
    return Check(row, "V3's phases", seconds, ratio, abs(ratio - 1) < NEAR)


def phases(row: Row) -> dict[str, float]:
    """Return the mean seconds that a chip of a DualPipe pipeline spends in each phase of a step.

    The phases are: a forward pass alone (1F), a backward pass alone for inputs (1B) and for weights (1W), a
    forward overlapped with a backward pass (1F1B), the optimizer with its exchanges (opt), and the bubble.
    The times are stretched, since all chips wait for the slowest.
    """
    plan = _plan(row)
    line = pipeline_schedules.simulate(row.layout.schedule, plan.times, row.layout.pp, plan.micro)
    stage_seconds = {"F": plan.times.forward, "B": plan.times.backward, "W": plan.times.weight}
    sums = dict.fromkeys(("1F", "1B", "1W", "1F1B"), 0.0)
    for slots in line.chips:
        for slot in slots:
            if len(slot.pieces) == 3:
                sums["1F1B"] += slot.end - slot.start
                continue
            for piece in slot.pieces:
                sums["1" + piece.kind] += stage_seconds[piece.kind][piece.stage]
    step = plan.step()
    slowed = step.seconds / (line.seconds + plan.data + plan.optimizer)
    seconds = {phase: slowed * total / len(line.chips) for phase, total in sums.items()}
    seconds["opt"] = slowed * (plan.optimizer + plan.data)
    seconds["bubble"] = step.seconds - sum(seconds.values())
    return seconds


# ------------------------------------------------------------ the table


def floors(results: list[Check]) -> dict[int, float]:
    """Return the relative error of the floor (see the top of this file) for each check of a step.

    The keys are the ids of the checks, `id(check)`.
    """
    groups: dict[tuple[str, str, str], list[Check]] = defaultdict(list)
    for result in results:
        if result.utilisation:
            groups[result.row.cluster.chip.name, result.row.precision, result.kind].append(result)
    errors: dict[int, float] = {}
    for group in groups.values():
        middle = median(result.utilisation for result in group)
        for result in group:
            errors[id(result)] = abs(result.utilisation / middle - 1)
    return errors


def percentile(errors: list[float], share: float) -> float:
    """Return the error that the share `share` of all errors does not exceed; 0 for an empty list.

    It is the percentile by nearest rank.
    """
    if not errors:
        return 0.0
    rank = ceil(len(errors) * share)
    return sorted(errors)[max(0, rank - 1)]


def summary(results: list[Check]) -> list[str]:
    """Return one line for each kind of check: median error, 95th percentile, goals, coverage and skill."""
    kinds: dict[str, list[Check]] = defaultdict(list)
    for result in results:
        kinds[result.kind].append(result)
    floor = floors(results)
    lines: list[str] = []
    for kind, group in sorted(kinds.items()):
        if kind == "not foreseen":
            lines.append(f"{kind:18} {len(group):4} rows")
        else:
            lines.append(_summary_line(kind, group, floor))
    return lines


def _summary_line(kind: str, group: list[Check], floor: Mapping[int, float]) -> str:
    """Return the summary of the checks of one kind.

    `floor` maps the id of a check to the relative error of the floor.
    """
    errors = [result.error for result in group]
    line = (
        f"{kind:18} {len(group):4} rows: error median {median(errors):.1%}, "
        f"95th percentile {percentile(errors, 0.95):.1%}"
    )
    if kind in GOALS:
        middle, high = GOALS[kind]
        line += f" (goal {middle:.0%} / {high:.0%})"
    covered = sum(result.covered for result in group)
    line += f", interval covers {covered / len(group):.0%}"
    plain = [floor[id(result)] for result in group if id(result) in floor]
    if plain and median(plain):
        skill = 1 - sum(errors) / sum(plain)
        line += (
            f", skill {skill:.2f} against a constant (median {median(plain):.1%}, "
            f"95th {percentile(plain, 0.95):.1%})"
        )
    return line


def table(path: Path = FILE) -> list[str]:
    """Return all lines of `limbeck plan verify`: the checks, their summary, Limbeck's own figures on one
    card, and public claims.

    `path` is a table of published runs.
    """
    results = list(checks(read(path)))
    head = f"{'run':46} {'figure':24} {'measured':>12} {'foreseen':>12} {'error':>7}"
    told = [head, *(result.tell() for result in results), "", *summary(results), ""]
    return [*told, *card_runs.lines(), "", *claims()]


# ------------------------------------------------------------ public claims


def claims() -> list[str]:
    """Return public claims, computed again with their assumptions, one for each line."""
    return [*_training_claims(), *_serving_claims(), *_bounds()]


def _training_claims() -> list[str]:
    """Return the claims on the cost of Hunyuan-Large, DeepSeek-V2 and DeepSeek-V3."""
    meta = 6 * 405e9 * 15.6e12
    hunyuan = 6 * 52e9 * 7e12
    own = 9.59 * 52e9 * 7e12 + 2.3e8 * 7e12
    million = 2788e3 * 2 / 1e6
    return [
        (
            f"Hunyuan-Large took 1/10 of Meta's compute: 6ND gives 1/{meta / hunyuan:.0f} "
            f"({hunyuan / meta:.1%}; "
            "52G x 7T against 405G x 15.6T); "
            f"its paper's own 9.59 ND + 2.3e8 D gives {own / meta:.1%} (arXiv 2411.02265, "
            "section 2.3.1; Llama still by 6ND)"
        ),
        (
            "DeepSeek-V2 costs 1/7 of Llama-3-70B: its makers' table of May 2024 has $0.14 against $3.78 "
            f"a million tokens read, 1/{3.78 / 0.14:.0f}; "
            f"1/7 needs a host at about $1 ($0.14 x 7 = ${0.14 * 7:.2f})"
        ),
        (
            "DeepSeek-V3 cost 5.576 million dollars: 2,788,000 H800-hours x $2 = "
            f"${million:.3f} million; research is not in it"
        ),
    ]


def _serving_claims() -> list[str]:
    """Return the claims on DeepSeek's day of serving, with the forecast of its nodes' speed.

    Source: open-infra-index, day 6. Cost and revenue of the day are computed from its published counts and
    prices.
    """
    day = Day()
    config = models.find("deepseek-v3")
    cluster = clusters.cluster("2048xH800")
    _, decode = Replica(config, cluster, 144, "fp8").at_speed(USER_SPEED, USER_CONTEXT)
    prefill = Replica(config, cluster, 32, "fp8").prefill(4096)
    input_rate, output_rate = production(prefill, decode, day.hits)
    prefill_nodes, decode_nodes = day.nodes_needed
    input_price, output_price = unit_cost(8 * day.chip_price, 100e3, 50e3)
    return [
        (
            f"DeepSeek's nodes wrote {day.output_rate:,.0f} tokens a second and read {day.input_rate:,.0f}: "
            f"foreseen at their users' {USER_SPEED} tokens a second {output_rate:,.0f} and {input_rate:,.0f}"
        ),
        (
            f"a day of it cost ${day.cost:,.0f} and would have sold for ${day.revenue:,.0f}, "
            f"{int(100 * day.margin)}% more; "
            f"its rates ask for {prefill_nodes:.1f} + {decode_nodes:.1f} nodes of {day.nodes}"
        ),
        (
            "one yuan ($0.14) a million tokens read: at V2's 100 thousand read and 50 thousand written "
            f"a second, a node of ${8 * day.chip_price:.0f} an hour "
            f"costs ${input_price:.3f} and ${output_price:.3f}"
        ),
    ]


def _bounds() -> list[str]:
    """Return claims on bounds of decoding and of choosing experts, and on the energy of LLaMA."""
    layer, token = decode_bound()
    return [
        (
            f"67 tokens a second at most over 50 GB/s: {1e6 * layer:.2f} us of all-to-all a layer, "
            f"{1e3 * token:.2f} ms a token, {1 / token:.1f} a second (arXiv 2505.09343, section 2.3.2)"
        ),
        (
            f"V3 could choose {free_experts():.1f} experts on four nodes at the network's price of four "
            "(arXiv 2412.19437, section 3.2.2)"
        ),
        f"LLaMA-65B took 449 MWh: {circular(449e3, 1_022_362, 400)}",
    ]
