"""The recipe as a graph of keyed stages: which stages run, in which order, and why.

key = hash(kind, stage version, settings that change the result, seed, problems, digests of the inputs).
The computation is hashed; the place where it runs and the amount that it prints are not (redun's rule).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
from .decontamination import ContaminationReport, Decontamination, evaluated_problems
from .review import reviews
from .store import Artifact, Store, digest_file, digest_of

QUIET = {"title", "log_every", "save_every", "recompute"}
# of an endpoint: its responses are the same
QUIET |= {"key", "prices", "requests_per_minute", "max_concurrency", "timeout"}
VERSIONS: dict[str, int] = {}  # a kind's version enters its keys: raise it when settings change meaning


@dataclass(frozen=True)
class Node:
    """One stage of a run. `artifact` is its result; `key` is None while an input is missing.

    `queue` is the folder of a stage that people review, `review_bytes` the bytes of reviews that its key
    covers: later reviews do not count. `contamination` lists the rows and problems that the stage leaves out.
    """

    name: str
    stage: Stage
    inputs: tuple[str, ...]
    problems: dict[str, Problems]
    control: str | None = None
    key: str | None = None
    artifact: Artifact | None = None
    queue: Path | None = None
    review_bytes: int | None = None
    endpoints: dict[str, Remote] = field(default_factory=dict)
    contamination: ContaminationReport | None = None

    @property
    def kind(self) -> str:
        """The kind of the stage, such as `rl`."""
        return self.stage.kind

    @property
    def state(self) -> str:
        """`cached`, `waits` (for inputs), `asks` (people to review) or `ready`."""
        if self.artifact:
            return "cached"
        if self.key is None:
            return "waits"
        if self.queue and not reviews.complete(self.queue):
            return "asks"
        return "ready"

    @property
    def dropped(self) -> list[str]:
        """The ids of rows and problems that the stage leaves out, sorted."""
        return sorted(self.contamination.dropped) if self.contamination else []


class Graph:
    """A recipe's nodes in an order in which they can run; `refresh` looks again for artifacts."""

    def __init__(self, recipe: Recipe, store: Store, base: Path):
        """`base` is the folder that the recipe's relative paths start from."""
        self.recipe = resolve_paths(recipe, base)
        self.store = store
        self._files: dict[Path, str] = {}
        tests = evaluated_problems(self.recipe)
        identities = {name: self._source(problems) for name, problems in tests.items()}
        self.decontamination = Decontamination(store, tests, identities)
        self.nodes: dict[str, Node] = {node.name: node for node in nodes_of(self.recipe)}
        self.refresh()

    def refresh(self) -> None:
        """Key every node whose inputs are complete, and find its artifact."""
        for name, node in self.nodes.items():
            if node.artifact:
                continue
            artifacts = self.artifacts_of(node)
            if all(artifacts.values()):
                self.nodes[name] = self._keyed(node, artifacts)

    def check_contamination(self) -> None:
        """Compare all training data with the tests, and key every node anew."""
        self.decontamination.thorough = True
        for name, node in self.nodes.items():
            self.nodes[name] = replace(node, key=None, artifact=None)
        self.refresh()

    def artifacts_of(self, node: Node) -> dict[str, Artifact | None]:
        """The artifacts of a node's inputs by name."""
        return {cited: self.nodes[cited].artifact for cited in node.inputs}

    def _keyed(self, node: Node, artifacts: dict[str, Artifact]) -> Node:
        if isinstance(node.stage, Curate) and not node.stage.auto:
            queue = reviews.queue_folder(self.store.root, artifacts[node.stage.rows].digest)
            node = replace(node, queue=queue, review_bytes=reviews.extent(queue))
        identities = {name: self._source(problems) for name, problems in node.problems.items()}
        report = self.decontamination.compare(node.stage, node.problems, identities, artifacts)
        node = replace(node, contamination=report)
        key = digest_of(self.identity(node))
        return replace(node, key=key, artifact=self.store.find(node.kind, key))

    def identity(self, node: Node) -> dict[str, Any]:
        """Everything that determines a stage's result; its hash is the key."""
        identity = {
            "version": VERSIONS.get(stored_kind(node.kind), 1),
            "settings": self._settings(node.stage),
            "seed": seed_of(self.recipe, node),
            "problems": {name: self._source(problems) for name, problems in node.problems.items()},
            "inputs": {name: artifact.digest for name, artifact in self.artifacts_of(node).items()},
            "control": node.control,
            "files": self._directory(Path(node.stage.path)) if isinstance(node.stage, Load) else None,
            "reviews": reviews.digest(node.queue, node.review_bytes) if node.review_bytes else None,
        }
        if node.dropped:
            identity["dropped"] = node.dropped
        return identity

    def _settings(self, stage: Stage) -> dict[str, Any]:
        """The settings that change a stage's result."""
        configured = {k: v for k, v in stage.model_dump(mode="json").items() if k not in QUIET}
        # in the words of old keys, and without None: neither a new word nor a new option changes a key
        settings = {k: v for k, v in stored(configured).items() if v is not None}
        if isinstance(stage, Evaluate):
            settings = {k: v for k, v in settings.items() if k not in ("models", "forced")}
        if isinstance(stage, Load):  # a model counts by its content, wherever it lies
            settings.pop("path")
        settings.pop("licence", None)  # the permitted uses of a result do not change it
        tables = {name: self._digest(Path(name)) for name in tables_of(stage)}
        if tables:
            settings |= rename_tables(stage, tables)
        return settings

    def _source(self, problems: Problems) -> dict[str, Any]:
        """The settings of a problem source, with a file's digest for its path."""
        settings = problems.model_dump(mode="json", exclude={"licence", "teachers"})
        if isinstance(problems, Files):
            settings["path"] = self._digest(Path(problems.path))
        return settings

    def _directory(self, path: Path) -> dict[str, str]:
        """The digests of all files in a folder by their relative path; of a single file by its name."""
        if not path.is_dir():
            return {path.name: self._digest(path)}
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {file.relative_to(path).as_posix(): self._digest(file) for file in files}

    def _digest(self, path: Path) -> str:
        """The SHA-256 of a file, read once."""
        if path not in self._files:
            self._files[path] = digest_file(path)
        return self._files[path]

    def dependents(self, name: str) -> set[str]:
        """All stages that depend on this one, directly or through others."""
        dependents: set[str] = set()
        for node in self.nodes.values():  # in order, so that one pass finds all
            if name in node.inputs or dependents & set(node.inputs):
                dependents.add(node.name)
        return dependents

    def why(self, node: Node) -> list[str]:
        """The reasons to run a node: its differences from the nearest artifact of the same stage."""
        if node.key is None:
            missing = [name for name in node.inputs if not self.nodes[name].artifact]
            return [f"{', '.join(missing)} must run first"]
        mine = _flat(self.identity(node))
        differences = []
        for artifact in self.store.all():
            if artifact.manifest["stage"] == node.name and artifact.kind == node.kind:
                differences.append(_difference(mine, _flat(artifact.manifest["identity"])))
        if not differences:
            return ["never run"]
        return min(differences, key=len) or ["unchanged"]


# ---------------------------------------------------------------- paths


def resolve_paths(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with absolute paths, so that it means the same wherever it is read.

    Raises LimbeckError for a file or a model that is neither below `base` nor below the working directory.
    """
    problems = dict(recipe.problems)
    for name, source in problems.items():
        if isinstance(source, Files):
            path = _find_file(f"problems.{name}.path", source.path, base)
            problems[name] = source.model_copy(update={"path": path})
    stages = {name: _resolve_stage(name, stage, base) for name, stage in recipe.stages.items()}
    return recipe.model_copy(update={"problems": problems, "stages": stages})


def _resolve_stage(name: str, stage: Stage, base: Path) -> Stage:
    if isinstance(stage, Load):
        from ..model.find import find_model

        path = find_model(stage.path, base, f"stages.{name}.path: ")
        stage = stage.model_copy(update={"path": str(path.resolve())})
    tables = tables_of(stage)
    if tables:
        setting = f"stages.{name}.{table_setting(stage)}"
        paths = {table: _find_file(setting, table, base) for table in tables}
        stage = stage.model_copy(update=rename_tables(stage, paths))
    return stage


def _find_file(setting: str, path: str, base: Path) -> str:
    for place in (base / path, Path(path)):
        if place.is_file():
            return str(place.resolve())
    raise LimbeckError(f"{setting}: {path} is no file, neither beside the recipe nor here")


def tables_of(stage: Stage) -> list[str]:
    """The files outside the store that a stage reads rows from."""
    cited: Iterable[str] = ()
    if isinstance(stage, Calibrate | Reward):
        cited = [stage.rows]
    elif isinstance(stage, DPO):
        cited = stage.pairs
    return [name for name in cited if name.endswith(TABLES)]


def table_setting(stage: Stage) -> str:
    """The setting that names a stage's files."""
    return "pairs" if isinstance(stage, DPO) else "rows"


def rename_tables(stage: Calibrate | Reward | DPO, names: Mapping[str, str]) -> dict[str, Any]:
    """The setting that names a stage's files, with the files renamed as `names` maps them."""
    if isinstance(stage, DPO):
        return {"pairs": {names.get(cited, cited): share for cited, share in stage.pairs.items()}}
    return {"rows": names[stage.rows]}


def seed_of(recipe: Recipe, node: Node) -> str:
    """The root of a stage's random draws; all models of an evaluation share it, and so their problems."""
    return f"{recipe.seed}/{node.name.split('/')[0]}"


# ---------------------------------------------------------------- nodes


def nodes_of(recipe: Recipe) -> list[Node]:
    """A recipe's stages in an order in which they can run, without keys; reads nothing but the recipe."""
    return list(_ordered(_expand(recipe)))


def _expand(recipe: Recipe) -> Iterator[Node]:
    """The nodes of all stages but reports; an evaluation has one for each model."""
    for name, stage in recipe.stages.items():
        if isinstance(stage, Evaluate):
            problems, _ = _problems(recipe, stage)
            for model in stage.models:
                yield Node(f"{name}/{model}", stage, (model,), problems)
            for model in stage.forced:
                yield Node(f"{name}/{model}+forced", stage, (model,), problems, control="forced")
        elif not isinstance(stage, Report):
            yield _node(recipe, name, stage)


def _node(recipe: Recipe, name: str, stage: Stage) -> Node:
    problems, screens = _problems(recipe, stage)
    if isinstance(stage, Curate):  # the policy may need the problems that the rows answer
        problems = {
            cited: source for cited, source in recipe.problems.items() if source.source == "miniature"
        }
    cited = inputs(stage)
    calibrations = [recipe.stages[other] for other in cited if isinstance(recipe.stages[other], Calibrate)]
    cited += [calibration.judge for calibration in calibrations]  # a calibrated judge is asked again
    endpoints = {other: recipe.stages[other] for other in cited if isinstance(recipe.stages[other], Remote)}
    return Node(name, stage, tuple(dict.fromkeys([*cited, *screens])), problems, endpoints=endpoints)


def report_nodes(recipe: Recipe) -> list[tuple[str, Report]]:
    """The report stages by name; they run after all others."""
    return [(name, stage) for name, stage in recipe.stages.items() if isinstance(stage, Report)]


def _problems(recipe: Recipe, stage: Stage) -> tuple[dict[str, Problems], list[str]]:
    """The problem sources of a stage, those behind its screenings included, and the screenings."""
    problems: dict[str, Problems] = {}
    screens: list[str] = []
    for name in sources(stage):
        if name in recipe.problems:
            problems[name] = recipe.problems[name]
        else:
            screens.append(name)
            inner_problems, inner_screens = _problems(recipe, recipe.stages[name])
            problems.update(inner_problems)
            screens += inner_screens
    return problems, screens


def _ordered(nodes: Iterable[Node]) -> Iterator[Node]:
    """Inputs before the nodes that need them, otherwise in the order of the recipe."""
    pending = list(nodes)
    done: set[str] = set()
    while pending:
        node = next(candidate for candidate in pending if done.issuperset(candidate.inputs))
        pending.remove(node)
        done.add(node.name)
        yield node


# ---------------------------------------------------------------- differences


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys: `{"settings.policy.kl_coef": 0.01}`."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _difference(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """A sentence for each key in which two flat identities differ."""
    sentences = []
    for name in {**theirs, **mine}:
        before = theirs.get(name)
        now = mine.get(name)
        if before == now:
            continue
        if name.startswith("inputs."):
            sentences.append(f"input {name.removeprefix('inputs.')} has changed")
        else:
            sentences.append(f"{name.removeprefix('settings.')}: {before!r} -> {now!r}")
    return sentences
