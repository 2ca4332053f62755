"""Before anything learns: rows and problems that are too near to what the recipe's evaluations ask are left out.

What is left out is part of a stage's key, and only where there is something: a recipe that evaluates on one more source
trains nothing again unless that source turns up in what it trained on. Findings are kept in the store, by what was compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..config.recipe import Evaluate, Problems, Recipe, Stage
from ..config.validate import MODELS
from ..run_log import read
from ..types import Task
from .dataset_rows import PROBLEMS, ROWS, said
from .store import Artifact, Store, digest_of, write

VERSION = 1  # raise it when the same texts begin to be judged otherwise
FINDINGS = ".decontamination"
TAUGHT = (MODELS | {"reward"}) - {"load", "pretrain"}  # kinds that learn from rows, if they are given any
UNTAUGHT = {"pretrain", "curate", "evaluate", "load", "remote"}  # kinds that draw on no training problems


@dataclass(frozen=True)
class Finding:
    """What was compared and what came of it: `Finding({"clock": 438}, 896, {"mine/17": "asks the same as clock/..."})`."""

    against: dict[str, int] = field(default_factory=dict)
    checked: int = 0
    dropped: dict[str, str] = field(default_factory=dict)


def tested(recipe: Recipe) -> dict[str, Problems]:
    """The problems whose held-out part some evaluation of the recipe asks."""
    names = (
        name for stage in recipe.stages.values() if isinstance(stage, Evaluate) for name in stage.problems
    )
    return {name: recipe.problems[name] for name in dict.fromkeys(names)}


class Decontamination:
    """Finds, for each stage that learns or samples, what it must leave out. `thorough` looks where nobody has looked;
    without it only what was found before is known."""

    def __init__(self, store: Store, tests: Mapping[str, Problems], identities: Mapping[str, Any]):
        self.store, self.tests, self.identities, self.thorough = store, tests, identities, False
        self._sieves: dict[str, Any] = {}
        self._tasks: dict[str, Task] = {}

    def look(
        self,
        stage: Stage,
        problems: Mapping[str, Problems],
        own: Mapping[str, Any],
        given: Mapping[str, Artifact],
    ) -> Finding | None:
        """The finding for one stage, None where there is nothing to compare or, unless thorough, nobody has."""
        drawn = {} if stage.kind in UNTAUGHT else problems
        rows = {name: a for name, a in given.items() if _has(a, ROWS)} if stage.kind in TAUGHT else {}
        kept = {name: a for name, a in given.items() if _has(a, PROBLEMS)}
        if not self.tests or not (drawn or rows or kept):
            return None
        compared = {
            "version": VERSION,
            "tests": self.identities,
            "drawn": {name: own[name] for name in drawn},
            "given": {name: a.digest for name, a in {**rows, **kept}.items()},
        }
        path = self.store.root / FINDINGS / f"{digest_of(compared)[:16]}.json"
        if path.exists():
            return Finding(**json.loads(path.read_text(encoding="utf-8")))
        if not self.thorough:
            return None
        found = self._sift([*self._texts(drawn), *_given(rows, ROWS), *_given(kept, PROBLEMS)])
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(asdict(found), ensure_ascii=False) + "\n")
        return found

    def _sift(self, texts: list[tuple[str, str, str]]) -> Finding:
        from ..tasks.contamination import Sieve

        for name in self.tests:
            if name not in self._sieves:
                held_out = self._task(name, self.tests[name]).problems("test")
                questions = {p.id: str(p.data["question"]) for p in held_out if "question" in p.data}
                self._sieves[name] = Sieve({p.id: p.prompt for p in held_out}, questions)
        dropped = {}
        for id, prompt, rest in texts:
            faults = (sieve.fault(id, prompt, rest) for sieve in self._sieves.values())
            if fault := next(filter(None, faults), None):
                dropped[id] = fault
        return Finding({name: len(sieve.ids) for name, sieve in self._sieves.items()}, len(texts), dropped)

    def _texts(self, drawn: Mapping[str, Problems]) -> Iterator[tuple[str, str, str]]:
        for name, problems in drawn.items():
            for problem in self._task(name, problems).problems("train"):
                yield problem.id, problem.prompt, ""

    def _task(self, name: str, problems: Problems) -> Task:
        from ..tasks.task import open_task

        if name not in self._tasks:
            self._tasks[name] = open_task(name, problems)
        return self._tasks[name]


def _given(artifacts: Mapping[str, Artifact], name: str) -> Iterator[tuple[str, str, str]]:
    for artifact in artifacts.values():
        for row in read(artifact.folder / name):
            yield row["id"], _text(row["prompt"]), said(row)


def _text(prompt: Any) -> str:
    return (
        prompt
        if isinstance(prompt, str)
        else "\n".join(str(message.get("content", "")) for message in prompt)
    )


def _has(artifact: Artifact, name: str) -> bool:
    return Path(artifact.folder / name).exists()
