"""A whole run of a model on a cluster: the best layout, time with failures, chip-hours, energy and money.

Each figure has its interval. Settings that are not given are looked up in workloads.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..model.config import ModelConfig
from ..types import LimbeckError
from . import cost, energy, goodput, multi_site, prices, rl, search
from .cluster import Cluster
from .energy import Energy
from .goodput import Goodput
from .inference import Rate, Replica
from .prices import Rental

FILE = Path(__file__).with_name("workloads.yaml")
HOUR = 3600.0  # seconds
TEACHER_RATE = 14.8e3  # tokens a second that a node writes: DeepSeek's day 6
TEACHER_CHIPS = 8  # chips of that node
SPEED = 20.0  # tokens a second of one conversation, where no speed is given
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 144, 320)  # chips of a replica that are tried
PREFILL_CHIPS = 32  # chips of a prefill replica, at most
PROPERTIES = ("mfu", "tflops", "tokens_per_second", "chip_hours")


@dataclass(frozen=True)
class Range:
    """A figure with its interval: `Range(2.6e6, 2.3e6, 3.0e6)`."""

    middle: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        """The range times a factor."""
        return Range(self.middle * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Workload:
    """A training run's size: `Workload("train", 14.8e12, 15360, 4096, "fp8")`.

    `tokens` is all tokens, `batch` sequences a step, `seq` tokens a sequence. `teacher` has the rows of a
    distillation.
    """

    kind: str
    tokens: float = 0.0
    batch: int = 0
    seq: int = 0
    precision: str = "bf16"
    source: str = ""
    teacher: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bill:
    """The bill of a run. `seconds` includes failures.

    `money` and `power` are None where a price or a figure is not known; `unknown` has the reasons.
    """

    seconds: Range
    chips: int
    goodput: Goodput
    power: Energy | None
    money: Range | None
    rental: Rental | None
    unknown: tuple[str, ...] = ()

    @property
    def chip_hours(self) -> Range:
        """Chip-hours with their interval."""
        return self.seconds.times(self.chips / HOUR)


@dataclass(frozen=True)
class Training:
    """A training run: layouts (of each site), best first, steps, FLOPs, and the bill."""

    choices: tuple[search.Choice, ...]
    workload: Workload
    steps: float
    operations: float
    bill: Bill
    averaging: multi_site.Averaging | None = None


@dataclass(frozen=True)
class Distillation:
    """A teacher's rows: tokens, chip-hours of a service like DeepSeek's, and list price in dollars."""

    tokens: Range
    chip_hours: Range
    money: Range


@cache
def _workloads() -> dict[str, dict[str, Any]]:
    """The table of known workloads by model."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def workload(name: str, given: Mapping[str, Any]) -> Workload:
    """The known workload of a model, changed by the settings that are given.

    Raises LimbeckError where the number of tokens, the batch or the length of sequences is not known.
    """
    known = _workloads().get(name.strip().lower(), {})
    chosen = {key: value for key, value in given.items() if value is not None}
    settings = {**known, **chosen}
    kind = settings.get("kind", "train")
    if kind == "rl" and not given.get("tokens"):
        return Workload("rl", source=known["source"], precision=settings.get("precision", "fp8"))
    missing = [key for key in ("tokens", "batch", "seq") if not settings.get(key)]
    if missing:
        options = ", ".join(f"--{key}" for key in missing)
        raise LimbeckError(
            f"{name}: nobody has said how much it is to learn; give {options} (tokens in all, sequences a "
            "step, tokens each)"
        )
    return Workload(
        "train" if kind == "rl" else kind,
        float(settings["tokens"]),
        int(settings["batch"]),
        int(settings["seq"]),
        settings.get("precision", "bf16"),
        settings.get("source", "given"),
        settings.get("teacher", {}),
    )


def train(
    config: ModelConfig, cluster: Cluster, work: Workload, price: float | None = None, top: int = 5
) -> Training:
    """The `top` best layouts by search, and the bill of the best one for the whole workload."""
    averaging = None
    if cluster.fabric.sites > 1:
        choices, averaging = _apart(config, cluster, work, top)
    else:
        choices = search.best(config, cluster, work.batch, work.seq, work.precision, top=top)
    step = choices[0].step
    steps = work.tokens / (work.batch * work.seq)
    is_running = Range(step.seconds, step.low, step.high).times(steps)
    return Training(
        tuple(choices),
        work,
        steps,
        work.tokens * cost.flops_per_token(config, work.seq),
        bill(is_running, cluster, step.chips, price),
        averaging,
    )


def _apart(
    config: ModelConfig, cluster: Cluster, work: Workload, top: int
) -> tuple[list[search.Choice], multi_site.Averaging]:
    """The best layouts of one site with its share of each batch, and the averaging over sites."""
    site = multi_site.one_of(cluster)
    count = cluster.fabric.sites
    if work.batch % count:
        raise LimbeckError(
            f"{work.batch} sequences a step cannot be dealt evenly to {count} sites; change --batch or sites"
        )
    choices: list[search.Choice] = []
    averagings: list[multi_site.Averaging] = []
    for choice in search.best(config, site, work.batch // count, work.seq, work.precision, top=top):
        step, averaging = multi_site.averaged(choice.step, config, cluster)
        choices.append(replace(choice, step=step))
        averagings.append(averaging)
    return choices, averagings[0]


def bill(is_running: Range, cluster: Cluster, chips: int, price: float | None = None) -> Bill:
    """Failures, energy and money on top of the seconds at work."""
    share = goodput.goodput(chips)
    seconds = Range(is_running.middle / share.share, is_running.low / share.high, is_running.high / share.low)
    hours = seconds.times(chips / HOUR)
    unknown: list[str] = []
    power = money = rent = None
    try:
        power = _power(cluster, hours)
    except LimbeckError as error:
        unknown.append(f"energy: {error}")
    try:
        rent = prices.rental(cluster.chip.name, price)
        money = Range(hours.middle * rent.middle, hours.low * rent.low, hours.high * rent.high)
    except LimbeckError as error:
        unknown.append(f"money: {error}")
    return Bill(seconds, chips, share, power, money, rent, tuple(unknown))


def _power(cluster: Cluster, hours: Range) -> Energy:
    """The energy of a range of chip-hours. Raises LimbeckError where a chip's power is not known."""
    power = energy.spend(_kind(cluster.chip.name), cluster.chip.watts, hours.middle)
    low = power.low * hours.low / hours.middle
    high = power.high * hours.high / hours.middle
    return replace(power, low=low, high=high)


def _kind(chip: str) -> str:
    """The chip's name in energy.py's table."""
    return {"a100-pcie": "A100-PCIe", "a100": "A100", "a800": "A100", "v100": "V100"}.get(chip, chip)


def reinforce(config: ModelConfig, cluster: Cluster, price: float | None = None) -> tuple[rl.RLCost, Bill]:
    """The cost of R1-Zero's reinforcement learning with this model on this cluster, and the bill."""
    run = rl.r1_zero(config, cluster)
    plan = run.plan()
    return plan, bill(Range(plan.seconds, plan.low, plan.high), cluster, cluster.count, price)


def teach(work: Workload) -> Distillation:
    """The cost of a distillation's rows, by the rates and prices of DeepSeek's day."""
    teacher = work.teacher
    low, middle, high = (teacher["rows"] * teacher["tokens"] * samples for samples in teacher["samples"])
    tokens = Range(middle, low, high)
    chip_hours = tokens.times(TEACHER_CHIPS / TEACHER_RATE / HOUR)
    token_price = prices.tariff(teacher["model"]).output / 1e6
    return Distillation(tokens, chip_hours, tokens.times(token_price))


@dataclass(frozen=True)
class Service:
    """The serving of one copy: chips, conversations at once (`rows`), rates, dollars for a million tokens."""

    chips: int
    precision: str
    rows: float
    speed: float
    context: int
    decode: Rate
    prefill: Rate
    money: tuple[float, float] | None


def serve(
    config: ModelConfig,
    cluster: Cluster,
    context: int = 4096,
    price: float | None = None,
    speed: float = SPEED,
    chips: int = 0,
) -> Service:
    """The serving with the most tokens a second and chip at `speed`; `chips` fixes the chips of a copy."""
    precision = _precision(config, cluster)
    replica, rows, decode = _best_replica(config, cluster, precision, context, speed, chips)
    prefiller = replica
    if config.experts and replica.chips > PREFILL_CHIPS:
        prefiller = Replica(config, cluster, PREFILL_CHIPS, precision)
    prefill = prefiller.prefill(context)
    return Service(
        replica.chips,
        precision,
        rows * replica.chips,
        1 / decode.seconds,
        context,
        decode,
        prefill,
        _token_prices(cluster, price, prefill, decode),
    )


def _precision(config: ModelConfig, cluster: Cluster) -> str:
    """The precision of serving: FP8 for experts where the chips have it, else 16 bits."""
    figures = cluster.chip.figures
    if config.experts and "fp8" in figures:
        return "fp8"
    return "bf16" if "bf16" in figures else "fp16"


def _token_prices(
    cluster: Cluster, price: float | None, prefill: Rate, decode: Rate
) -> tuple[float, float] | None:
    """Dollars for a million input and output tokens; None where no price of the chips is known."""
    try:
        rent = prices.rental(cluster.chip.name, price).middle
    except LimbeckError:
        return None
    if not rent:
        return None
    return rent / HOUR / prefill.tokens * 1e6, rent / HOUR / decode.tokens * 1e6


def _best_replica(
    config: ModelConfig, cluster: Cluster, precision: str, context: int, speed: float, chips: int
) -> tuple[Replica, float, Rate]:
    """The replica with the most tokens a second and chip at that speed, its rows and rate.

    Raises LimbeckError if no replica holds the model or reaches the speed.
    """
    best: tuple[Replica, float, Rate] | None = None
    refused: LimbeckError | None = None
    for width in _widths(config, cluster, chips):
        try:
            replica = Replica(config, cluster, width, precision)
            rows, rate = replica.at_speed(speed, context)
        except LimbeckError as error:
            refused = refused or error
            continue
        if best is None or rate.tokens > best[2].tokens:
            best = (replica, rows, rate)
    if best is None:
        raise refused or LimbeckError(f"{cluster.name}: nothing to serve on")
    return best


def _widths(config: ModelConfig, cluster: Cluster, chips: int) -> list[int]:
    """Chips of a replica that are tried: `chips`, or up to the cluster; dense models stay inside a node."""
    widths = [chips] if chips else [width for width in WIDTHS if width <= cluster.count]
    if config.experts:
        return widths
    return [width for width in widths if width <= cluster.per_node]


def told(thing: Any) -> Any:
    """Dataclasses as plain values for JSON, with some of their properties."""
    if isinstance(thing, search.Choice):
        return {
            "layout": asdict(thing.layout),
            "layout_text": thing.layout.tell(),
            "step": told(thing.step),
            "memory": asdict(thing.memory),
        }
    if hasattr(thing, "__dataclass_fields__"):
        names = [*thing.__dataclass_fields__, *(name for name in PROPERTIES if hasattr(type(thing), name))]
        return {name: told(getattr(thing, name)) for name in names}
    if isinstance(thing, dict):
        return {key: told(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [told(value) for value in thing]
    return thing
