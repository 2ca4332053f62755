"""Prompt sets of the arena: held-out problems of the runs' recipes, and uploaded JSONL files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..config.load import load
from ..tasks.files import QUESTIONS, language_of, read_table
from ..tasks.registry import open_task
from ..text.reasoning_parser import split_thought
from ..types import LimbeckError, Problem
from .votes import Answer

SAVED_SUFFIX = " (saved)"  # marks a file whose saved answers take part as if a model gave them
MAX_NAME_CHARACTERS = 60  # characters of an uploaded file's name


class Questions:
    """Prompt sets by name.

    `RUN/PROBLEMS` is the set of held-out problems with the name PROBLEMS in the recipe of the run RUN.
    `NAME.jsonl` is an uploaded file in `folder`.
    """

    def __init__(self, runs: Path, folder: Path):
        self.runs = runs
        self.folder = folder

    def names(self) -> list[str]:
        """Return the names of all sets: uploaded files first, then the problems of each run."""
        names = [path.name for path in self._files()]
        for path in sorted(self.runs.glob("*/recipe.yaml")):
            names += [f"{path.parent.name}/{problems}" for problems in _problem_names(path, _mtime(path))]
        return names

    def open(self, name: str) -> tuple[Problem, ...]:
        """Return the prompts of a set, as problems.

        Raises LimbeckError for an unknown name or an unreadable file.
        """
        if name not in self.names():
            raise LimbeckError(f"there is no set of prompts named {name}")
        run, _, problems = name.rpartition("/")
        if run:
            path = self.runs / run / "recipe.yaml"
            return _held_out_problems(path, problems, _mtime(path))
        path = self.folder / name
        return _file_problems(path, _mtime(path))

    def saved(self) -> dict[str, Mapping[str, Answer]]:
        """Return the answers that uploaded files have saved, as file's contestant name -> prompt -> answer.

        A file that has saved answers takes part in battles like a model, as the contestant `NAME (saved)`.
        """
        saved: dict[str, Mapping[str, Answer]] = {}
        for path in self._files():
            answers = _saved_answers(path, _mtime(path))
            if answers:
                saved[f"{path.stem}{SAVED_SUFFIX}"] = answers
        return saved

    def add(self, name: str, content: bytes) -> str:
        """Store an uploaded JSONL file of this name, and return the name under which it is stored.

        Each row has `prompt` and, if it has a saved answer, `completion`.

        Raises LimbeckError, and stores nothing, for a file without rows and for a row without a prompt.
        """
        stem = re.sub(r"[^\w-]+", "-", Path(name).stem).strip("-")[:MAX_NAME_CHARACTERS]
        file_name = f"{stem or 'prompts'}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{file_name}.part"
        part.write_bytes(content)
        try:
            if not _file_problems(part, _mtime(part)):
                raise LimbeckError("the file has no rows; give it one prompt a line")
        except LimbeckError as error:
            part.unlink()
            raise LimbeckError(str(error).replace(str(part), name)) from None
        part.replace(self.folder / file_name)
        return file_name

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))


def _mtime(path: Path) -> int:
    """Return the time of a file's last change in nanoseconds.

    It is a part of the keys of the caches below.
    """
    return path.stat().st_mtime_ns


@lru_cache(128)
def _problem_names(recipe: Path, mtime: int) -> tuple[str, ...]:
    """Return the names under which a recipe has problems.

    Empty for a recipe that this version of Limbeck cannot read. `mtime` is only a part of the cache's key.
    """
    try:
        return tuple(load(recipe).problems)
    except LimbeckError:
        return ()


@lru_cache(16)
def _held_out_problems(recipe: Path, name: str, mtime: int) -> tuple[Problem, ...]:
    settings = load(recipe).problems[name]
    task = open_task(name, settings, recipe.parent)
    return tuple(task.problems("test"))


@lru_cache(16)
def _file_problems(path: Path, mtime: int) -> tuple[Problem, ...]:
    return tuple(_problem(path, line, prompt) for line, prompt, _ in _rows(path))


@lru_cache(16)
def _saved_answers(path: Path, mtime: int) -> Mapping[str, Answer]:
    """Return the saved answers of a file by prompt; if a prompt has several, the last one.

    `mtime` is only a part of the cache's key.
    """
    answers: dict[str, Answer] = {}
    for _, prompt, completion in _rows(path):
        if completion:
            parts = split_thought(completion)
            answers[prompt] = Answer(parts.answer, parts.thought)
    return answers


def _rows(path: Path) -> list[tuple[int, str, str]]:
    """Return the line number, the prompt and the completion of each row; the completion may be empty.

    Raises LimbeckError for a row without a prompt.
    """
    rows = []
    for line, row in read_table(path):
        prompt = _prompt(row)
        if prompt is None:
            columns = ", ".join(QUESTIONS)
            raise LimbeckError(
                f"{path}, line {line}: there is no text under {columns}; put the prompt under one of them"
            )
        completion = row.get("completion", "")
        rows.append((line, prompt, completion if isinstance(completion, str) else ""))
    return rows


def _prompt(row: Mapping[str, Any]) -> str | None:
    """Return the text of the first column that holds a prompt, None if there is no such column."""
    for column in QUESTIONS:
        text = row.get(column)
        if isinstance(text, str) and text.strip():
            return text
    return None


def _problem(path: Path, line: int, prompt: str) -> Problem:
    name = path.name
    return Problem(f"{name}/{line}", prompt, language=language_of(prompt), origin=f"{name}:{line}")
