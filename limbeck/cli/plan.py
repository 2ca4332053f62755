"""The command that says beforehand what a run takes: `limbeck plan`, for recipes and for models, here and on other chips."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import RUNS, AsJson, Home, mistake

if TYPE_CHECKING:
    from ..config.recipe import Recipe
    from ..pipeline.graph import Graph
    from ..plan.forecast import Forecast
    from .plan_text import Answer

SIGNS = {"cached": "done", "ready": "will run", "waits": "waits", "asks": "asks you"}
HERE = "this machine"


def plan(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL|verify",
            help="a recipe, a model's directory or config.json, or a name as deepseek-v3",
        ),
    ],
    file: Annotated[
        Path | None,
        typer.Argument(
            help="of `verify`: published runs as CSV, in place of its own table", show_default=False
        ),
    ] = None,
    runs: Home = RUNS,
    set_: Annotated[
        list[str],
        typer.Option(
            "--set",
            help="change a setting of the recipe: stages.zero.steps=30; for a model, a figure of the cluster: bf16=313",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    auto: Annotated[
        bool, typer.Option("--auto", help="let each curate stage's policy decide instead of people")
    ] = False,
    on: Annotated[
        str,
        typer.Option(
            help="a cluster: 8x4090, 2048xH800, fire-flyer-2; a recipe's is this machine", show_default=False
        ),
    ] = "",
    what_if: Annotated[
        list[str],
        typer.Option(
            "--what-if",
            help="beside it, the same with a change: nvlink=400, chip=H20, nics=1, count=512",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    tokens: Annotated[
        float | None, typer.Option(help="that a model is to learn, in all: 1e12", show_default=False)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="sequences a step", show_default=False)] = None,
    seq: Annotated[int | None, typer.Option(help="tokens a sequence", show_default=False)] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, fp8, fp16", show_default=False)] = None,
    price: Annotated[
        float | None,
        typer.Option(help="dollars for an hour of a chip (or of this machine)", show_default=False),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="DATE", help="when chips or stock run out: 2027-03", show_default=False),
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="COUNTRY", help="may these chips be sold there?", show_default=False)
    ] = None,
    date: Annotated[
        str | None,
        typer.Option(
            metavar="DATE", help="the day that rules are asked for; today if not given", show_default=False
        ),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="draw the schedule of the best layout", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run would do, how long it takes and what it costs, on this machine or on chips one might get: nothing is run.

    Of a recipe: which stages are done, will run or wait, and each one's time. Of a model: the best layouts, time, energy and
    money of training it, or of its reinforcement learning, and of serving it. `verify` sets published runs against the plan.
    """
    from . import plan_text

    changes, is_recipe = _changes(what_if, "--what-if"), Path(what).suffix in (".yaml", ".yml")
    if until:
        plan_text.days_left(until)  # a day that is none is refused before anything is searched
    if what == "verify":
        answer = _verify(file)
    elif file is not None:
        raise mistake(f"{file}: only `limbeck plan verify` reads a second file")
    elif is_recipe:
        answer = _of_recipe(Path(what), runs, set_, auto, on, changes, price, until)
    else:
        given = {"tokens": tokens, "batch": batch, "seq": seq, "precision": precision}
        figures = _changes(set_, "--set")
        answer = plan_text.of_model(what, on, figures, changes, given, price, until, svg)
    if to:
        plan_text.rule(answer, on, {} if is_recipe else figures, changes, to, date)
    if as_json:
        print(json.dumps({"schema": 1, "ok": True, **answer.data}, ensure_ascii=False))
        return
    print("\n".join(answer.lines))


# ---------------------------------------------------------------- recipes


def _of_recipe(
    path: Path,
    runs: Path,
    set_: list[str],
    auto: bool,
    on: str,
    changes: dict[str, Any],
    price: float | None,
    until: str | None,
) -> Answer:
    from ..pipeline.provenance.propagate import trace
    from ..types import LimbeckError
    from .plan_text import Answer, duration, told_changes

    if changes and not on:
        raise mistake(
            f"--what-if {told_changes(changes)} changes a cluster: name it with --on, for instance --on 8x4090"
        )
    graph = open_graph(load_recipe(path, set_, auto), path, runs)
    answer = Answer()
    foreseen, where, other = {}, HERE, {}
    try:
        foreseen, where = foresee(graph, on, {})
        other = foresee(graph, on, changes)[0] if changes else {}
    except LimbeckError as error:
        if on:
            raise
        unforeseen = str(error)
    else:
        unforeseen = ""
    rows = []
    for node in graph.nodes.values():
        row = {
            "stage": node.name,
            "kind": node.kind,
            "state": node.state,
            "key": node.key and node.key[:16],
            "why": [] if node.artifact else graph.why(node),
        }
        told = foreseen.get(node.name)
        took = f"{duration(told.seconds):>9}" if told and not node.artifact else f"{'':9}"
        beside = (
            f"{duration(other[node.name].seconds):>9}  "
            if node.name in other and not node.artifact
            else "           "
            if other
            else ""
        )
        answer.lines.append(
            f"{SIGNS[node.state]:10} {node.name:32} {node.kind:9} {took}  {beside}{'; '.join(row['why'][:3])}".rstrip()
        )
        rows.append(row | ({"forecast": told.told()} if told else {}))
    answer.data["data"] = rows
    _sum_up(answer, graph, foreseen, where, price, until)
    if unforeseen:
        answer.data["unforeseen"] = unforeseen
        answer.say("not foreseen", unforeseen)
    if other:
        answer.data["what_if"] = {"changes": changes, "stages": [f.told() for f in other.values()]}
        answer.say("what if", f"{told_changes(changes)}: {duration(_total(graph, other, where)[0])}")
    for breach in trace(graph)[1]:
        print(f"limbeck: a run would refuse this: {breach.sentence}", file=sys.stderr)
    return answer


def load_recipe(path: Path, overrides: list[str], auto: bool) -> Recipe:
    from ..config.load import load, with_auto_curation

    recipe = load(path, overrides)
    return with_auto_curation(recipe) if auto else recipe


def open_graph(recipe: Recipe, path: Path, runs: Path) -> Graph:
    from ..pipeline.graph import Graph
    from ..pipeline.store import Store

    return Graph(recipe, Store(runs / "store"), path.parent)


def cached_forecast(graph: Graph) -> dict[str, Any] | None:
    """The forecast that a run keeps, where this machine has been measured for its models: a run does not wait for that."""
    from datetime import date

    from ..types import LimbeckError

    try:
        foreseen, _ = foresee(graph, ask=False)
    except LimbeckError:  # nobody asked for a forecast, and a run does not fail for want of one
        return None
    stages = {name: told.told() for name, told in foreseen.items()}
    return {"schema": 1, "made": str(date.today()), "on": HERE, "stages": stages} if stages else None


def foresee(
    graph: Graph, on: str = "", changes: dict[str, Any] | None = None, ask: bool = True
) -> tuple[dict[str, Forecast], str]:
    """What each stage takes, and where: on this machine, which is measured in seconds if it was not yet (or not, without `ask`).
    Nothing, where all is done."""
    from .. import __version__
    from ..config.recipe import Pretrain
    from ..plan import cluster as clusters
    from ..plan import forecast, machine_rates
    from ..plan.stage_work import Walk

    recipe = graph.recipe
    if all(node.artifact for node in graph.nodes.values()):
        return {}, HERE
    configs = _configs(graph)
    walk = Walk(recipe, configs)
    for node in graph.nodes.values():
        walk.add(node.name, node.stage, node.inputs, node.control)
    if on:
        cluster = clusters.cluster(on, **(changes or {}))
        return {
            name: forecast.price_on(effort, configs, cluster) for name, effort in walk.efforts.items()
        }, cluster.tell()
    worlds = {
        s.problems: recipe.problems[s.problems].model_dump()
        for s in recipe.stages.values()
        if isinstance(s, Pretrain)
    }
    threads = recipe.threads or max(1, int(_cores()) // recipe.workers)
    rates = machine_rates.measure(
        forecast.asked_of(walk.efforts.values(), configs), worlds, threads, recipe.workers, __version__, ask
    )
    if rates is None:
        return {}, HERE
    return {name: forecast.price(effort, configs, rates) for name, effort in walk.efforts.items()}, HERE


def _cores() -> float:
    from ..runtime.machine import usable_cores

    return usable_cores()


def _configs(graph: Graph) -> dict[str, Any]:
    """The shape of each stage's model."""
    from dataclasses import replace

    from ..config.recipe import Load, Pretrain
    from ..model.config import ModelConfig
    from ..model.from_recipe import to_config
    from ..tasks.registry import open_task

    found: dict[str, ModelConfig] = {}
    for node in graph.nodes.values():
        stage = node.stage
        if node.artifact and (node.artifact.folder / "model" / "config.json").exists():
            found[node.name] = ModelConfig.from_directory(node.artifact.folder / "model")
        elif isinstance(stage, Pretrain):
            vocabulary = open_task(stage.problems, graph.recipe.problems[stage.problems]).tokenizer().size
            found[node.name] = to_config(stage.shape, vocabulary)
        elif isinstance(stage, Load):
            config = (
                _gguf(Path(stage.path))
                if Path(stage.path).is_file()
                else ModelConfig.from_directory(Path(stage.path))
            )
            found[node.name] = replace(config, layers=stage.layers) if stage.layers else config
        elif (model := node.inputs[0] if node.kind == "evaluate" else getattr(stage, "model", "")) in found:
            found[node.name] = found[model]
    return found


def _gguf(path: Path) -> Any:
    raise mistake(
        f"{path}: how long a model from a GGUF file takes is foreseen once it is loaded; run that stage first, or name a model directory"
    )


def _total(graph: Graph, foreseen: dict[str, Forecast], where: str) -> tuple[float, float, float]:
    """Seconds on the wall of what is left, with its interval; the errors of stages are errors of one machine, and add up."""
    from ..plan.forecast import wall

    left = {name: f for name, f in foreseen.items() if not graph.nodes[name].artifact}
    workers = graph.recipe.workers if where == HERE else 1
    return tuple(
        wall(left, workers, START * (where == HERE and bool(left)), key) for key in ("seconds", "low", "high")
    )


START = 3.0  # seconds until a worker has torch


def _sum_up(
    answer: Answer,
    graph: Graph,
    foreseen: dict[str, Forecast],
    where: str,
    price: float | None,
    until: str | None,
) -> None:
    from .plan_text import deadline, duration

    if not foreseen:
        answer.data |= {"seconds": 0.0}
        return
    left = [f for name, f in foreseen.items() if not graph.nodes[name].artifact]
    seconds, low, high = _total(graph, foreseen, where)
    answer.data |= {"on": where, "seconds": round(seconds, 1), "low": round(low, 1), "high": round(high, 1)}
    answer.say("in all", f"{duration(seconds)} ({duration(low)} to {duration(high)}) on {where}")
    flops, people = sum(f.flops for f in left), sum(f.people for f in left)
    answer.say("of which", ", ".join(_shares(left)))
    answer.say("operations", f"{flops:.3g}")
    if people:
        from ..plan.forecast import DESK_SECONDS

        answer.say(
            "people", f"{people} rows to review, about {duration(people * DESK_SECONDS)} of somebody's time"
        )
    if price is not None:
        answer.data["money"] = price * seconds / 3600
        answer.say(
            "money",
            f"${price * seconds / 3600:,.2f} (${price * low / 3600:,.2f} to ${price * high / 3600:,.2f}) at ${price:g} an hour",
        )
    if until:
        deadline(answer, seconds, until)


def _shares(left: Iterable[Forecast]) -> list[str]:
    """Kinds of work by their share of the time."""
    parts: dict[str, float] = {}
    for f in left:
        for name, seconds in f.parts.items():
            parts[name] = parts.get(name, 0.0) + seconds
    whole = sum(parts.values()) or 1.0
    return [
        f"{name} {seconds / whole:.0%}"
        for name, seconds in sorted(parts.items(), key=lambda item: -item[1])
        if seconds / whole >= 0.01
    ]


# ---------------------------------------------------------------- published runs, words


def _verify(file: Path | None) -> Answer:
    from ..plan import verify
    from .plan_text import Answer

    answer = Answer()
    answer.lines += verify.table(file) if file else verify.table()
    answer.data["data"] = answer.lines
    return answer


def _changes(texts: list[str], option: str) -> dict[str, Any]:
    """`nvlink=400` and its like."""
    pairs = [text.partition("=") for text in texts]
    for key, equals, value in pairs:
        if not equals or not value:
            raise mistake(f"{option} {key}: write KEY=VALUE, for instance nvlink=400 or chip=H20")
    return {key.strip(): value.strip() for key, _, value in pairs}
