"""How good the planner is: every published run with what is foreseen, the error, and the skill against a constant.

The floor foresees every run by one number: the median utilisation of its kind (chip, precision, dense or mixture) in
the same table, which flatters the floor. Skill is 1 - error / error of the floor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ..types import LimbeckError
from . import cluster as clusters
from . import cost, models, pipeline_schedules, search
from .collectives import decode_bound, free_experts
from .constants import constants
from .energy import circular
from .inference import Day, Replica, production, unit_cost
from .published import FILE, SOME, Row, read
from .step import Step, foresee

WIDER = 1.3  # the interval of a whole run against that of a step: goodput and what was trained beside it are not told
THOUSAND, FEW = 1024, 64  # chips on which a run whose layout is not told is laid out
GOALS = {  # median and 95th percentile of the relative error
    "step, dense": (0.06, 0.20), "step, mixture": (0.08, 0.25), "V3's phases": (0.20, 0.35), "whole runs": (0.15, 0.40),
    "peak memory": (0.06, 0.20), "memory by formula": (0.06, 0.20),
}  # fmt: skip
USERS, SEEN = (
    21,
    4989,
)  # tokens a second of a user of DeepSeek's service, and of his context on average (day 6)
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
    """One measurement beside what is foreseen. `ratio` is foreseen over measured time (or bytes); `covered` whether the
    interval holds it; `why` says what kept it from being foreseen."""

    row: Row
    kind: str
    foreseen: float = 0.0
    ratio: float = 0.0
    covered: bool = False
    why: str = ""
    utilisation: float = 0.0  # 6ND over the peak, measured

    @property
    def error(self) -> float:
        return abs(self.ratio - 1)

    def tell(self) -> str:
        name = f"{self.row.name[:46]:46} {self.row.metric[:24]:24} {self.row.value:>12.5g}"
        return (
            f"{name}  {self.why}"
            if self.why
            else f"{name} {self.foreseen:>12.5g} {self.ratio - 1:>+7.1%}{'' if self.covered else '  outside'}"
        )


def checks(rows: list[Row]) -> Iterator[Check]:
    """Every row; what cannot be foreseen says why and counts nowhere."""
    for row in rows:
        try:
            yield check(row)
        except LimbeckError as error:
            yield Check(row, "not foreseen", why=str(error)[:110])


def check(row: Row) -> Check:
    metric = row.metric
    if metric.startswith("phase_"):
        return _phase(row)
    if metric in MEMORY or metric in FORMULA:
        return _memory(row)
    if metric == "oom":
        fits = row.memory.fits
        return Check(row, "fits or not", float(not fits), 1.0 + float(fits), not fits)
    base = metric.removesuffix("_bf16peak").removesuffix("_noncausal").removesuffix("_causal")
    if metric in HOURS:
        return _hours(row)
    if base not in SECONDS:
        return Check(row, "not foreseen", why="the planner foresees no such figure")
    if not row.complete:
        return Check(row, "not foreseen", why="its layout is not published")
    step = foresee(row.model, row.cluster, row.layout, row.batch, row.seq, row.precision, row.software).step()
    measured = measured_seconds(row)
    kind = "step, mixture" if row.model.experts else "step, dense"
    return Check(
        row,
        kind,
        row.value * (step.seconds / measured) ** (1 if metric == "step_time_s" else -1),
        step.seconds / measured,
        step.low <= measured <= step.high,
        utilisation=_utilisation(row, measured),
    )


def measured_seconds(row: Row) -> float:
    """Seconds a step that a row's figure means. TFLOPS and utilisation are converted by the convention that its source
    uses: hardware FLOPs with what is recomputed; attention over the whole sequence on A100 and TPU; half of it since."""
    tokens, metric, value = row.batch * row.seq, row.metric, row.value
    if metric == "step_time_s":
        return value
    if metric == "tokens_per_s_per_gpu":
        return tokens / value / row.chips
    if metric == "tokens_per_day_1e9":
        return tokens / (1e9 * value) * 86400
    early = row.cluster.chip.generation in ("ampere", "tpu", "volta")
    hardware = metric.startswith(("hw_", "hfu"))
    causal = "_causal" in metric or not ("noncausal" in metric or hardware or early)
    flops = cost.flops_per_token(
        row.model,
        row.seq,
        "hardware" if hardware else "causal" if causal else "non-causal",
        float(row.layout.recompute == "full"),
    )
    rate = 1e12 * value if "tflops" in metric else value / 100 * row.cluster.chip.rate("bf16")
    return flops * tokens / row.chips / rate


def _utilisation(row: Row, seconds: float) -> float:
    return (
        cost.flops_per_token(row.model, row.seq, "6n")
        * row.batch
        * row.seq
        / seconds
        / row.chips
        / row.cluster.chip.rate("bf16")
    )


def _hours(row: Row) -> Check:
    """Chip-hours of a whole run: the time of a step, at the published layout or at the best one, over the goodput."""
    found = 1.0
    if row.complete and row.number("dp"):
        step, chips = (
            foresee(
                row.model, row.cluster, row.layout, row.batch, row.seq, row.precision, row.software
            ).step(),
            row.chips,
        )
    else:
        step = best_effort(row)
        chips, found = step.chips, constants().practice if not row["pp"] else 1.0
    tokens = {
        "gpu_hours": row.number("tokens_total"),
        "gpu_hours_per_1T_tokens": 1e12,
        "days_for_300B_tokens": 3e11,
    }[row.metric]
    if not tokens:
        return Check(row, "not foreseen", why="its tokens are not published")
    share = found * (
        1.0 if "logged step time" in row.told or row.metric.startswith("days") else constants().goodput
    )
    hours = step.seconds / step.tokens * chips * tokens / 3600 / share
    value = hours / 24 / row.chips if row.metric.startswith("days") else hours
    ratio = value / row.value
    wide = step.high / step.seconds * WIDER
    return Check(row, "whole runs", value, ratio, 1 / wide <= ratio <= wide)


def best_effort(row: Row) -> Step:
    """For a run whose layout is unpublished: the best layout on the fewest chips that hold the model. Where only the data
    parallelism is unknown: the published tensor and pipeline parallelism on about a thousand chips."""
    if row["tp"] and row["pp"]:
        at = row.layout.change(dp=row.integer("dp", THOUSAND // (row.integer("tp") * row.integer("pp"))))
        batch = row.batch - row.batch % (at.dp * at.micro) or at.dp * at.micro
        chips = row.cluster if row.chips else row.cluster.across(at.chips)
        return foresee(row.model, chips, at, batch, row.seq, row.precision, row.software).step()
    for count in (FEW, 4 * FEW):
        try:
            return _best(row, min(row.chips or count, count))
        except LimbeckError:
            continue
    return _best(row, 16 * FEW)


def _best(row: Row, count: int) -> Step:
    batch = max(
        1,
        round((row.number("global_batch_tokens") or SOME) / row.seq * count / max(row.chips or 1024, count)),
    )
    batch = max(count, batch - batch % count)
    software = row.software
    return search.best(row.model, row.cluster.across(count), batch, row.seq, row.precision, software, top=1)[
        0
    ].step


def _memory(row: Row) -> Check:
    held = row.memory
    unit = 2**30 if row.metric.endswith("gib") else 1e9
    size = held.reserved
    if row.metric == "params_opt_mem_gib":
        size = held.weights + held.gradients + held.optimizer
    if row.metric == "activation_mem_gib":
        size = held.activations
    ratio = size / unit / row.value
    return Check(
        row,
        "memory by formula" if row.metric in FORMULA else "peak memory",
        size / unit,
        ratio,
        abs(ratio - 1) < 0.2,
    )


def _phase(row: Row) -> Check:
    found = phases(row)
    key = row.metric.removeprefix("phase_").removesuffix("_s")
    ratio = found[key] / row.value
    return Check(row, "V3's phases", found[key], ratio, abs(ratio - 1) < 0.2)


def phases(row: Row) -> dict[str, float]:
    """Seconds that chips of a DualPipe spend, on average, in lone forward (1F), lone backward for inputs (1B) and for weights
    (1W), and paired passes (1F1B); in the optimiser with its exchanges; and waiting. All of it is slowed by the slowest."""
    seen = foresee(row.model, row.cluster, row.layout, row.batch, row.seq, row.precision, row.software)
    line = pipeline_schedules.simulate(row.layout.schedule, seen.times, row.layout.pp, seen.micro)
    sums = dict.fromkeys(("1F", "1B", "1W", "1F1B"), 0.0)
    for piece, took in ((slot.pieces, slot.end - slot.start) for slots in line.chips for slot in slots):
        if len(piece) == 3:
            sums["1F1B"] += took
            continue
        rows = {"F": seen.times.forward, "B": seen.times.backward, "W": seen.times.weight}
        for kind, _, stage, _ in piece:
            sums["1" + kind] += rows[kind][stage]
    step = seen.step()
    slowed = step.seconds / (line.seconds + seen.data + seen.optimizer)
    sums = {kind: slowed * total / len(line.chips) for kind, total in sums.items()}
    sums["opt"] = slowed * (seen.optimizer + seen.data)
    return {**sums, "bubble": step.seconds - sum(sums.values())}


# ------------------------------------------------------------ the table


def floors(found: list[Check]) -> dict[int, float]:
    """Error of foreseeing each step by the median utilisation of its kind; by the check's id."""
    kinds: dict[tuple[str, str, str], list[Check]] = defaultdict(list)
    for one in found:
        if one.utilisation:
            kinds[one.row.cluster.chip.name, one.row.precision, one.kind].append(one)
    middles = {kind: median(one.utilisation for one in group) for kind, group in kinds.items()}
    return {
        id(one): abs(one.utilisation / middles[kind] - 1) for kind, group in kinds.items() for one in group
    }


def percentile(errors: list[float], share: float) -> float:
    """Nearest rank."""
    ordered = sorted(errors)
    return ordered[max(0, -(-len(ordered) * share // 1).__int__() - 1)] if ordered else 0.0


def summary(found: list[Check]) -> list[str]:
    """One line a kind: median, 95th percentile, goals, skill, coverage."""
    kinds: dict[str, list[Check]] = defaultdict(list)
    for one in found:
        kinds[one.kind].append(one)
    floor, lines = floors(found), []
    for kind, group in sorted(kinds.items()):
        if kind == "not foreseen":
            lines.append(f"{kind:18} {len(group):4} rows")
            continue
        errors = [one.error for one in group]
        line = f"{kind:18} {len(group):4} rows: error median {median(errors):.1%}, 95th percentile {percentile(errors, 0.95):.1%}"
        if kind in GOALS:
            line += f" (goal {GOALS[kind][0]:.0%} / {GOALS[kind][1]:.0%})"
        line += f", interval covers {sum(one.covered for one in group) / len(group):.0%}"
        plain = [floor[id(one)] for one in group if id(one) in floor]
        if plain and median(plain):
            line += f", skill {1 - sum(errors) / sum(plain):.2f} against a constant (median {median(plain):.1%}, 95th {percentile(plain, 0.95):.1%})"
        lines.append(line)
    return lines


def table(path: Path = FILE) -> list[str]:
    """All lines of `limbeck plan verify`: rows, summary, claims."""
    found = list(checks(read(path)))
    head = f"{'run':46} {'figure':24} {'measured':>12} {'foreseen':>12} {'error':>7}"
    return [head, *(one.tell() for one in found), "", *summary(found), "", *claims()]


def claims() -> list[str]:
    """What is said in public, computed again with what it assumes."""
    meta, hunyuan = 6 * 405e9 * 15.6e12, 6 * 52e9 * 7e12
    own = 9.59 * 52e9 * 7e12 + 2.3e8 * 7e12
    tenth = (
        f"Hunyuan-Large took 1/10 of Meta's compute: 6ND gives 1/{meta / hunyuan:.0f} ({hunyuan / meta:.1%}; 52G x 7T against 405G x 15.6T); "
        f"its paper's own 9.59 ND + 2.3e8 D gives {own / meta:.1%} (arXiv 2411.02265, section 2.3.1; Llama still by 6ND)"
    )
    seventh = (
        f"DeepSeek-V2 costs 1/7 of Llama-3-70B: its makers' table of May 2024 has $0.14 against $3.78 a million tokens read, "
        f"1/{3.78 / 0.14:.0f}; 1/7 needs a host at about $1 ($0.14 x 7 = ${0.14 * 7:.2f})"
    )
    cost_of_v3 = f"DeepSeek-V3 cost 5.576 million dollars: 2,788,000 H800-hours x $2 = ${2788e3 * 2 / 1e6:.3f} million; research is not in it"
    return [tenth, seventh, cost_of_v3, *_served(), *_bounds()]


def _served() -> list[str]:
    """DeepSeek's day of serving (open-infra-index, day 6), to the dollar, and what the planner makes of its nodes."""
    day, config, cluster = Day(), models.find("deepseek-v3"), clusters.cluster("2048xH800")
    _, decode = Replica(config, cluster, 144, "fp8").at_speed(USERS, SEEN)
    into, out = production(Replica(config, cluster, 32, "fp8").prefill(4096), decode, day.hits)
    reading, writing = day.nodes_needed
    read_, written = unit_cost(8 * day.chip_price, 100e3, 50e3)
    return [
        f"DeepSeek's nodes wrote {day.output_rate:,.0f} tokens a second and read {day.input_rate:,.0f}: foreseen at their users' {USERS} tokens a second {out:,.0f} and {into:,.0f}",
        f"a day of it cost ${day.cost:,.0f} and would have sold for ${day.revenue:,.0f}, {int(100 * day.margin)}% more; its rates ask for {reading:.1f} + {writing:.1f} nodes of {day.nodes}",
        f"one yuan ($0.14) a million tokens read: at V2's 100 thousand read and 50 thousand written a second, a node of ${8 * day.chip_price:.0f} an hour costs ${read_:.3f} and ${written:.3f}",
    ]


def _bounds() -> list[str]:
    layer, token = decode_bound()
    return [
        f"67 tokens a second at most over 50 GB/s: {1e6 * layer:.2f} us of all-to-all a layer, {1e3 * token:.2f} ms a token, {1 / token:.1f} a second (arXiv 2505.09343, section 2.3.2)",
        f"V3 could choose {free_experts():.1f} experts on four nodes at the network's price of four (arXiv 2412.19437, section 3.2.2)",
        f"LLaMA-65B took 449 MWh: {circular(449e3, 1_022_362, 400)}",
    ]
