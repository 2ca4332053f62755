"""Decontamination: leaving rows and problems that are too similar to the recipe's test problems out of
training.

The ids of the rows and problems left out are hashed into a stage's key only if there are any. A recipe that
evaluates on one more problem source therefore trains a stage again only if problems of that source turn up in
the stage's training data. The reports are kept in the store, under the hash of the data compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..config.recipe import Evaluate, Problems, Recipe, Stage
from ..config.validate import MODELS
from ..run_log import read
from ..types import Task
from .dataset_rows import PROBLEMS, ROWS, response_text
from .store import Artifact, Store, digest_of, write

if TYPE_CHECKING:
    from ..tasks.contamination import ContaminationIndex

VERSION = 1  # of the comparison: raise it when the same texts get another result
REPORTS = ".decontamination"  # folder in the store
LEARNS_FROM_ROWS = (MODELS | {"reward"}) - {"load", "pretrain"}  # kinds that train on rows, if they cite any
DRAWS_NO_PROBLEMS = {"pretrain", "curate", "evaluate", "load", "remote"}  # kinds without training problems


@dataclass(frozen=True)
class ContaminationReport:
    """The result of one comparison of training data with test problems:
    `ContaminationReport({"clock": 438}, 896, {"mine/17": "asks the same as clock/..."})` compared 896 texts
    with the 438 test problems of `clock` and leaves out one.

    `against` maps each evaluated source to the number of its test problems, `checked` is the number of rows
    and problems compared with them, and `dropped` maps each id to leave out to the reason.
    """

    against: dict[str, int] = field(default_factory=dict)
    checked: int = 0
    dropped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Text:
    """A row or a problem to compare with the tests: its id, its prompt, and its response ("" for a
    problem)."""

    id: str
    prompt: str
    response: str = ""


def evaluated_problems(recipe: Recipe) -> dict[str, Problems]:
    """Return, by name, the problem sources on whose test problems an evaluation of the recipe measures a
    model."""
    evaluated: dict[str, Problems] = {}
    for stage in recipe.stages.values():
        if isinstance(stage, Evaluate):
            for name in stage.problems:
                evaluated[name] = recipe.problems[name]
    return evaluated


class Decontamination:
    """Compares the training data of stages with the recipe's test problems.

    If `thorough` is True, `compare` compares data that has no stored report; otherwise it only reads stored
    reports.
    """

    def __init__(self, store: Store, tests: Mapping[str, Problems], identities: Mapping[str, Any]):
        """Set up for the evaluated problem sources `tests`. `identities` maps the name of each of those
        sources to the settings and file digest that determine its problems."""
        self.store = store
        self.tests = tests
        self.identities = identities
        self.thorough = False
        self._sieves: dict[str, ContaminationIndex] = {}
        self._tasks: dict[str, Task] = {}

    def compare(
        self,
        stage: Stage,
        problems: Mapping[str, Problems],
        identities: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
    ) -> ContaminationReport | None:
        """Return the contamination report of one stage. Return None if the stage has no training data to
        compare, or if no report is stored and `thorough` is off.

        `problems` are the stage's own problem sources, `identities` the settings and file digests that
        determine their problems, `inputs` the artifacts that the stage reads.
        """
        drawn = {} if stage.kind in DRAWS_NO_PROBLEMS else problems
        rows = _with_file(inputs, ROWS) if stage.kind in LEARNS_FROM_ROWS else {}
        screened = _with_file(inputs, PROBLEMS)
        if not self.tests or not (drawn or rows or screened):
            return None
        compared = {
            "version": VERSION,
            "tests": self.identities,
            "drawn": {name: identities[name] for name in drawn},
            "given": {name: artifact.digest for name, artifact in {**rows, **screened}.items()},
        }
        path = self.store.root / REPORTS / f"{digest_of(compared)[:16]}.json"
        if path.exists():
            return ContaminationReport(**json.loads(path.read_text(encoding="utf-8")))
        if not self.thorough:
            return None
        texts = [*self._problem_texts(drawn), *_row_texts(rows, ROWS), *_row_texts(screened, PROBLEMS)]
        report = self._sift(texts)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(asdict(report), ensure_ascii=False) + "\n")
        return report

    def _sift(self, texts: list[_Text]) -> ContaminationReport:
        """Compare the texts with all tests and return the report."""
        for name in self.tests:
            if name not in self._sieves:
                self._sieves[name] = self._make_sieve(name)
        dropped = {}
        for text in texts:
            fault = self._find_fault(text)
            if fault:
                dropped[text.id] = fault
        against = {name: len(sieve.ids) for name, sieve in self._sieves.items()}
        return ContaminationReport(against, len(texts), dropped)

    def _make_sieve(self, name: str) -> ContaminationIndex:
        """Build the index of the test problems of the evaluated source `name`."""
        from ..tasks.contamination import ContaminationIndex

        prompts = {}
        questions = {}
        for problem in self._task(name, self.tests[name]).problems("test"):
            prompts[problem.id] = problem.prompt
            if "question" in problem.data:
                questions[problem.id] = str(problem.data["question"])
        return ContaminationIndex(prompts, questions)

    def _find_fault(self, text: _Text) -> str | None:
        """Return the reason why a text is too similar to a test problem, None if it is not."""
        for sieve in self._sieves.values():
            fault = sieve.fault(text.id, text.prompt, text.response)
            if fault:
                return fault
        return None

    def _problem_texts(self, drawn: Mapping[str, Problems]) -> Iterator[_Text]:
        """Yield the training problems of the problem sources `drawn`."""
        for name, problems in drawn.items():
            for problem in self._task(name, problems).problems("train"):
                yield _Text(problem.id, problem.prompt)

    def _task(self, name: str, problems: Problems) -> Task:
        """Open the task of a problem source; each source is opened once."""
        from ..tasks.registry import open_task

        if name not in self._tasks:
            self._tasks[name] = open_task(name, problems)
        return self._tasks[name]


def _with_file(inputs: Mapping[str, Artifact], file: str) -> dict[str, Artifact]:
    """Return the inputs whose artifact's folder has a file named `file`."""
    return {name: artifact for name, artifact in inputs.items() if (artifact.folder / file).exists()}


def _row_texts(artifacts: Mapping[str, Artifact], file: str) -> Iterator[_Text]:
    """Yield the rows or problems in the file named `file` of each artifact."""
    for artifact in artifacts.values():
        for row in read(artifact.folder / file):
            yield _Text(row["id"], _prompt_text(row["prompt"]), response_text(row))


def _prompt_text(prompt: str | Iterable[Mapping[str, Any]]) -> str:
    """Return a prompt as text: a string unchanged, chat messages as the lines of their contents."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message.get("content", "")) for message in prompt)
