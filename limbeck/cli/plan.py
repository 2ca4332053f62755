"""The command `limbeck plan`, which forecasts a recipe or a model's training, on this machine or on other
chips.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    MODEL,
    RUNS,
    AsJson,
    Auto,
    Home,
    find_recipe,
    load_recipe,
    open_graph,
    read_config,
    usage_error,
)

if TYPE_CHECKING:
    from ..model.config import ModelConfig
    from ..pipeline.graph import Graph
    from .plan_text import Answer, Conditions

app = typer.Typer()

Subject = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|MODEL|verify",
        help=f"a recipe's file or name, as quickstart; {MODEL}; a config.json; or a name as deepseek-v3",
    ),
]
PublishedRuns = Annotated[
    Path | None,
    typer.Argument(help="of `verify`: published runs as CSV, in place of its own table", show_default=False),
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="change a setting of the recipe: stages.zero.steps=30; for a model, a figure of the cluster: "
        "bf16=313",
        show_default=False,
    ),
]
OnCluster = Annotated[
    list[str],
    typer.Option(
        help="a card or a cluster: 1xRTX4090, 2048xH800, fire-flyer-2; a recipe's is this machine; several "
        "give one table of a recipe",
        show_default=False,
    ),
]
Changes = Annotated[
    list[str],
    typer.Option(
        "--what-if",
        help="beside it, the same with a change: nvlink=400, chip=H20, nics=1, count=512",
        show_default=False,
    ),
]
Tokens = Annotated[
    float | None, typer.Option(help="that a model is to learn, in all: 1e12", show_default=False)
]
Batch = Annotated[int | None, typer.Option(help="sequences a step", show_default=False)]
SequenceLength = Annotated[int | None, typer.Option(help="tokens a sequence", show_default=False)]
Precision = Annotated[str | None, typer.Option(help="bf16, fp8, fp16", show_default=False)]
Price = Annotated[
    float | None,
    typer.Option(help="dollars for an hour of a chip (or of this machine)", show_default=False),
]
Until = Annotated[
    str | None,
    typer.Option(metavar="DATE", help="when chips or stock run out: 2027-03", show_default=False),
]
Country = Annotated[
    str | None, typer.Option(metavar="COUNTRY", help="may these chips be sold there?", show_default=False)
]
RulesDay = Annotated[
    str | None,
    typer.Option(
        metavar="DATE", help="the day that rules are asked for; today if not given", show_default=False
    ),
]
Drawing = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="draw the schedule of the best layout", show_default=False),
]


@app.command()
def plan(
    what: Subject,
    file: PublishedRuns = None,
    runs: Home = RUNS,
    set_: Overrides = [],  # noqa: B006
    auto: Auto = False,
    on: OnCluster = [],  # noqa: B006
    what_if: Changes = [],  # noqa: B006
    tokens: Tokens = None,
    batch: Batch = None,
    seq: SequenceLength = None,
    precision: Precision = None,
    price: Price = None,
    until: Until = None,
    to: Country = None,
    date: RulesDay = None,
    svg: Drawing = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run would do, how long it takes and what it costs, on this machine or on chips one might
    get: nothing is run.

    Of a recipe: which stages are done, will run or wait, and each one's time; on a card, its memory and
    whether it fits too. Of a model: the best layouts,
    time, energy and money of training it, or of its reinforcement learning, and of serving it. `verify` sets
    published runs against the plan.

    For instance: `limbeck plan quickstart --on 1xRTX4090`, `limbeck plan deepseek-v3 --on 2048xH800`
    """
    from .plan_text import Conditions, days_left

    if until:
        days_left(until)  # an invalid day is refused before the search
    _check_several(what, on, {"--until": until, "--to": to})
    conditions = Conditions(on[0] if on else "", _changes(what_if, "--what-if"), price, until)
    figures: dict[str, Any] = {}
    if what == "verify":
        answer = _verify(file)
    elif file is not None:
        raise usage_error(f"{file}: only `limbeck plan verify` reads a second file")
    elif _is_recipe(what):
        path = find_recipe(what)
        graph = open_graph(load_recipe(path, set_, auto), path, runs, need_files=not on)
        answer = _plan_graph(graph, on, conditions)
    else:
        from .model_plan import plan_model

        workload = {"tokens": tokens, "batch": batch, "seq": seq, "precision": precision}
        figures = _changes(set_, "--set")
        answer = plan_model(what, _shapes_of(what, runs), figures, workload, conditions, svg)
    if to:
        from .model_plan import apply_export_rules

        apply_export_rules(answer, figures, conditions, to, date)
    if as_json:
        print(json.dumps({"schema": 1, "ok": True, **answer.data}, ensure_ascii=False))
    else:
        print("\n".join(answer.lines))


def _check_several(what: str, on: list[str], options: dict[str, str | None]) -> None:
    """Refuse several cards or clusters for anything but a recipe, and together with some options.

    `options` are their values, by their names.
    """
    if len(on) < 2:
        return
    if not _is_recipe(what):
        raise usage_error(f"--on {on[1]}: several cards are for a recipe; give a model one --on at a time")
    for option, value in options.items():
        if value:
            raise usage_error(f"{option} {value}: with one --on at a time")


def _plan_graph(graph: Graph, on: list[str], conditions: Conditions) -> Answer:
    """Return the plan of a recipe, or a table of it on several cards or clusters."""
    from .card_plan import plan_cards
    from .plan_text import changes_text
    from .recipe_plan import plan_recipe

    if conditions.changes and not on:
        raise usage_error(
            f"--what-if {changes_text(conditions.changes)} changes a cluster: name it with --on, "
            "for instance --on 8x4090"
        )
    return plan_cards(graph, on, conditions) if len(on) > 1 else plan_recipe(graph, conditions)


def _is_recipe(what: str) -> bool:
    """Return True if `what` is the path of a YAML file or the name of a recipe that comes with Limbeck."""
    from ..config.load import shipped

    return Path(what).suffix in (".yaml", ".yml") or what in shipped()


def _shapes_of(name: str, runs: Path) -> ModelConfig:
    """Return the configuration of a published model of the plan's table, in a config.json, or of a model that
    is here.

    Raises a usage error, which lists models and recipes, for any other name.
    """
    from ..config.load import shipped as recipes
    from ..pipeline.model_name import find
    from ..plan.models import published, shipped

    config = published(name)
    if config:
        return config
    path = Path(name) if name.endswith(".json") else find(name, runs, [*recipes(), *shipped()]).path
    if path is None:
        raise usage_error(f"{name} is a stage's result without a model; name a model, or a recipe")
    return read_config(path)


def _verify(file: Path | None) -> Answer:
    """Return a table that compares published training runs with the times that the plan gives for them.

    `file` is a CSV file of such runs; None for the runs that come with Limbeck.
    """
    from ..plan import verify
    from .plan_text import Answer

    lines = verify.table(file) if file else verify.table()
    return Answer(lines, {"data": lines})


def _changes(texts: list[str], option: str) -> dict[str, str]:
    """Return the KEY=VALUE texts of a repeated option as a dict.

    `["nvlink=400"]` becomes `{"nvlink": "400"}`. `option` is the option's name, for the usage error that a
    text without a value raises.
    """
    changes = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not value:
            raise usage_error(f"{option} {key}: write KEY=VALUE, for instance nvlink=400 or chip=H20")
        changes[key.strip()] = value.strip()
    return changes
