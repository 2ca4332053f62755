"""What to run, in which order, and why: the recipe as a graph of keyed stages.

key = hash(kind, stage version, settings that change the result, seed, problems, digests of the inputs).
What you compute is hashed; where and how chattily you compute it is not (redun's law).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config.aliases import stored, stored_kind
from ..config.learned_rewards import TABLES, Calibrate, Reward
from ..config.methods import DPO
from ..config.recipe import (
    Curate,
    Evaluate,
    Files,
    Load,
    Problems,
    Recipe,
    Remote,
    Report,
    Stage,
    inputs,
    sources,
)
from ..types import LimbeckError
from .decontamination import Decontamination, Finding, tested
from .review import reviews
from .store import Artifact, Store, digest_file, digest_of

QUIET = {"title", "log_every", "save_every", "recompute"}
QUIET |= {
    "key",
    "prices",
    "requests_per_minute",
    "max_concurrency",
    "timeout",
}  # of an endpoint: what it says is the same
VERSIONS: dict[str, int] = {}  # a kind's version enters its keys: raise it when settings change meaning


@dataclass(frozen=True)
class Node:
    """One stage of a run. `state` is cached, ready, waits (for inputs) or asks (a person).

    `said` is how many bytes of the queue's reviews its key knows of: those count, whatever people say meanwhile.
    """

    name: str
    stage: Stage
    inputs: tuple[str, ...]
    problems: dict[str, Problems]
    control: str | None = None
    key: str | None = None
    artifact: Artifact | None = None
    queue: Path | None = None
    said: int | None = None
    endpoints: dict[str, Remote] = field(default_factory=dict)
    finding: Finding | None = None

    @property
    def kind(self) -> str:
        return self.stage.kind

    @property
    def state(self) -> str:
        if self.artifact:
            return "cached"
        if self.key is None:
            return "waits"
        return "asks" if self.queue and not reviews.complete(self.queue) else "ready"


class Graph:
    """A recipe's nodes in the order in which they can run; `refresh` looks again at what is complete."""

    def __init__(self, recipe: Recipe, store: Store, base: Path):
        self.recipe, self.store = resolve_paths(recipe, base), store
        self._files: dict[Path, str] = {}
        tests = tested(self.recipe)
        self.decontamination = Decontamination(
            store, tests, {name: self._source(problems) for name, problems in tests.items()}
        )
        self.nodes: dict[str, Node] = {node.name: node for node in nodes_of(self.recipe)}
        self.refresh()

    def refresh(self) -> None:
        """Key every node whose inputs are complete, and find its artifact."""
        for name, node in self.nodes.items():
            if node.artifact:
                continue
            given = {cited: self.nodes[cited].artifact for cited in node.inputs}
            if all(given.values()):
                self.nodes[name] = self._keyed(node, given)

    def check_contamination(self) -> None:
        """Key every node anew, once what it learns from has been compared with the tests."""
        self.decontamination.thorough = True
        self.nodes = {name: replace(node, key=None, artifact=None) for name, node in self.nodes.items()}
        self.refresh()

    def _keyed(self, node: Node, given: dict[str, Artifact]) -> Node:
        queue = None
        if isinstance(node.stage, Curate) and not node.stage.auto:
            queue = self.store.root / ".queues" / given[node.stage.rows].digest[:16]
        own = {name: self._source(problems) for name, problems in node.problems.items()}
        said = reviews.extent(queue) if queue else None
        node = replace(
            node,
            queue=queue,
            said=said,
            finding=self.decontamination.look(node.stage, node.problems, own, given),
        )
        key = digest_of(self.identity(node))
        return replace(node, key=key, artifact=self.store.find(node.kind, key))

    def identity(self, node: Node) -> dict[str, Any]:
        """Everything that makes a stage's result what it is; its hash is the key."""
        given = {cited: self.nodes[cited].artifact for cited in node.inputs}
        told = {k: v for k, v in node.stage.model_dump(mode="json").items() if k not in QUIET}
        # in the words of old keys, and without None: neither a new word nor a new option changes a key
        settings = {k: v for k, v in stored(told).items() if v is not None}
        if isinstance(node.stage, Evaluate):
            settings = {k: v for k, v in settings.items() if k not in ("models", "forced")}
        if isinstance(node.stage, Load):  # what a model is counts, not where it lies
            settings.pop("path")
        settings.pop("licence", None)  # what may be done with a result changes no result
        if tables := {name: self._digest(Path(name)) for name in tables_of(node.stage)}:
            settings |= renamed(node.stage, tables)
        return {
            "version": VERSIONS.get(stored_kind(node.kind), 1),
            "settings": settings,
            "seed": seed_of(self.recipe, node),
            "problems": {name: self._source(problems) for name, problems in node.problems.items()},
            "inputs": {name: artifact.digest for name, artifact in given.items()},
            "control": node.control,
            "files": self._directory(Path(node.stage.path)) if isinstance(node.stage, Load) else None,
            "reviews": reviews.digest(node.queue, node.said) if node.said else None,
            **({"dropped": sorted(node.finding.dropped)} if node.finding and node.finding.dropped else {}),
        }

    def _source(self, problems: Problems) -> dict[str, Any]:
        settings = problems.model_dump(mode="json", exclude={"licence", "teachers"})
        if isinstance(problems, Files):
            settings["path"] = self._digest(Path(problems.path))
        return settings

    def _directory(self, place: Path) -> dict[str, str]:
        files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
        return {p.relative_to(place).as_posix() if place.is_dir() else p.name: self._digest(p) for p in files}

    def _digest(self, path: Path) -> str:
        if path not in self._files:
            self._files[path] = digest_file(path)
        return self._files[path]

    def dependents(self, name: str) -> set[str]:
        """All stages that cannot run before this one has."""
        found: set[str] = set()
        for node in self.nodes.values():  # in order, so that one pass finds all
            if name in node.inputs or found & set(node.inputs):
                found.add(node.name)
        return found

    def why(self, node: Node) -> list[str]:
        """Which parts of a node's identity differ from the nearest artifact of the same name, if there is one."""
        if node.key is None:
            waiting = [name for name in node.inputs if not self.nodes[name].artifact]
            return [f"{', '.join(waiting)} must run first"]
        earlier = [a for a in self.store.all() if a.manifest["stage"] == node.name and a.kind == node.kind]
        if not earlier:
            return ["never run"]
        mine = _flat(self.identity(node))
        differences = [_difference(mine, _flat(a.manifest["identity"])) for a in earlier]
        return min(differences, key=len) or ["unchanged"]


def resolve_paths(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with absolute paths, so that it means the same wherever it is read."""
    from ..model.find import find_model

    problems, stages = dict(recipe.problems), dict(recipe.stages)
    for name, source in problems.items():
        if isinstance(source, Files):
            problems[name] = source.model_copy(update={"path": str(_find_file(name, source.path, base))})
    for name, stage in stages.items():
        if isinstance(stage, Load):
            place = find_model(stage.path, base, f"stages.{name}.path: ")
            stages[name] = stage.model_copy(update={"path": str(place.resolve())})
        if tables := tables_of(stage):
            places = {
                table: next((p for p in (base / table, Path(table)) if p.is_file()), None) for table in tables
            }
            if missing := [table for table, place in places.items() if place is None]:
                raise LimbeckError(
                    f"stages.{name}.{key_of(stage)}: {missing[0]} is no file, neither beside the recipe nor here"
                )
            stages[name] = stage.model_copy(
                update=renamed(stage, {table: str(place.resolve()) for table, place in places.items()})
            )
    return recipe.model_copy(update={"problems": problems, "stages": stages})


def tables_of(stage: Stage) -> list[str]:
    """The files of people's that a stage reads rows from."""
    given = (
        [stage.rows]
        if isinstance(stage, Calibrate | Reward)
        else stage.pairs
        if isinstance(stage, DPO)
        else []
    )
    return [name for name in given if name.endswith(TABLES)]


def key_of(stage: Stage) -> str:
    """The setting that names a stage's files."""
    return "pairs" if isinstance(stage, DPO) else "rows"


def renamed(stage: Calibrate | Reward | DPO, names: Mapping[str, str]) -> dict[str, Any]:
    """That setting, with other names for the files."""
    if isinstance(stage, DPO):
        return {"pairs": {names.get(given, given): share for given, share in stage.pairs.items()}}
    return {"rows": names[stage.rows]}


def seed_of(recipe: Recipe, node: Node) -> str:
    """The root of a stage's randomness; all models of an evaluation share theirs, and so their problems."""
    return f"{recipe.seed}/{node.name.split('/')[0]}"


def nodes_of(recipe: Recipe) -> list[Node]:
    """A recipe's stages in the order in which they can run, without keys: nothing is read but the recipe."""
    return list(_ordered(_expand(recipe)))


def _expand(recipe: Recipe) -> Iterator[Node]:
    """Stages as nodes: one for each model of an evaluation, and a report after everything else."""
    for name, stage in recipe.stages.items():
        problems, screens = _problems(recipe, stage)
        if isinstance(stage, Evaluate):
            for model in stage.models:
                yield Node(f"{name}/{model}", stage, (model,), problems)
            for model in stage.forced:
                yield Node(f"{name}/{model}+forced", stage, (model,), problems, control="forced")
        elif not isinstance(stage, Report):
            cited = inputs(stage)
            cited += [
                c.judge for c in (recipe.stages[n] for n in cited) if isinstance(c, Calibrate)
            ]  # who cites one asks its judge
            if isinstance(stage, Curate):  # the policy may need to know the problems that the rows answer
                problems = {n: p for n, p in recipe.problems.items() if p.source == "miniature"}
            endpoints = {n: recipe.stages[n] for n in cited if isinstance(recipe.stages[n], Remote)}
            yield Node(name, stage, tuple(dict.fromkeys([*cited, *screens])), problems, endpoints=endpoints)


def report_nodes(recipe: Recipe) -> list[tuple[str, Report]]:
    return [(name, stage) for name, stage in recipe.stages.items() if isinstance(stage, Report)]


def _problems(recipe: Recipe, stage: Stage) -> tuple[dict[str, Problems], list[str]]:
    """The sources that a stage draws on, those behind screenings included; and the screenings."""
    found: dict[str, Problems] = {}
    screens: list[str] = []
    for name in sources(stage):
        if name in recipe.problems:
            found[name] = recipe.problems[name]
        else:
            screens.append(name)
            behind, deeper = _problems(recipe, recipe.stages[name])
            found.update(behind)
            screens += deeper
    return found, screens


def _ordered(nodes: Iterator[Node]) -> Iterator[Node]:
    """Inputs before those who need them, otherwise as written."""
    waiting, done = list(nodes), set()
    while waiting:
        node = next(n for n in waiting if done.issuperset(n.inputs))
        waiting.remove(node)
        done.add(node.name)
        yield node


def _find_file(name: str, path: str, base: Path) -> Path:
    for place in (base / path, Path(path)):
        if place.is_file():
            return place.resolve()
    raise LimbeckError(f"problems.{name}.path: {path} is no file, neither beside the recipe nor here")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v
        for key, inner in value.items()
        for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }


def _difference(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    names = [n for n in {**theirs, **mine} if mine.get(n) != theirs.get(n)]
    return [
        f"input {n.removeprefix('inputs.')} has changed"
        if n.startswith("inputs.")
        else f"{n.removeprefix('settings.')}: {theirs.get(n)!r} -> {mine.get(n)!r}"
        for n in names
    ]
