"""What the arena asks: the held-out problems of runs' recipes, and JSONL files that people bring, with or without answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from ..config.load import load
from ..tasks.files import QUESTIONS, language_of, read_table
from ..tasks.registry import open_task
from ..text.reasoning_parser import split_thought
from ..types import LimbeckError, Problem
from .votes import Answer

SAVED = " (saved)"  # after the name of a file whose answers take part


class Questions:
    """Sets of prompts by name: `RUN/PROBLEMS` for those of a recipe, `NAME.jsonl` for files in the studio's folder."""

    def __init__(self, runs: Path, folder: Path):
        self.runs, self.folder = runs, folder

    def names(self) -> list[str]:
        files = [path.name for path in sorted(self.folder.glob("*.jsonl"))]
        return [
            *files,
            *(
                f"{path.parent.name}/{name}"
                for path in sorted(self.runs.glob("*/recipe.yaml"))
                for name in _problems(path, _stamp(path))
            ),
        ]

    def open(self, name: str) -> tuple[Problem, ...]:
        """The prompts of a set; LimbeckError where there is none of that name, or it cannot be read."""
        if name not in self.names():
            raise LimbeckError(f"there is no set of prompts named {name}")
        run, _, problems = name.rpartition("/")
        path = self.runs / run / "recipe.yaml" if run else self.folder / name
        return _held_out(path, problems, _stamp(path)) if run else _prompts(path, _stamp(path))

    def saved(self) -> dict[str, Mapping[str, Answer]]:
        """Answers by prompt of each file that has any, under the name that they fight by."""
        found = {
            f"{path.stem}{SAVED}": _answers(path, _stamp(path))
            for path in sorted(self.folder.glob("*.jsonl"))
        }
        return {name: answers for name, answers in found.items() if answers}

    def add(self, name: str, content: bytes) -> str:
        """Keep a JSONL file of rows with `prompt`, and `completion` where it brings answers; all of it or nothing."""
        stem = re.sub(r"[^\w-]+", "-", Path(name).stem).strip("-")[:60]
        kept = f"{stem or 'prompts'}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{kept}.part"
        part.write_bytes(content)
        try:
            if not _prompts(part, _stamp(part)):
                raise LimbeckError("the file has no rows; give it one prompt a line")
        except LimbeckError as error:
            part.unlink()
            raise LimbeckError(str(error).replace(str(part), name)) from None
        part.replace(self.folder / kept)
        return kept


def _stamp(path: Path) -> int:
    return path.stat().st_mtime_ns


@lru_cache(128)
def _problems(recipe: Path, stamp: int) -> tuple[str, ...]:
    try:
        return tuple(load(recipe).problems)
    except LimbeckError:  # of another version: its run can be looked at, its problems cannot be asked
        return ()


@lru_cache(16)
def _held_out(recipe: Path, name: str, stamp: int) -> tuple[Problem, ...]:
    return tuple(open_task(name, load(recipe).problems[name], recipe.parent).problems("test"))


@lru_cache(16)
def _prompts(path: Path, stamp: int) -> tuple[Problem, ...]:
    return tuple(_problem(path, number, prompt) for number, prompt, _ in _rows(path))


@lru_cache(16)
def _answers(path: Path, stamp: int) -> Mapping[str, Answer]:
    told = {prompt: split_thought(said) for _, prompt, said in _rows(path) if said}
    return {prompt: Answer(thought.answer, thought.thought) for prompt, thought in told.items()}


def _rows(path: Path) -> list[tuple[int, str, str]]:
    """Line, prompt and completion of each row; a row without a prompt is an error that names it."""
    found = []
    for number, row in read_table(path):
        prompt = next(
            (row[name] for name in QUESTIONS if isinstance(row.get(name), str) and row[name].strip()), None
        )
        if prompt is None:
            raise LimbeckError(
                f"{path}, line {number}: there is no text under {', '.join(QUESTIONS)}; put the prompt under one of them"
            )
        said = row.get("completion", "")
        found.append((number, prompt, said if isinstance(said, str) else ""))
    return found


def _problem(path: Path, number: int, prompt: str) -> Problem:
    return Problem(
        f"{path.name}/{number}", prompt, language=language_of(prompt), origin=f"{path.name}:{number}"
    )
