"""A whole run of a model on a cluster: the best layout, time with failures, chip-hours, energy and money.

Each figure has its interval. Settings that are not given are looked up in workloads.yaml. A replica is the
group of chips that serve one copy of a model.
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
    """An estimate between a low and a high bound: `Range(2.6e6, 2.3e6, 3.0e6)`."""

    middle: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        """Return the range with all three numbers multiplied by `factor`."""
        return Range(self.middle * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Workload:
    """The size of a training run: `Workload("train", 14.8e12, 15360, 4096, "fp8")`.

    `kind` is "train", "rl" or "distil". `tokens` is the tokens of the whole run, `batch` the sequences of a
    step, `seq` the tokens of a sequence. `teacher` describes the rows that a teacher writes for a
    distillation: the model, the number of rows, the tokens of a row, and the samples for a row (low, middle,
    high).
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
    """The bill of a run.

    `seconds` includes the time lost by failures. `power` (energy) or `money` (dollars) is None if a price or
    a figure that it needs is not known; `unknown` has the reasons.
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
        """Chip-hours of the run with their interval, the time lost by failures included."""
        return self.seconds.times(self.chips / HOUR)


@dataclass(frozen=True)
class Training:
    """The forecast of a training run.

    `choices` are the layouts, best first (on several sites, the layouts of each site). `steps` is the number
    of steps, `operations` the FLOPs of the run. `averaging` is None for a single site.
    """

    choices: tuple[search.Choice, ...]
    workload: Workload
    steps: float
    operations: float
    bill: Bill
    averaging: multi_site.Averaging | None = None


@dataclass(frozen=True)
class Distillation:
    """The cost of the rows that a teacher writes.

    `tokens` is the tokens of the rows, `chip_hours` the chip-hours of a service as fast as DeepSeek's, and
    `money` dollars by the teacher's price list.
    """

    tokens: Range
    chip_hours: Range
    money: Range


@cache
def _workloads() -> dict[str, dict[str, Any]]:
    """Return the table of known workloads, keyed by the model's name."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def workload(name: str, given: Mapping[str, Any]) -> Workload:
    """Return the known workload of the model `name`, changed by the settings in `given`.

    Settings that are None change nothing. Raises LimbeckError if the number of tokens, the batch size or the
    length of sequences is not known.
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
    """Search for the `top` best layouts, and make the bill of the whole run with the best one.

    `price` is dollars for an hour of a chip, by default that of prices.yaml. Raises LimbeckError if no layout
    fits, or if the sequences of a step do not divide evenly over the sites.
    """
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
    """Return the best layouts of one site of several, and the averaging of weights between the sites.

    Each site gets an equal share of every batch. Raises LimbeckError if the batch does not divide evenly over
    the sites.
    """
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
    """Return the bill of a run on `chips` chips.

    `is_running` is the seconds of the run without failures; the time lost by failures, energy and money are
    added. `price` is dollars for an hour of a chip, by default that of prices.yaml.
    """
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
    """Return the energy of a range of chip-hours. Raises LimbeckError if the chip's power is not known."""
    power = energy.spend(_kind(cluster.chip.name), cluster.chip.watts, hours.middle)
    low = power.low * hours.low / hours.middle
    high = power.high * hours.high / hours.middle
    return replace(power, low=low, high=high)


def _kind(chip: str) -> str:
    """Return the name that the chip has in the table POWER of energy.py."""
    return {"a100-pcie": "A100-PCIe", "a100": "A100", "a800": "A100", "v100": "V100"}.get(chip, chip)


def reinforce(config: ModelConfig, cluster: Cluster, price: float | None = None) -> tuple[rl.RLCost, Bill]:
    """Return the cost and the bill of R1-Zero's reinforcement learning with this model on this cluster.

    `price` is dollars for an hour of a chip, by default that of prices.yaml.
    """
    run = rl.r1_zero(config, cluster)
    plan = run.plan()
    return plan, bill(Range(plan.seconds, plan.low, plan.high), cluster, cluster.count, price)


def teach(work: Workload) -> Distillation:
    """Return the cost of the rows of a distillation, by the rates and prices of DeepSeek's day of serving."""
    teacher = work.teacher
    low, middle, high = (teacher["rows"] * teacher["tokens"] * samples for samples in teacher["samples"])
    tokens = Range(middle, low, high)
    chip_hours = tokens.times(TEACHER_CHIPS / TEACHER_RATE / HOUR)
    token_price = prices.tariff(teacher["model"]).output / 1e6
    return Distillation(tokens, chip_hours, tokens.times(token_price))


@dataclass(frozen=True)
class Service:
    """The serving of one copy of a model.

    `rows` is the conversations at once, `speed` the tokens a second of each, `context` their length in
    tokens, and `money` the dollars for a million input tokens and for a million output tokens (None if
    unknown).
    """

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
    """Return the way of serving with the most tokens a second for each chip.

    Each conversation gets at least `speed` tokens a second at `context` tokens of context. `chips` fixes the
    number of chips of a replica; 0 tries several. `price` is dollars for an hour of a chip. Raises
    LimbeckError if no replica holds the model or reaches the speed.
    """
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
    """Return the precision of serving: FP8 for models with experts if the chips have it, else 16 bits."""
    figures = cluster.chip.figures
    if config.experts and "fp8" in figures:
        return "fp8"
    return "bf16" if "bf16" in figures else "fp16"


def _token_prices(
    cluster: Cluster, price: float | None, prefill: Rate, decode: Rate
) -> tuple[float, float] | None:
    """Return the dollars for a million input tokens and for a million output tokens.

    The result is None if no price of the chips is known.
    """
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
    """Return the replica with the most tokens a second for each chip, its rows a chip and its rate.

    A row is one conversation that gets at least `speed` tokens a second. Raises LimbeckError if no replica
    holds the model or reaches the speed.
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
    """Return the numbers of chips of a replica to try.

    It is `chips` if that is not 0, otherwise all of WIDTHS that the cluster has. Replicas of dense models
    stay inside a node.
    """
    widths = [chips] if chips else [width for width in WIDTHS if width <= cluster.count]
    if config.experts:
        return widths
    return [width for width in widths if width <= cluster.per_node]


def told(thing: Any) -> Any:
    """Return `thing` as plain values for JSON.

    Dataclasses become dicts of their fields and of the properties named in PROPERTIES; dicts and lists are
    converted item by item.
    """
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
