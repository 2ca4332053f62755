"""Writes the first recipe: a template with comments, filled in with the model, the problems and the sizes."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..options import usage_error
from .problems import MINIATURE, SMALL, Source, name_of, read_problems
from .sizes import STEPS, Sizes, fit

RATES = ((3e8, "2.0e-5"), (SMALL, "5.0e-6"), (4e9, "2.0e-6"))  # parameters below which a rate is taken
LEAST_RATE = "1.0e-6"  # learning rate of larger models
PLAIN = re.compile(r"[A-Za-z][\w./-]*")  # texts that YAML reads as they are
MINIATURE_SOURCE = Source(
    {"source": MINIATURE}, 0, 0, ["miniature: problems of its own, the clock countdown"]
)


@dataclass(frozen=True)
class Answers:
    """What the user answered: the model's name, the problems' file or generator, and the minutes; `columns`
    names a file's columns."""

    model: str
    problems: str
    minutes: float
    columns: str = ""


def write(path: Path, answers: Answers, runs: Path) -> list[str]:
    """Write the recipe to `path` and return lines for the user: what it takes, its forecast, and the next
    commands.

    Raises LimbeckError if the file exists, or the model or the problems cannot be used.
    """
    if path.exists():
        raise usage_error(f"{path} exists and is not overwritten; name another file, or delete it")
    if path.suffix not in (".yaml", ".yml"):
        raise usage_error(f"{path}: a recipe is a YAML file; call it {path.stem}.yaml")
    if not path.parent.is_dir():
        raise usage_error(f"{path.parent}: no such folder; make it first, or name another file")
    if answers.model == MINIATURE:
        source, facts = _miniature(answers)
    else:
        source, facts = _own_model(answers, path.parent)
    facts |= {"name": name_of(path.stem), "problems": name_of(answers.problems), "source": source}
    draft = Sizes(STEPS, answers.model != MINIATURE, "")
    sizes = fit(_parse(_render(facts, draft), path), path.parent, answers.minutes, runs)
    path.write_text(_render(facts, sizes), encoding="utf-8")
    return [*source.notes, sizes.note, f"wrote {path}; next:", *_next_commands(path, runs)]


def _miniature(answers: Answers) -> tuple[Source, dict[str, Any]]:
    """Return the problems of the miniature and what its template needs. It reads its own problems only."""
    if answers.problems != MINIATURE or answers.columns:
        raise usage_error(
            f"--problems {answers.problems}: the miniature knows only the words of its own problems; "
            "leave --problems out, or give --model smollm2-135m"
        )
    return MINIATURE_SOURCE, {"template": "miniature"}


def _own_model(answers: Answers, folder: Path) -> tuple[Source, dict[str, Any]]:
    """Return the problems for a model from outside and what its template needs. `folder` will hold the
    recipe."""
    from ...model.find import find_model

    if answers.problems == MINIATURE:
        raise usage_error(
            "--problems miniature: only --model miniature knows their words; give a JSONL file, or chain_sum"
        )
    found = find_model(answers.model, Path(), "--model: ")
    parameters = _parameters(found)
    source = read_problems(answers.problems, answers.columns, parameters, folder)
    rate = next((rate for least, rate in RATES if parameters < least), LEAST_RATE)
    pulled = found == Path("models") / answers.model
    model = answers.model if pulled else os.path.relpath(found, folder)
    return source, {"template": "own_model", "model": model, "rate": rate}


def _parameters(model: Path) -> float:
    """Return about how many weights a model has: of a GGUF file, a byte is taken for one."""
    from ...model.config import ModelConfig

    if model.is_file():
        return float(model.stat().st_size)
    return float(ModelConfig.from_directory(model).parameters)


def _render(facts: dict[str, Any], sizes: Sizes) -> str:
    """Return the recipe's text."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["yaml"] = _inline
    return templates.get_template(f"{facts['template']}.yaml.jinja").render(**facts, sizes=sizes)


def _inline(value: Any) -> str:
    """Return a value as YAML in one line; texts have quotes only where they need them."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, str) and PLAIN.fullmatch(value) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _parse(text: str, path: Path) -> Any:
    """Return the recipe in a text that will be written to `path`, checked as a file's would be."""
    from ...config.recipe import Recipe
    from ...config.validate import check_references

    recipe = Recipe.model_validate(yaml.safe_load(text))
    check_references(path, recipe)
    return recipe


def _next_commands(path: Path, runs: Path) -> list[str]:
    """Return the next commands, each with what it does."""
    where = "" if runs == Path("runs") else f" --runs {runs}"
    return [
        f"  limbeck try {path}{where}    # eight prompts as the model sees them, its answers, verdicts",
        f"  limbeck plan {path}{where}   # how long each stage takes here",
        f"  limbeck run {path}{where}    # Ctrl-C stops it; the same command goes on",
    ]
