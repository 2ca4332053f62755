"""The command `limbeck eval`, which measures a model's accuracy on held-out problems without a run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import suites
from .held_out import (
    Answer,
    Asked,
    Columns,
    FileOptions,
    Kept,
    Longest,
    Modes,
    Prompts,
    find_problems,
)
from .options import MODEL, RUNS, AsJson, Device, Home, open_model, print_json, tell, usage_error
from .results import TITLES, to_markdown

if TYPE_CHECKING:
    from ..pipeline.evaluation_run import HeldOut

app = typer.Typer()


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    problems: Asked = "",
    mode: Modes = [],  # noqa: B006
    prompts: Prompts = None,
    max_new_tokens: Longest = None,
    held_out: Kept = 200,
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
    markdown: Annotated[bool, typer.Option("--markdown", help="a Markdown table, for documents")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model's accuracy on held-out problems, with 95 % intervals. Nothing is stored.

    With a recipe, the settings of its first `evaluate` stage hold where none are given, so the figures are
    those that the recipe's run would report.

    With `--suite`, the model is measured on a named benchmark (GSM8K, MATH-500, AIME and others,
    docs/reference/suites.md) from its published files, and stands in one table with published scores.

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
    else:
        test = find_problems(problems, changes, FileOptions(held_out, answer, columns))
    with _measured(model, runs, test, device) as folder:
        if suite:
            suites.show(model, folder, suites.Shown(price, out, markdown, as_json))
        else:
            _show(folder, markdown, as_json)


def _show(folder: Path, markdown: bool, as_json: bool) -> None:
    """Print the accuracy on each source of problems from the folder of an evaluation."""
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    if as_json:
        print_json(result)
        return
    if markdown:
        from ..pipeline.evaluation_table import rows_of_evaluation

        print("\n".join(to_markdown(rows_of_evaluation(result), TITLES)))
        return
    for source, measured in result["sources"].items():
        for way, figures in measured["modes"].items():
            print(_line(source, way, figures))


def _of_suites(names: list[str], data: str, protocol: str, **limits: int | None) -> HeldOut:
    """Return the test on named benchmarks. Raises a usage error for an unknown one and a missing folder."""
    from ..config.parts import SuiteOptions
    from ..config.recipe import Evaluate
    from ..eval.suites.catalogue import find_protocol, find_suite
    from ..pipeline.evaluation_run import HeldOut

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
    return HeldOut(Evaluate(kind="evaluate", models=["model"], problems=[], suites=asked), {})


@contextmanager
def _measured(model: str, runs: Path, test: HeldOut, device: str) -> Iterator[Path]:
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
