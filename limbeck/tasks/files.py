"""Problems from a JSONL or Parquet file, such as GSM8K or MATH: any file whose rows have a question and an
answer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import recipe
from ..types import Completion, LimbeckError, Problem, Score, fingerprint
from . import answers
from .rewards import fill_template, grade, language_consistency
from .worked_steps import write_response

QUESTIONS = ("problem", "question", "prompt", "input")
ANSWERS = ("answer", "solution", "target")
PARQUET_BATCH = 4096  # rows

Row = Mapping[str, Any]


class FileTask:
    """The problems in the rows of a file. Train and test are split by the text of the question, so a question
    that is in `test` is there wherever in the file it stands. `name` is the task's key in the recipe; the
    file's path is relative to `base`.

    `skipped` counts the rows whose gold (reference) answer is unreadable, which are dropped. Raises
    LimbeckError for an unreadable file, missing columns, or if more than half of the gold answers are
    unreadable.
    """

    def __init__(self, name: str, settings: recipe.Files, base: Path):
        self.name = name
        self.settings = settings
        self.path = base / settings.path
        rows = list(read_table(self.path, settings.limit))
        if not rows:
            raise LimbeckError(f"{self.path}: the file has no rows; give it one problem a line")
        problems: list[Problem] = []
        unreadable: list[tuple[int, Row]] = []
        for number, row in rows:
            problem = self._problem(number, row)
            if problem:
                problems.append(problem)
            else:
                unreadable.append((number, row))
        self.skipped = len(unreadable)
        if 2 * self.skipped > len(rows):
            number, row = unreadable[0]
            _, column = self._columns(number, row)
            raise LimbeckError(
                f"{self.path}: {self.skipped} of {len(rows)} gold answers in column {column} cannot be read, "
                f"the first in line {number}; map problems.{name}.columns.answer to the final answers"
            )
        self._splits = self._split(problems)

    def problems(self, split: str) -> Sequence[Problem]:
        """Return the problems of the split `train` or `test`. No question is in both."""
        return self._splits[split]

    def score(self, problem: Problem, completion: Completion) -> Score:
        """Return the score of a completion: accuracy against the row's gold answer, format, and language."""
        gold = problem.answer
        if gold is None:
            return Score({"accuracy": 0.0}, {"accuracy": "the gold answer cannot be read"}, skipped=True)
        return grade(problem, completion, self.settings.answer, lambda answer: answers.judge(gold, answer))

    def work_out(self, problem: Problem) -> str | None:
        """Return a response with the worked steps of the sum in the question, None if there is none."""
        return write_response(problem.data["question"], self.settings.answer)

    def _problem(self, number: int, row: Row) -> Problem | None:
        """Return the problem of row `number`, or None if its gold answer is unreadable. Raises LimbeckError
        if the question is not a text."""
        question_column, answer_column = self._columns(number, row)
        question = row[question_column]
        if not isinstance(question, str) or not question.strip():
            raise LimbeckError(
                f"{self.path}, line {number}: {question_column} is not a text; mend or delete the line"
            )
        answer = _gold_answer(row[answer_column])
        if not answer:
            return None
        language = row.get(self.settings.columns.get("language", "language"))
        if not isinstance(language, str) or not language:
            language = language_of(question)
        return Problem(
            id=f"{self.name}/{number}",
            prompt=fill_template(self.settings.template, question, f"problems.{self.name}"),
            answer=answer,
            language=language,
            origin=f"{self.path.name}:{number}",
            data={"question": question},
            system=self.settings.system or "",
            template=self.settings.template,
        )

    def _columns(self, number: int, row: Row) -> tuple[str, str]:
        """Return the names of the columns that hold the question and the answer."""
        return self._column("problem", QUESTIONS, number, row), self._column("answer", ANSWERS, number, row)

    def _column(self, role: str, defaults: Sequence[str], number: int, row: Row) -> str:
        """Return the column that the recipe maps to `role` ("problem" or "answer"), or else the first of
        `defaults` that the row has. Raises LimbeckError if the row has no such column."""
        mapped = self.settings.columns.get(role)
        for name in [mapped] if mapped else defaults:
            if name in row:
                return name
        raise LimbeckError(
            f"{self.path}, line {number}: no column {mapped or ', '.join(defaults)} among "
            f"{', '.join(row) or 'none'}; set problems.{self.name}.columns.{role} to one of them"
        )

    def _split(self, problems: list[Problem]) -> dict[str, list[Problem]]:
        """Return the problems of `train` and `test`. The test has the `held_out` different questions with the
        smallest fingerprints (hashes), so the split does not depend on the order of the rows."""
        prints: dict[str, int] = {}
        for problem in problems:
            text = _normalise(problem.data["question"])
            prints[problem.id] = fingerprint("split", self.settings.seed, text)
        ranked = sorted(set(prints.values()))
        if len(ranked) <= self.settings.held_out:
            raise LimbeckError(
                f"{self.path}: {len(ranked)} different problems leave none to train on when "
                f"problems.{self.name}.held_out is {self.settings.held_out}; lower it, or add rows"
            )
        test = set(ranked[: self.settings.held_out])
        return {
            "train": [problem for problem in problems if prints[problem.id] not in test],
            "test": [problem for problem in problems if prints[problem.id] in test],
        }


def _gold_answer(value: Any) -> str | None:
    """Return the gold answer in a column's value, or None if the value is neither text nor number or cannot
    be read as an answer."""
    if isinstance(value, bool):  # an int to Python
        return None
    if not isinstance(value, str | int | float):
        return None
    return answers.parse_gold(str(value))


def _normalise(question: str) -> str:
    return " ".join(question.lower().split())


def language_of(question: str) -> str:
    """Return "zh" if more than half of the question's words are Chinese characters, else "en"."""
    return "zh" if (language_consistency(question, "zh") or 0.0) > 0.5 else "en"


def read_table(path: Path, limit: int | None = None) -> Iterator[tuple[int, Row]]:
    """Yield at most `limit` rows of a file, each with its number, starting at 1. Blank lines of a JSONL file
    are skipped but counted, so that a number is that of a line.

    Raises LimbeckError for a missing file or an invalid row.
    """
    if not path.is_file():
        raise LimbeckError(f"{path}: no such file; paths are relative to the recipe's folder")
    rows = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    for count, row in enumerate(rows):
        if limit is not None and count >= limit:
            return
        yield row


def _jsonl(path: Path) -> Iterator[tuple[int, Row]]:
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


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow as arrow
    import pyarrow.parquet

    try:
        file = arrow.parquet.ParquetFile(path)
        batches = list(file.iter_batches(batch_size=PARQUET_BATCH))
    except (arrow.ArrowException, OSError) as error:
        raise LimbeckError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from None
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from enumerate(rows, start=1)
