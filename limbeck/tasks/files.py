"""Problems from your own JSONL or Parquet file: GSM8K, MATH, or whatever has a question and an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import recipe
from ..types import Completion, LimbeckError, Problem, Score, fingerprint
from . import answers
from .reward_parts import language_consistency
from .task import judged, written

QUESTIONS = ("problem", "question", "prompt", "input")
ANSWERS = ("answer", "solution", "target")


class FileTask:
    """Rows of a file, split by content: a problem is in `test` wherever in the file its text stands.

    `skipped` counts the rows whose gold answer cannot be read; they are dropped, never rewarded.
    """

    def __init__(self, name: str, settings: recipe.Files, base: Path):
        self.name, self.settings = name, settings
        self.path = base / settings.path
        rows = list(read_table(self.path, settings.limit))
        if not rows:
            raise LimbeckError(f"{self.path}: the file has no rows; give it one problem a line")
        problems = [problem for number, row in rows if (problem := self._problem(number, row))]
        self.skipped = len(rows) - len(problems)
        if 2 * self.skipped > len(rows):
            number, row = next((n, r) for n, r in rows if not self._problem(n, r))
            column = self._columns(number, row)[1]
            raise LimbeckError(
                f"{self.path}: {self.skipped} of {len(rows)} gold answers in column {column} cannot be read, "
                f"the first in line {number}; map problems.{name}.columns.answer to the final answers"
            )
        self._splits = self._split(problems)

    def problems(self, split: str) -> Sequence[Problem]:
        """The problems of `train` or `test`; the same text is never in both."""
        return self._splits[split]

    def score(self, problem: Problem, completion: Completion) -> Score:
        """Accuracy against the row's gold answer, format and language."""
        if problem.answer is None:
            return Score({"accuracy": 0.0}, {"accuracy": "the gold answer cannot be read"}, skipped=True)
        style = self.settings.answer
        return judged(problem, completion, style, lambda answer: answers.judge(problem.answer, answer))

    def _problem(self, number: int, row: Mapping[str, Any]) -> Problem | None:
        question_column, answer_column = self._columns(number, row)
        question, gold = row[question_column], row[answer_column]
        if not isinstance(question, str) or not question.strip():
            raise LimbeckError(
                f"{self.path}, line {number}: {question_column} is not a text; mend or delete the line"
            )
        # true is an int to Python and no answer to anybody
        if isinstance(gold, bool) or not isinstance(gold, str | int | float):
            return None
        answer = answers.gold(str(gold))
        language = row.get(self.settings.columns.get("language", "language"))
        return answer and Problem(
            id=f"{self.name}/{number}",
            prompt=written(self.settings.instruction, question, f"problems.{self.name}"),
            answer=answer,
            language=language if isinstance(language, str) and language else language_of(question),
            origin=f"{self.path.name}:{number}",
            data={"question": question},
        )

    def _columns(self, number: int, row: Mapping[str, Any]) -> tuple[str, str]:
        """The names of the columns of question and answer: as mapped, else the first known one."""
        found = []
        for what, known in (("problem", QUESTIONS), ("answer", ANSWERS)):
            mapped = self.settings.columns.get(what)
            column = next((name for name in ([mapped] if mapped else known) if name in row), None)
            if column is None:
                raise LimbeckError(
                    f"{self.path}, line {number}: no column {mapped or ', '.join(known)} among "
                    f"{', '.join(row) or 'none'}; set problems.{self.name}.columns.{what} to one of them"
                )
            found.append(column)
        return found[0], found[1]

    def _split(self, problems: list[Problem]) -> dict[str, list[Problem]]:
        """The `held_out` texts with the smallest fingerprints are the test, in whatever order they came."""
        place = {
            p.id: fingerprint("split", self.settings.seed, _normalised(p.data["question"])) for p in problems
        }
        ranked = sorted(set(place.values()))
        if len(ranked) <= self.settings.held_out:
            raise LimbeckError(
                f"{self.path}: {len(ranked)} different problems leave none to train on when "
                f"problems.{self.name}.held_out is {self.settings.held_out}; lower it"
            )
        test = set(ranked[: self.settings.held_out])
        return {
            "train": [p for p in problems if place[p.id] not in test],
            "test": [p for p in problems if place[p.id] in test],
        }


def _normalised(question: str) -> str:
    return " ".join(question.lower().split())


def language_of(question: str) -> str:
    return "zh" if (language_consistency(question, "zh") or 0.0) > 0.5 else "en"


def read_table(path: Path, limit: int | None = None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Numbered rows, from 1; blank lines keep their number and are passed over."""
    if not path.is_file():
        raise LimbeckError(f"{path}: no such file; paths are relative to the recipe's folder")
    rows = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    for count, row in enumerate(rows):
        if limit is not None and count >= limit:
            return
        yield row


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise LimbeckError(
                    f"{path}, line {number}: not valid JSON ({error}); mend or delete the line"
                ) from None
            if not isinstance(row, dict):
                raise LimbeckError(f"{path}, line {number}: not a JSON object; write one {{...}} a line")
            yield number, row


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as arrow
    import pyarrow.parquet

    try:
        file = arrow.parquet.ParquetFile(path)
        batches = [batch for batch in file.iter_batches(batch_size=4096)]
    except (arrow.ArrowException, OSError) as error:
        raise LimbeckError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from None
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
