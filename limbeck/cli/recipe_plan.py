"""The plan of a recipe: state and forecast of each stage, on this machine or on a cluster.

A graph holds the recipe's stages; a stage is done if it has an artifact (the folder with its results). A
forecast is a stage's estimated time with its interval, its parts and FLOPs. A walk is the estimated amount of
work of all stages.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card_plan import add_fits, money, rental_of
from .options import STATES, usage_error
from .plan_text import Answer, Conditions, add_deadline, changes_text, duration

if TYPE_CHECKING:
    from ..config.parts import SuiteOptions
    from ..config.recipe import Load, Recipe
    from ..model.config import ModelConfig
    from ..pipeline.graph import Graph, Node
    from ..plan.cluster import Cluster
    from ..plan.fit import Fit
    from ..plan.forecast import Forecast
    from ..plan.machine_rates import Rates
    from ..plan.stage_work import Benchmark, Walk

HERE = "this machine"
WORKER_START = 3.0  # seconds until a worker has imported torch
CHARACTERS = 4  # characters of a token of a benchmark's prompt
LETTERED = 4  # number of options of a benchmark whose letters are ranked


@dataclass(frozen=True)
class Forecasts:
    """The forecast of each stage by the stage's name, and the machine or cluster that it is for.

    `stages` is empty if every stage is done or nothing can be foreseen. `fits` says of each stage that is not
    done whether it fits, if `where` is a single card; a stage that nothing makes fit has no forecast.
    """

    stages: dict[str, Forecast]
    where: str = HERE
    fits: dict[str, Fit] = field(default_factory=dict)

    @property
    def missing(self) -> set[str]:
        """The stages that do not fit whatever their settings."""
        return self.fits.keys() - self.stages.keys()

    def left(self, graph: Graph) -> dict[str, Forecast]:
        """Return the forecasts of the stages that are not done."""
        return {name: stage for name, stage in self.stages.items() if not graph.nodes[name].artifact}

    def total(self, graph: Graph) -> tuple[float, float, float]:
        """Return the wall time in seconds of the stages that are not done, and the lower and upper end of its
        interval.

        The stages' errors have the same cause, the measured rates of one machine, so their intervals are
        added up.
        """
        from ..plan.forecast import wall

        left = self.left(graph)
        workers = 1
        start = 0.0
        if self.where == HERE:
            workers = graph.recipe.workers
            start = WORKER_START * bool(left)
        return tuple(wall(left, workers, start, key) for key in ("seconds", "low", "high"))


# ---------------------------------------------------------------- forecasts


def cached_forecast(graph: Graph) -> dict[str, Any] | None:
    """Return the forecast that is stored with a run, as JSON data. Return None if the rates of this machine
    are not measured yet or the forecast fails.

    The rates are not measured here: a run shall neither wait for that nor fail because of it.
    """
    from datetime import date

    from ..types import LimbeckError

    try:
        forecasts = forecast_here(graph, measure=False)
    except LimbeckError:
        return None
    if not forecasts.stages:
        return None
    stages = {name: forecast.told() for name, forecast in forecasts.stages.items()}
    return {"schema": 1, "made": str(date.today()), "on": HERE, "stages": stages}


def forecast_here(graph: Graph, measure: bool = True) -> Forecasts:
    """Return the forecast of each stage on this machine.

    If this machine's rates are not known yet they are measured, which takes seconds; with `measure` False the
    forecast is empty instead.
    """
    from ..plan import forecast

    if _is_done(graph):
        return Forecasts({})
    configs = model_configs(graph)
    walk = _walk(graph, configs)
    rates = _machine_rates(graph.recipe, walk, configs, measure)
    if rates is None:
        return Forecasts({})
    return Forecasts({name: forecast.price(work, configs, rates) for name, work in walk.efforts.items()})


def forecast_on(graph: Graph, on: str, changes: dict[str, str]) -> Forecasts:
    """Return the forecast of each stage on the cluster `on`, with the properties in `changes` replaced."""
    from ..plan import cluster as clusters
    from ..plan import forecast

    if _is_done(graph):
        return Forecasts({})
    configs = model_configs(graph)
    walk = _walk(graph, configs)
    cluster = clusters.cluster(on, **changes)
    fits = _fits(graph, walk, configs, cluster)
    stages = {}
    for name, work in walk.efforts.items():
        fit = fits.get(name)
        if fit is None:
            stages[name] = forecast.price_on(work, configs, cluster)
        elif fit.fits or fit.relieved:
            stages[name] = forecast.price_on(fit.work(work), configs, cluster, fit.rows_at_once)
    return Forecasts(stages, cluster.tell(), fits)


def _fits(graph: Graph, walk: Walk, configs: dict[str, ModelConfig], cluster: Cluster) -> dict[str, Fit]:
    """Return whether each stage that is not done fits the card; empty for more than one card, and for chips
    whose memory is not known."""
    from ..plan.fit import foresee

    fits: dict[str, Fit] = {}
    if cluster.count > 1 or "memory" not in cluster.chip.figures:
        return fits
    for node in graph.nodes.values():
        if node.artifact:
            continue
        fit = foresee(node.stage, walk.efforts[node.name], configs, graph.recipe, cluster.chip)
        if fit:
            fits[node.name] = fit
    return fits


def _is_done(graph: Graph) -> bool:
    """Return True if every stage has its artifact."""
    return all(node.artifact for node in graph.nodes.values())


def _walk(graph: Graph, configs: dict[str, ModelConfig]) -> Walk:
    """Return the estimated amount of work of each stage of the graph, for a stage that continues a shorter
    one that of its later steps.

    `configs` holds the stages' model configurations.
    """
    from ..plan.stage_work import Walk

    walk = Walk(graph.recipe, configs, benchmarks_of(graph.recipe))
    for node in graph.nodes.values():
        walk.add(node.name, node.stage, node.inputs, node.control)
    for node in graph.nodes.values():
        shorter = graph.shorter(node)
        if shorter and not shorter.obstacle:
            walk.efforts[node.name] = walk.efforts[node.name].rest(shorter.share)
    return walk


def benchmarks_of(recipe: Recipe) -> dict[str, list[Benchmark]]:
    """Return the named benchmarks of each evaluate stage as the plan counts them, by the stage's name."""
    from ..config.recipe import Evaluate

    stages = {name: stage for name, stage in recipe.stages.items() if isinstance(stage, Evaluate)}
    return {
        name: [_benchmark(suite, options) for suite, options in (stage.suites or {}).items()]
        for name, stage in stages.items()
    }


def _benchmark(name: str, options: SuiteOptions) -> Benchmark:
    """Return a named benchmark with the user's options: its published size and its protocol's sampling. The
    prompt's tokens are a guess from the length of its template and the number of its examples."""
    from ..eval.suites.catalogue import find_protocol, find_suite
    from ..plan.stage_work import PROMPT, Benchmark

    suite = find_suite(name)
    protocol = find_protocol(suite, options.protocol)
    items = min(options.items or suite.size, suite.size)
    examples = protocol.prompt.shots.count if protocol.prompt.shots else 0
    prompt = (1 + examples) * (PROMPT + len(protocol.prompt.template) / CHARACTERS)
    sampling = protocol.sampling
    if sampling is None:
        return Benchmark(items, 0, 0, prompt, len(protocol.options) or LETTERED)
    samples = options.samples or sampling.samples
    return Benchmark(items, samples, options.max_new_tokens or sampling.max_new_tokens, prompt)


def _machine_rates(
    recipe: Recipe, walk: Walk, configs: dict[str, ModelConfig], measure: bool
) -> Rates | None:
    """Return this machine's measured speed for the kinds of work in `walk`.

    With `measure`, rates that are not known yet are measured; without, None is returned if any is missing.
    """
    from .. import __version__
    from ..config.recipe import Pretrain
    from ..plan import forecast, machine_rates
    from ..runtime.machine import usable_cores

    worlds = {}
    for stage in recipe.stages.values():
        if isinstance(stage, Pretrain):
            worlds[stage.problems] = recipe.problems[stage.problems].model_dump()
    threads = recipe.threads or max(1, int(usable_cores()) // recipe.workers)
    wanted = forecast.asked_of(walk.efforts.values(), configs)
    return machine_rates.measure(wanted, worlds, threads, recipe.workers, __version__, measure)


def model_configs(graph: Graph) -> dict[str, ModelConfig]:
    """Return the configuration of the model that each stage makes or evaluates, by the stage's name.

    Stages without a model are left out.
    """
    configs: dict[str, ModelConfig] = {}
    for node in graph.nodes.values():
        config = _model_config(node, graph.recipe, configs)
        if config is not None:
            configs[node.name] = config
    return configs


def _model_config(node: Node, recipe: Recipe, configs: dict[str, ModelConfig]) -> ModelConfig | None:
    """Return the configuration of a stage's model, or None if the stage has none.

    It is read from the stage's artifact, its settings, or (from `configs`) the stage whose model it begins
    with.
    """
    from ..config.recipe import Load, Pretrain
    from ..model.config import ModelConfig
    from ..model.from_recipe import to_config
    from ..tasks.registry import open_task

    stage = node.stage
    if node.artifact and (node.artifact.folder / "model" / "config.json").exists():
        return ModelConfig.from_directory(node.artifact.folder / "model")
    if isinstance(stage, Pretrain):
        task = open_task(stage.problems, recipe.problems[stage.problems])
        return to_config(stage.shape, task.tokenizer().size)
    if isinstance(stage, Load):
        return _config_of_load(stage)
    initial = node.inputs[0] if node.kind == "evaluate" else getattr(stage, "model", "")
    return configs.get(initial)


def _config_of_load(stage: Load) -> ModelConfig:
    """Return the configuration of the model directory that a load stage reads, or of a model of that name in
    the plan's table, with the number of layers that the stage keeps.

    Raises a usage error for a GGUF file, LimbeckError for a model that is neither here nor in the table.
    """
    from dataclasses import replace

    from ..model.config import ModelConfig
    from ..model.find import find_model
    from ..plan.models import published

    path = Path(stage.path)
    if path.is_file():
        raise usage_error(
            f"{path}: how long a model from a GGUF file takes is foreseen once it is loaded; "
            "run that stage first, or name a model directory"
        )
    known = None if path.exists() else published(stage.path)
    config = known or ModelConfig.from_directory(find_model(stage.path, Path()))
    return replace(config, layers=stage.depth) if stage.depth else config


# ---------------------------------------------------------------- text


def plan_recipe(graph: Graph, conditions: Conditions) -> Answer:
    """Return the plan of a recipe, as lines for people and data for programs.

    Each licence that a run would violate is printed on standard error.
    """
    from ..pipeline.provenance.propagate import trace
    from ..types import LimbeckError

    answer = Answer()
    forecasts = Forecasts({})
    changed = Forecasts({})
    problem = ""
    try:
        if conditions.on:
            forecasts = forecast_on(graph, conditions.on, {})
        else:
            forecasts = forecast_here(graph)
        if conditions.changes:
            changed = forecast_on(graph, conditions.on, conditions.changes)
    except LimbeckError as error:
        if conditions.on:
            raise
        problem = str(error)
    if graph.absent:
        answer.data["absent"] = graph.absent
        for sentence in graph.absent:
            answer.say("not here", sentence)
    rental, count = rental_of(conditions)
    _add_stages(answer, graph, forecasts, changed, rental and count * rental.middle)
    add_fits(answer, forecasts.fits)
    _add_totals(answer, graph, forecasts, conditions)
    if problem:
        answer.data["unforeseen"] = problem
        answer.say("not foreseen", problem)
    if changed.stages:
        _add_changes(answer, graph, changed, conditions.changes)
    for breach in trace(graph)[1]:
        print(f"limbeck: a run would refuse this: {breach.sentence}", file=sys.stderr)
    return answer


def _add_stages(
    answer: Answer, graph: Graph, forecasts: Forecasts, changed: Forecasts, hour: float | None = None
) -> None:
    """Add a line for each stage: its state, its time, its money, and why it has to run.

    If `changed` (the forecasts with the changes of `--what-if`) is not empty, the line also has the time with
    the changes. `hour` is the dollars of an hour, None if they are not known.
    """
    rows = []
    for node in graph.nodes.values():
        reasons = [] if node.artifact else graph.why(node)
        dollars = _stage_dollars(node, forecasts, hour)
        line = f"{STATES[node.state]:10} {node.name:32} {node.kind:9} {_stage_time(node, forecasts)}  "
        if hour:
            line += f"{'' if dollars is None else f'${dollars:,.2f}':>7}  "
        if changed.stages:
            line += f"{_stage_time(node, changed)}  "
        shorter = graph.shorter(node)
        line += "; ".join([*reasons[:3], *([shorter.sentence] if shorter else [])])
        answer.lines.append(line.rstrip())
        row = {
            "stage": node.name,
            "kind": node.kind,
            "state": node.state,
            "key": node.key and node.key[:16],
            "why": reasons,
        }
        if shorter:
            row["shorter"] = shorter.told()
        if node.name in forecasts.stages:
            row["forecast"] = forecasts.stages[node.name].told()
        if dollars is not None:
            row["money"] = round(dollars, 4)
        if node.name in forecasts.fits:
            row["memory"] = forecasts.fits[node.name].told()
        rows.append(row)
    answer.data["data"] = rows


def _stage_dollars(node: Node, forecasts: Forecasts, hour: float | None) -> float | None:
    """Return the dollars of a stage at so many an hour; None if it is done, or if either is not known."""
    forecast = forecasts.stages.get(node.name)
    if forecast is None or node.artifact or hour is None:
        return None
    return hour * forecast.seconds / 3600


def _stage_time(node: Node, forecasts: Forecasts) -> str:
    """Return the forecast time of a stage as text nine characters wide; blanks if the stage is done or has no
    forecast.
    """
    forecast = forecasts.stages.get(node.name)
    if forecast is None or node.artifact:
        return " " * 9
    return f"{duration(forecast.seconds):>9}"


def _add_totals(answer: Answer, graph: Graph, forecasts: Forecasts, conditions: Conditions) -> None:
    """Add what all stages that are not done take together: time, shares of the kinds of work, FLOPs, people's
    time, money, and the deadline.
    """
    if forecasts.missing:
        answer.data["not_foreseen"] = sorted(forecasts.missing)
        answer.say("not in it", f"{', '.join(sorted(forecasts.missing))}, which cannot run on this card")
    if not forecasts.stages:
        answer.data["seconds"] = 0.0
        return
    left = forecasts.left(graph).values()
    seconds, low, high = forecasts.total(graph)
    where = forecasts.where
    answer.data |= {"on": where, "seconds": round(seconds, 1), "low": round(low, 1), "high": round(high, 1)}
    answer.say("in all", f"{duration(seconds)} ({duration(low)} to {duration(high)}) on {where}")
    answer.say("of which", ", ".join(_shares(left)))
    answer.say("operations", f"{sum(forecast.flops for forecast in left):.3g}")
    _add_people(answer, sum(forecast.people for forecast in left))
    _add_money(answer, (seconds, low, high), conditions)
    if conditions.until:
        add_deadline(answer, seconds, conditions.until)


def _add_money(answer: Answer, times: tuple[float, float, float], conditions: Conditions) -> None:
    """Add the dollars of three times in seconds (middle, low, high), if the price of an hour is known."""
    rental, count = rental_of(conditions)
    spent = money(rental, count, times)
    if spent is None:
        if conditions.on:
            answer.say("money", "no price of an hour is known here; say one with --price")
        return
    answer.data["money"] = spent["middle"]
    answer.data["rental"] = {key: spent[key] for key in ("low", "high", "an_hour", "date", "source")}
    low, high = spent["an_hour"]
    price = f"${low:g} an hour" if low == high else f"${low:g} to ${high:g} an hour"
    price += f" of a chip ({spent['date']}, {spent['source']})" if spent["date"] else ""
    answer.say("money", f"${spent['middle']:,.2f} (${spent['low']:,.2f} to ${spent['high']:,.2f}) at {price}")


def _add_people(answer: Answer, rows: int) -> None:
    """Add the time that people need to review `rows` rows; nothing if there are none."""
    from ..plan.forecast import DESK_SECONDS

    if rows:
        time = duration(rows * DESK_SECONDS)
        answer.say("people", f"{rows} rows to review, about {time} of somebody's time")


def _add_changes(answer: Answer, graph: Graph, changed: Forecasts, changes: dict[str, str]) -> None:
    """Add the forecasts with the changes of `--what-if`, and their total time.

    `changed` holds these forecasts.
    """
    stages = [forecast.told() for forecast in changed.stages.values()]
    answer.data["what_if"] = {"changes": changes, "stages": stages}
    seconds, _, _ = changed.total(graph)
    answer.say("what if", f"{changes_text(changes)}: {duration(seconds)}")


def _shares(forecasts: Iterable[Forecast]) -> list[str]:
    """Return texts such as `sampling 62%`: each kind of work with its share of the total time, the largest
    first.

    Kinds below 1 % are left out.
    """
    parts: dict[str, float] = {}
    for forecast in forecasts:
        for name, seconds in forecast.parts.items():
            parts[name] = parts.get(name, 0.0) + seconds
    whole = sum(parts.values()) or 1.0
    shares = []
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        if seconds / whole >= 0.01:
            shares.append(f"{name} {seconds / whole:.0%}")
    return shares
