"""The problems of a first recipe: which columns of a file hold them, how their answers are marked, and how
long an answer may be.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..options import usage_error

MINIATURE = "miniature"
CHAIN_SUM = "chain_sum"
SHORT_SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
SMALL = 1_000_000_000  # parameters below which a model is not expected to mark its answer
MOST_HELD_OUT = 200  # problems
GENERATED = 2000  # problems
STAGES = ("base", "sometimes", "zero", "evaluation", "report")
SHOWN = 60  # characters of a question or an answer that are printed
CHARACTERS = 2  # characters of the longest usual text for each token that an answer may have
MARKED = {
    "final": "{problem} State the final answer.",
    "boxed": "{problem}\nPut the final answer into \\boxed{}.",
}
TOKENS = {"final": (40, 512), "boxed": (256, 1024)}  # least and most tokens of an answer


@dataclass(frozen=True)
class Source:
    """The problems of a first recipe: `settings` is the entry under the recipe's `problems`, `held_out` the
    number of test problems, `tokens` the most tokens of an answer, and `notes` are sentences for the user."""

    settings: dict[str, Any]
    held_out: int
    tokens: int
    notes: list[str] = field(default_factory=list)


def default_problems(model: str) -> str:
    """Return the problems that are suggested for a model: its own for the miniature, `problems.jsonl` if it
    is here, else short sums."""
    if model == MINIATURE:
        return MINIATURE
    return "problems.jsonl" if Path("problems.jsonl").exists() else CHAIN_SUM


def name_of(problems: str) -> str:
    """Return a name for the recipe and its problems: the file's or the generator's, in letters, digits and
    underscores. A name that YAML reads as something else, or that a stage has, gets a prefix."""
    name = Path(problems).stem if is_file(problems) else problems
    name = re.sub(r"\W+", "_", name).strip("_") or "problems"
    return f"problems_{name}" if yaml.safe_load(name) != name or name in STAGES else name


def is_file(problems: str) -> bool:
    """Return True if the problems are a file, and not a generator's name."""
    return Path(problems).suffix in (".jsonl", ".parquet", ".json") or Path(problems).exists()


def read_problems(problems: str, columns: str, parameters: float, folder: Path) -> Source:
    """Return the source of problems for a model of `parameters` weights; `folder` will hold the recipe.

    Raises LimbeckError for a file or a generator that cannot be read.
    """
    if is_file(problems):
        return _from_file(Path(problems), columns, parameters, folder)
    if columns:
        raise usage_error(f"--columns {columns}: {problems} is no file, so it has no columns; leave them out")
    return _from_generator(problems, parameters)


# ---------------------------------------------------------------- files


def _from_file(path: Path, columns: str, parameters: float, folder: Path) -> Source:
    """Return the source of problems in a JSONL or Parquet file. Every row is read and checked."""
    from ...config.recipe import Files
    from ...tasks.files import FileTask, read_table

    if path.suffix == ".json":
        raise usage_error(f"{path}: not JSONL or Parquet; write one {{...}} a line and call it .jsonl")
    rows = list(read_table(path))
    if not rows:
        raise usage_error(f"{path}: the file has no rows; give it one problem a line")
    chosen = choose_columns(path, rows[0], columns)
    held_out = min(MOST_HELD_OUT, max(1, len(rows) // 4))
    settings = {"source": "files", "path": os.path.relpath(path, folder), "columns": chosen}
    different = {str(row[chosen["problem"]]) for _, row in rows if chosen["problem"] in row}
    if len(different) <= held_out:
        raise usage_error(
            f"{path}: {held_out} of the problems are held out, and no different one is left to learn from; "
            "add rows"
        )
    task = FileTask(
        path.stem, Files(source="files", path=str(path.absolute()), columns=chosen, held_out=held_out), Path()
    )
    problems = [*task.problems("train"), *task.problems("test")]
    answer = _style([problem.answer for problem in problems], parameters)
    texts = [str(row[column]) for _, row in rows for column in chosen.values() if column in row]
    settings |= {"held_out": held_out, "answer": answer, "template": MARKED[answer], "licence": "own"}
    notes = [_first_row(path, rows, chosen)]
    if task.skipped == 1:
        notes.append(f"{path}: 1 row has an answer that cannot be read, and is left out")
    elif task.skipped:
        notes.append(f"{path}: {task.skipped} rows have an answer that cannot be read, and are left out")
    return Source(settings, held_out, _tokens(texts, answer), notes)


def choose_columns(path: Path, first: tuple[int, Mapping[str, Any]], columns: str) -> dict[str, str]:
    """Return the columns that hold the problem and the answer: those that the user names, else those of the
    first row whose names are usual."""
    from ...tasks.files import ANSWERS, QUESTIONS

    number, row = first
    named = _named(columns)
    chosen = {}
    for role, usual in (("problem", QUESTIONS), ("answer", ANSWERS)):
        candidates = [named[role]] if role in named else usual
        found = next((name for name in candidates if name in row), None)
        if found is None:
            raise usage_error(
                f"{path}, line {number}: no column {', '.join(candidates)} among {', '.join(row) or 'none'}; "
                f"say which holds the {role}, with --columns {role}=NAME"
            )
        chosen[role] = found
    return chosen


def _named(columns: str) -> dict[str, str]:
    """Return the columns in the text `problem=ask,answer=gold`, by role."""
    named = {}
    for part in filter(None, columns.split(",")):
        role, _, name = part.strip().partition("=")
        if role not in ("problem", "answer") or not name:
            raise usage_error(f"--columns {columns}: write problem=NAME,answer=NAME")
        named[role] = name
    return named


def _first_row(path: Path, rows: Sequence[tuple[int, Mapping[str, Any]]], chosen: Mapping[str, str]) -> str:
    """Return a sentence that says which columns are taken, with the first row's values."""
    _, row = rows[0]
    parts = [f"{role} = {column} ({str(row[column])[:SHOWN]!r})" for role, column in chosen.items()]
    return f"{path}: {len(rows)} rows; {', '.join(parts)}"


# ---------------------------------------------------------------- generators


def _from_generator(name: str, parameters: float) -> Source:
    """Return the source of problems from a generator of reasoning-gym."""
    from ...config.recipe import Gym
    from ...tasks.gym import GymTask

    small = name == CHAIN_SUM and parameters < SMALL
    settings: dict[str, Any] = {"source": "gym", "generator": name, "config": SHORT_SUMS if small else {}}
    settings |= {"size": GENERATED, "held_out": MOST_HELD_OUT}
    task = GymTask(name, Gym(**settings))
    problems = task.problems("train")
    answer = _style([problem.answer for problem in problems], parameters)
    settings["answer"] = answer
    if answer == "boxed":  # a generator's question says itself what is asked for
        settings["template"] = MARKED[answer]
    texts = [problem.data["question"] for problem in problems]
    note = f"{name}: {len(problems)} problems of reasoning-gym, such as {texts[0][:SHOWN]!r}"
    return Source(settings, MOST_HELD_OUT, _tokens(texts, answer), [note])


# ---------------------------------------------------------------- answers


def _style(golds: Sequence[str | None], parameters: float) -> str:
    """Return how answers are marked: by their place at the end where a small model answers with numbers,
    else in a box."""
    from ...tasks.answers import extract

    numbers = all(gold and extract(gold, "final").answer == gold for gold in golds)
    return "final" if numbers and parameters < SMALL else "boxed"


def _tokens(texts: Sequence[str], answer: str) -> int:
    """Return how many tokens an answer may have, a multiple of 8: more where questions or solutions are
    long."""
    least, most = TOKENS[answer]
    ranked = sorted(len(text) for text in texts)
    usual = ranked[int(0.9 * (len(ranked) - 1))] // CHARACTERS
    return 8 * -(-min(most, max(least, usual)) // 8)
