"""The command `limbeck compare`: two models or two runs, on the same problems."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from .options import RUNS, AsJson, Device, Home, open_model, print_json, usage_error
from .run import carry_out, ignore_interrupts
from .suites import Samples
from .watch import choose_display

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..pipeline.comparison import Comparison
    from ..pipeline.evaluation_run import HeldOut
    from ..report.flips import Flip
    from ..report.paired import PairedResult

app = typer.Typer()

SHOWN = 3  # problems of each kind that are printed
WIDTH = 200  # characters of a response that are printed


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="a model or a run, as every command names it")],
    b: Annotated[str, typer.Argument(metavar="B", help="what is compared with it")],
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="write a page with curves, too")] = None,
    problems: Asked = "",
    mode: Modes = [],  # noqa: B006
    prompts: Prompts = None,
    samples: Samples = None,
    max_new_tokens: Longest = None,
    held_out: Kept = 200,
    answer: Answer = "boxed",
    columns: Columns = "",
    runs: Home = RUNS,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Compare two models, or two runs: how many problems more does B solve than A?

    Differences are paired, problem by problem, with 95 % intervals. Below them stand problems that flipped,
    with the first response of both, and what each side cost. Two runs are compared model by model.

    With `--problems`, both models are asked held-out problems now, those of a file or of a recipe, with the
    settings of its first evaluate stage where none are given. What was asked before is not asked again, and
    the command goes on where it was stopped.

    For instance: `limbeck compare quickstart/zero quickstart/r1`, `limbeck compare mine mine-longer --page
    compared.html`, `limbeck compare mine/r1 smollm2-135m --problems mine.yaml --mode t1 --prompts 100`
    """
    from ..pipeline.comparison import compare_names

    changes = {
        "modes": mode or None,
        "prompts": prompts,
        "max_new_tokens": max_new_tokens,
        "samples": samples,
    }
    if problems:
        asked = find_problems(problems, changes, FileOptions(held_out, answer, columns))
        comparison = _ask(a, b, asked, runs, device)
    elif any(changes.values()):
        raise usage_error(
            "--mode, --prompts, --samples and --max-new-tokens need --problems, which is asked now"
        )
    else:
        comparison = compare_names(a, b, runs)
    if page:
        from ..report.comparison_page import render

        page.write_text(render(comparison), encoding="utf-8")
    if as_json:
        print_json(to_json(comparison))
        return
    for line in tell(comparison):
        print(line)


def _ask(a: str, b: str, asked: HeldOut, runs: Path, device: str) -> Comparison:
    """Return the comparison of two models that are asked the same problems now."""
    from ..pipeline.comparison import compare_evaluations
    from ..pipeline.evaluation_run import prepare
    from .display import Tree

    models = [open_model(name, runs) for name in (a, b)]
    if models[0].path.resolve() == models[1].path.resolve():
        raise usage_error(f"{a} and {b} are the same model: name two different ones to compare")
    display = choose_display(False, sys.stderr)
    try:
        evaluation = prepare(models, asked, runs, display, device)
        carry_out(evaluation.run)
    finally:
        ignore_interrupts()
        if isinstance(display, Tree):
            display.close()
    return compare_evaluations(models, evaluation.folders())


def tell(comparison: Comparison) -> Iterator[str]:
    """Yield the lines that the command prints."""
    yield f"A {comparison.a.title}"
    yield f"B {comparison.b.title}"
    for name, results in comparison.results.items():
        yield ""
        yield f"{name:20} {'':8} {'A':>7} {'B':>7}   B - A, points"
        yield from map(_result, results)
        yield from _flips(results)
    yield ""
    yield f"{'cost':20} {'A':>12} {'B':>12}"
    for cost, before in comparison.a.costs.items():
        yield f"{cost:20} {before:12.4g} {comparison.b.costs.get(cost, 0):12.4g}"
    for key in dict.fromkeys(key for values in comparison.settings.values() for key in values):
        values = (comparison.settings[side.title].get(key, "-") for side in (comparison.a, comparison.b))
        yield f"{key}: {' -> '.join(values)}"


def _result(result: PairedResult) -> str:
    """Return the line of one source of problems and way of sampling."""
    interval = f"{100 * result.difference:+6.1f}  ({100 * result.low:+.1f} to {100 * result.high:+.1f})"
    shares = f"{result.a.mean:7.1%} {result.b.mean:7.1%}"
    verdict = "" if result.differs else ", which may be chance"
    return f"{result.source:20} {result.mode:8} {shares}   {interval}, {result.a.problems} problems{verdict}"


def _flips(results: list[PairedResult]) -> Iterator[str]:
    """Yield the lines on problems that flipped, in the first source and way of sampling."""
    flips = results[0].flips
    where = f"{results[0].source} {results[0].mode}"
    yield f"{where}: {len(flips.won)} won, {len(flips.lost)} lost, {flips.held} right in both"
    for sign, flipped in (("+", flips.won), ("-", flips.lost)):
        for flip in flipped[:SHOWN]:
            yield from _flip(sign, flip)


def _flip(sign: str, flip: Flip) -> Iterator[str]:
    """Yield a problem with the first response of both sides."""
    yield f"  {sign} {_brief(flip.prompt)}"
    yield f"    A {_brief(flip.before['text'])}"
    yield f"    B {_brief(flip.after['text'])}"


def _brief(text: str) -> str:
    """Return a text on one line, cut to a width, without control characters."""
    from .display import printable

    line = printable(" ".join(text.split()))
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as a JSON object."""
    return {
        "a": {"name": comparison.a.title, "costs": dict(comparison.a.costs)},
        "b": {"name": comparison.b.title, "costs": dict(comparison.b.costs)},
        "results": {name: list(map(_to_json, results)) for name, results in comparison.results.items()},
        "settings": {side: dict(values) for side, values in comparison.settings.items()},
    }


def _to_json(result: PairedResult) -> dict[str, Any]:
    """Return one result as a JSON object."""
    return {
        "source": result.source,
        "mode": result.mode,
        "a": asdict(result.a),
        "b": asdict(result.b),
        "difference": result.difference,
        "low": result.low,
        "high": result.high,
        "won": [flip.problem for flip in result.flips.won],
        "lost": [flip.problem for flip in result.flips.lost],
        "right_in_both": result.flips.held,
        "wrong_in_both": result.flips.missed,
    }
