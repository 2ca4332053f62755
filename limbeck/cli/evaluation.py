"""The command `limbeck eval`, which measures a model's accuracy on held-out problems without a run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import suites
from .options import (
    MODEL,
    RUNS,
    AsJson,
    Device,
    Home,
    find_recipe,
    load_recipe,
    open_model,
    print_json,
    tell,
    usage_error,
)

if TYPE_CHECKING:
    from ..config.recipe import Evaluate, Problems

app = typer.Typer()

MODES = ("t1", "t06", "greedy", "pass@8")
ANSWERS = ("tags", "boxed", "final")
KEPT = {"problems", "prompts", "samples", "modes", "max_new_tokens", "precision", "exact"}


@dataclass(frozen=True)
class _Test:
    """What is asked: the settings of the evaluation, the sources of problems by name, and the seed."""

    settings: Evaluate
    problems: dict[str, Problems]
    seed: str


Asked = Annotated[
    str, typer.Option(help="a JSONL or Parquet file, or a recipe (its name or file), for its problems")
]
Modes = Annotated[
    list[str], typer.Option(help=f"how answers are sampled: {', '.join(MODES)}", show_default=False)
]
Prompts = Annotated[int | None, typer.Option(min=1, help="held-out problems of each source, at most")]
Longest = Annotated[int | None, typer.Option(min=1, help="the longest answer, in tokens")]
HeldOut = Annotated[
    int, typer.Option(min=1, help="of a file: problems that are kept for testing, as in a recipe")
]
Answer = Annotated[str, typer.Option(help=f"of a file: where the answer is looked for: {', '.join(ANSWERS)}")]
Columns = Annotated[str, typer.Option(help="of a file: its columns: problem=ask,answer=gold")]


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    problems: Asked = "",
    mode: Modes = [],  # noqa: B006
    prompts: Prompts = None,
    max_new_tokens: Longest = None,
    held_out: HeldOut = 200,
    answer: Answer = "boxed",
    columns: Columns = "",
    suite: suites.Names = [],  # noqa: B006
    data: suites.Data = "",
    protocol: suites.As = "deepseek",
    items: suites.Items = None,
    samples: suites.Samples = None,
    price: suites.Price = None,
    out: suites.Out = None,
    runs: Home = RUNS,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure a model's accuracy on held-out problems, with 95 % intervals. Nothing is stored.

    With a recipe, the settings of its first `evaluate` stage hold where none are given, so the figures are
    those that the recipe's run would report.

    With `--suite`, the model is measured on a named benchmark (GSM8K, MATH-500, AIME and others,
    docs/reference/suites.md) from its published files.

    For instance: `limbeck eval quickstart/zero --problems quickstart`, `limbeck eval smollm2-135m --problems
    mine.jsonl --answer final --held-out 50`
    """
    changes = {
        "modes": mode or None,
        "prompts": prompts,
        "max_new_tokens": max_new_tokens,
        "samples": samples,
    }
    if bool(suite) == bool(problems):
        raise usage_error("give either --problems or --suite, which say what is asked")
    if suite:
        test = _of_suites(suite, data, protocol, items=items, samples=samples, max_new_tokens=max_new_tokens)
    elif Path(problems).suffix in (".jsonl", ".parquet"):
        test = _of_file(Path(problems), _given(changes), held_out, answer, columns)
    else:
        test = _of_recipe(problems, _given(changes))
    with _measured(model, runs, test, device) as folder:
        suites.show(folder, price, out, as_json) if suite else _show(folder, as_json)


def _given(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {key: value for key, value in changes.items() if value is not None}


def _show(folder: Path, as_json: bool) -> None:
    """Print the accuracy on each source of problems from the folder of an evaluation."""
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    if as_json:
        print_json(result)
        return
    for source, measured in result["sources"].items():
        for way, figures in measured["modes"].items():
            print(_line(source, way, figures))


def _of_file(path: Path, changes: dict[str, Any], held_out: int, answer: str, columns: str) -> _Test:
    """Return the test on a user's file of problems. Raises a usage error for a setting that there is not, and
    for a file that does not have so many different problems."""
    from ..config.recipe import Files
    from ..tasks.files import read_table
    from .first_recipe.problems import choose_columns

    if not path.is_file():
        raise usage_error(f"--problems {path}: there is no such file")
    if answer not in ANSWERS:
        raise usage_error(f"--answer {answer}: choose {', '.join(ANSWERS)}")
    evaluation = _settings([path.stem], changes)
    rows = list(read_table(path))
    if not rows:
        raise usage_error(f"--problems {path}: the file has no rows")
    chosen = choose_columns(path, rows[0], columns)
    different = {str(row[chosen["problem"]]) for _, row in rows if chosen["problem"] in row}
    if len(different) <= held_out:
        raise usage_error(
            f"--held-out {held_out}: too many for {path} (different problems: {len(different)}), as one must "
            "be left over; give a lower number, or add rows"
        )
    settings = {"path": str(path.resolve()), "columns": chosen, "held_out": held_out, "answer": answer}
    source = Files(source="files", **settings)
    return _Test(evaluation, {path.stem: source}, "0/evaluation")


def _of_recipe(name: str, changes: dict[str, Any]) -> _Test:
    """Return the test of a recipe: its first `evaluate` stage, or all its problems if it has none.

    Raises a usage error for a recipe without problems.
    """
    from ..config.recipe import Evaluate
    from ..pipeline.graph import resolve_paths, with_defaults

    path = find_recipe(name)
    recipe = load_recipe(path, [], False)
    stages = {key: stage for key, stage in recipe.stages.items() if isinstance(stage, Evaluate)}
    recipe = resolve_paths(recipe.model_copy(update={"stages": {}}), path.parent)
    if not recipe.problems:
        raise usage_error(f"{path} has no problems to ask")
    for key, stage in stages.items():
        kept = with_defaults(recipe, stage).model_dump(include=KEPT)
        return _Test(_settings(kept.pop("problems"), kept | changes), recipe.problems, f"{recipe.seed}/{key}")
    return _Test(_settings(list(recipe.problems), changes), recipe.problems, f"{recipe.seed}/evaluation")


def _settings(sources: list[str], changes: dict[str, Any]) -> Evaluate:
    """Return the settings of the evaluation on `sources`. Raises a usage error for an unknown mode."""
    from ..config.recipe import Evaluate

    for mode in changes.get("modes", ()):
        if mode not in MODES:
            raise usage_error(f"--mode {mode}: choose {', '.join(MODES)}")
    return Evaluate(kind="evaluate", models=["model"], problems=sources, **changes)


def _of_suites(names: list[str], data: str, protocol: str, **limits: int | None) -> _Test:
    """Return the test on named benchmarks. Raises a usage error for an unknown one and a missing folder."""
    from ..config.parts import SuiteOptions
    from ..config.recipe import Evaluate
    from ..eval.suites.catalogue import find_protocol, find_suite

    for name in names:
        find_protocol(find_suite(name), protocol)
    if not data or not Path(data).exists():
        first = find_suite(names[0])
        raise usage_error(
            f"--data {data or '(not given)'}: no such folder; it holds the files of {first.title} as "
            f"published at {first.home}"
        )
    options = SuiteOptions(data=data, protocol=protocol, **limits)
    asked = dict.fromkeys(names, options)
    return _Test(Evaluate(kind="evaluate", models=["model"], problems=[], suites=asked), {}, "0/evaluation")


@contextmanager
def _measured(model: str, runs: Path, test: _Test, device: str) -> Iterator[Path]:
    """Evaluate a model on a device; the block gets the folder that an `evaluate` stage would have written."""
    from ..pipeline.job import Job
    from ..pipeline.stage_device import ready_device
    from ..pipeline.stages import evaluate as stage

    found = open_model(model, runs)
    with tempfile.TemporaryDirectory(prefix="limbeck-eval-") as scratch:
        inputs = Path(scratch) / "input"
        inputs.mkdir()
        (inputs / "model").symlink_to(found.directory().resolve())
        folder = Path(scratch) / "output"
        folder.mkdir()
        asked = {name: test.problems[name] for name in test.settings.problems}
        job = Job("evaluation", test.settings, test.seed, {found.title: inputs}, asked, folder, device=device)
        with ready_device(job, tell) as ready:
            stage.run(ready)
        yield folder


def _line(source: str, way: str, figures: dict[str, Any]) -> str:
    """Return one line of the result: source, way of sampling, accuracy with interval, problems, tokens."""
    accuracy = figures["accuracy"]
    interval = f"{accuracy['mean']:6.1%}  ({accuracy['low']:.1%} to {accuracy['high']:.1%})"
    plural = "" if accuracy["problems"] == 1 else "s"
    text = f"{source:20} {way:8} {interval:28} {accuracy['problems']} problem{plural}"
    if "length" in figures:
        text += f", {figures['length']:.0f} tokens an answer, {figures['thought_length']:.0f} of its thought"
    if figures.get("language_consistency") is not None:
        text += f", {figures['language_consistency']:.1%} in one language"
    if "pass@8" in figures:
        text += f", pass@8 {figures['pass@8']['mean']:.1%}"
    if figures.get("truncated"):
        text += f", {figures['truncated']:.1%} cut off"
    return text
