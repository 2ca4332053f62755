"""The command `limbeck init`, which asks three questions and writes a first recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import RUNS, Home, usage_error

app = typer.Typer()

MODEL = "smollm2-135m"
MINUTES = 45.0  # minutes


@app.command()
def init(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="the file to write; else the problems' name with .yaml, here", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="a model that was pulled, a model directory, a GGUF file, or miniature", show_default=False
        ),
    ] = None,
    problems: Annotated[
        str | None,
        typer.Option(
            help="a JSONL or Parquet file, or a generator of reasoning-gym, such as chain_sum",
            show_default=False,
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=1, help="how long the run may take here", show_default=False)
    ] = None,
    columns: Annotated[
        str, typer.Option(help="the file's columns: problem=ask,answer=gold", show_default=False)
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="take the defaults and ask nothing")] = False,
    runs: Home = RUNS,
) -> None:
    """Write a first recipe, with comments: which model, which problems, how much time?

    The recipe takes a base model, trains it with reinforcement learning on the problems, and evaluates both
    models. Its sizes are chosen so that the forecast fits the time. An existing file is never overwritten.
    """
    from . import first_recipe

    question = "Which model? A pulled model's name, a directory, a GGUF file, or miniature"
    model = _answer("--model", question, model, MODEL, yes)
    default = first_recipe.default_problems(model)
    question = "Which problems? A JSONL file, or a generator of reasoning-gym"
    problems = _answer("--problems", question, problems, default, yes or model == first_recipe.MINIATURE)
    minutes = _answer("--minutes", "How many minutes may it take here?", minutes, MINUTES, yes)
    if minutes < 1:
        raise usage_error(f"--minutes {minutes:g}: no run is that short; give 1 or more")
    path = recipe or Path(f"{first_recipe.name_of(problems)}.yaml")
    if sys.stderr.isatty():
        print("reading the problems, and timing this machine if that was not done before", file=sys.stderr)
    written = first_recipe.write(path, first_recipe.Answers(model, problems, minutes, columns), runs)
    print("\n".join(written))


def _answer(flag: str, question: str, given: Any, default: Any, take_default: bool) -> Any:
    """Return what the flag was given, or the default if it shall be taken, or what a person answers.

    Raises a usage error that names the flag if there is no terminal to ask at.
    """
    if given is not None:
        return given
    if take_default:
        return default
    if not at_terminal():
        raise usage_error(f"{flag} is missing, and there is no terminal to ask at; give {flag} or --yes")
    return typer.prompt(question, default=default, type=type(default))


def at_terminal() -> bool:
    """Return True if a person can be asked: standard input is a terminal."""
    return sys.stdin.isatty()
