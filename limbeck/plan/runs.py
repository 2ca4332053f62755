"""A whole run of a model on a cluster: the best layout, time with what failures take, chip-hours, energy, money; each with
its interval. What is not said is looked up in workloads.yaml, or asked for."""

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
HOUR, DAY = 3600.0, 86400.0
TEACHER = (14.8e3, 8)  # tokens a second that a node writes, and its chips: DeepSeek's day 6
SPEED = 20.0  # tokens a second that a reader is given, where nothing else is said


@dataclass(frozen=True)
class Range:
    """A figure with its interval: `Range(2.6e6, 2.3e6, 3.0e6)`."""

    middle: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        return Range(self.middle * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Workload:
    """What is to be trained: `Workload("train", 14.8e12, 15360, 4096, "fp8")`: tokens in all, sequences a step, tokens each."""

    kind: str
    tokens: float = 0.0
    batch: int = 0
    seq: int = 0
    precision: str = "bf16"
    source: str = ""
    teacher: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bill:
    """What a run takes. `seconds` has failures in it; `money` and `power` are None where a price or a figure is not known."""

    seconds: Range
    chips: int
    goodput: Goodput
    power: Energy | None
    money: Range | None
    rental: Rental | None
    unknown: tuple[str, ...] = ()

    @property
    def chip_hours(self) -> Range:
        return self.seconds.times(self.chips / HOUR)


@dataclass(frozen=True)
class Training:
    """A training run: the layouts found (of each site, where there are several), best first, steps, FLOPs in all, and the bill."""

    choices: tuple[search.Choice, ...]
    workload: Workload
    steps: float
    operations: float
    bill: Bill
    averaging: multi_site.Averaging | None = None


@dataclass(frozen=True)
class Distillation:
    """What a teacher's rows cost: its tokens, the chip-hours of a service like DeepSeek's, and their list price in dollars."""

    tokens: Range
    chip_hours: Range
    money: Range


@cache
def _workloads() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def workload(name: str, given: Mapping[str, Any]) -> Workload:
    """What the table knows of a model's run, changed by what was given."""
    known = dict(_workloads().get(name.strip().lower(), {}))
    told = {**known, **{key: value for key, value in given.items() if value is not None}}
    if told.get("kind") == "rl" and not given.get("tokens"):
        return Workload("rl", source=known["source"], precision=told.get("precision", "fp8"))
    missing = [key for key in ("tokens", "batch", "seq") if not told.get(key)]
    if missing:
        options = ", ".join(f"--{key}" for key in missing)
        raise LimbeckError(
            f"{name}: nobody has said how much it is to learn; give {options} (tokens in all, sequences a step, tokens each)"
        )
    kind = "train" if told.get("kind", "train") == "rl" else told.get("kind", "train")
    return Workload(
        kind,
        float(told["tokens"]),
        int(told["batch"]),
        int(told["seq"]),
        told.get("precision", "bf16"),
        told.get("source", "given"),
        told.get("teacher", {}),
    )


def train(
    config: ModelConfig, cluster: Cluster, work: Workload, price: float | None = None, top: int = 5
) -> Training:
    """The best layouts by search, and what the best one takes for the whole workload."""
    averaging = None
    if cluster.fabric.sites > 1:
        choices, averaging = _apart(config, cluster, work, top)
    else:
        choices = search.best(config, cluster, work.batch, work.seq, work.precision, top=top)
    step = choices[0].step
    steps = work.tokens / (work.batch * work.seq)
    at_work = Range(step.seconds, step.low, step.high).times(steps)
    operations = work.tokens * cost.flops_per_token(config, work.seq)
    return Training(
        tuple(choices), work, steps, operations, bill(at_work, cluster, step.chips, price), averaging
    )


def _apart(
    config: ModelConfig, cluster: Cluster, work: Workload, top: int
) -> tuple[list[search.Choice], multi_site.Averaging]:
    """The best layouts of one site with its part of each batch, and what joining the sites takes."""
    site, count = multi_site.one_of(cluster), cluster.fabric.sites
    if work.batch % count:
        raise LimbeckError(
            f"{work.batch} sequences a step cannot be dealt evenly to {count} sites; change --batch or sites"
        )
    found = search.best(config, site, work.batch // count, work.seq, work.precision, top=top)
    joined = [(choice, *multi_site.averaged(choice.step, config, cluster)) for choice in found]
    return [replace(choice, step=step) for choice, step, _ in joined], joined[0][2]


def bill(at_work: Range, cluster: Cluster, chips: int, price: float | None = None) -> Bill:
    """Failures, energy and money on top of the seconds at work."""
    share = goodput.goodput(chips)
    seconds = Range(at_work.middle / share.share, at_work.low / share.high, at_work.high / share.low)
    hours, unknown = seconds.times(chips / HOUR), []
    power = money = rent = None
    try:
        whole = energy.spend(_kind(cluster.chip.name), cluster.chip.watts, hours.middle)
        power = replace(
            whole, low=whole.low * hours.low / hours.middle, high=whole.high * hours.high / hours.middle
        )
    except LimbeckError as error:
        unknown.append(f"energy: {error}")
    try:
        rent = prices.rental(cluster.chip.name, price)
        money = Range(hours.middle * rent.middle, hours.low * rent.low, hours.high * rent.high)
    except LimbeckError as error:
        unknown.append(f"money: {error}")
    return Bill(seconds, chips, share, power, money, rent, tuple(unknown))


def _kind(chip: str) -> str:
    """As energy.py's table has it."""
    return {"a100-pcie": "A100-PCIe", "a100": "A100", "a800": "A100", "v100": "V100"}.get(chip, chip)


def reinforce(config: ModelConfig, cluster: Cluster, price: float | None = None) -> tuple[rl.RLCost, Bill]:
    """R1-Zero's reinforcement learning, with this model on this cluster."""
    run = rl.r1_zero(config, cluster)
    plan = run.plan()
    return plan, bill(Range(plan.seconds, plan.low, plan.high), cluster, cluster.count, price)


def teach(work: Workload) -> Distillation:
    """What the rows of a distillation cost whoever wrote them, by the rates and prices of DeepSeek's day."""
    told = work.teacher
    low, middle, high = (told["rows"] * told["tokens"] * samples for samples in told["samples"])
    rate, chips = TEACHER
    tokens = Range(middle, low, high)
    return Distillation(
        tokens, tokens.times(chips / rate / HOUR), tokens.times(prices.tariff(told["model"]).output / 1e6)
    )


@dataclass(frozen=True)
class Service:
    """How one copy is served: on how many chips, conversations at once, and rates; dollars for a million tokens."""

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
    """On the fewest chips that hold the weights and a few conversations; V3's kind on its wide groups where there are so many."""
    precision = (
        "fp8"
        if "fp8" in cluster.chip.figures and config.experts
        else "bf16"
        if "bf16" in cluster.chip.figures
        else "fp16"
    )
    unit, rows, decode = _replica(config, cluster, precision, context, speed, chips)
    prompt = (
        Replica(config, cluster, min(unit.chips, 32), precision)
        if config.experts and unit.chips > 32
        else unit
    )
    prefill = prompt.prefill(context)
    try:
        rent = prices.rental(cluster.chip.name, price).middle
    except LimbeckError:
        rent = 0.0
    money = tuple(rent / HOUR / rate * 1e6 for rate in (prefill.tokens, decode.tokens)) if rent else None
    return Service(
        unit.chips, precision, rows * unit.chips, 1 / decode.seconds, context, decode, prefill, money
    )


def _replica(
    config: ModelConfig, cluster: Cluster, precision: str, context: int, speed: float, chips: int
) -> tuple[Replica, float, Rate]:
    """The width with the most tokens a second and chip at that speed; at the highest speed that there is where none reaches it."""
    widths = [chips] if chips else [n for n in (1, 2, 4, 8, 16, 32, 64, 144, 320) if n <= cluster.count]
    found, refused = [], None
    for width in widths:
        if not config.experts and width > cluster.per_node:
            break
        try:
            unit = Replica(config, cluster, width, precision)
            rows, rate = unit.at_speed(speed, context)
            found.append((rate.tokens, unit, rows, rate))
        except LimbeckError as error:
            refused = refused or error
    if not found:
        raise refused or LimbeckError(f"{cluster.name}: nothing to serve on")
    _, unit, rows, rate = max(found, key=lambda one: one[0])
    return unit, rows, rate


def told(thing: Any) -> Any:
    """Dataclasses as plain values, for JSON."""
    if isinstance(thing, search.Choice):
        return {
            "layout": asdict(thing.layout),
            "layout_text": thing.layout.tell(),
            "step": told(thing.step),
            "memory": asdict(thing.memory),
        }
    if hasattr(thing, "__dataclass_fields__"):
        more = {
            key: told(getattr(thing, key))
            for key in ("mfu", "tflops", "tokens_per_second", "chip_hours")
            if hasattr(type(thing), key)
        }
        return {key: told(getattr(thing, key)) for key in thing.__dataclass_fields__} | more
    if isinstance(thing, dict):
        return {key: told(value) for key, value in thing.items()}
    return [told(one) for one in thing] if isinstance(thing, list | tuple) else thing
