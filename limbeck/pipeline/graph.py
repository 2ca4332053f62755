"""The recipe as a graph of stages, which decides the stages that must run, in which order, and why.

Each stage has a key = hash(kind, version of the kind, settings that change the result, seed, problems,
digests of the inputs). A stage whose key has an artifact (a finished result folder) in the store does not run
again. Settings that only change where a stage runs or how much it logs are not hashed, as in the workflow
engine redun.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config.aliases import current_name, stored, stored_kind, stored_problems
from ..config.learned_rewards import TABLES, Calibrate, Reward
from ..config.methods import DPO
from ..config.parts import ModelStage, SuiteOptions
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
from ..config.validate import ROWS
from ..eval.suites.catalogue import find_suite
from ..eval.suites.reading import suite_files
from ..files import digest_file
from ..types import LimbeckError
from .continuation import LENGTHS, Shorter, find_shorter
from .decontamination import ContaminationReport, Decontamination, evaluated_problems
from .review import review_queue
from .store import Artifact, Store, digest_of

QUIET = {"title", "log_every", "save_every", "recompute", "offload", "steps_without_signal"}
# settings of an endpoint that do not change its responses
QUIET |= {"key", "prices", "requests_per_minute", "max_concurrency", "timeout"}
UNCHANGING = {"precision": "float32", "exact": True}  # as if they were not set
UNCHANGING_OF_OPTIMIZER = {"moments": "float32", "masters": True}  # likewise
VERSIONS: dict[str, int] = {}  # kind -> version, part of its keys: raise it when settings change meaning


@dataclass(frozen=True)
class Node:
    """One stage of a run. `artifact` is its finished result, if there is one; `key` is None while an input is
    not finished.

    `inputs` are the names of the stages that it reads; `control` is "forced" for an evaluation that forces
    continuations on the model, "cut" for one that cuts its thoughts off, else None. For a curate stage,
    `queue` is the folder of the rows that people review, and `review_bytes` the length of the review file
    that the key covers: reviews appended later do not count. `endpoints` are the remote models that it may
    query. `contamination` lists the rows and problems that it leaves out.
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
        """`cached` (finished), `waits` (an input is not finished), `asks` (people must review its rows first)
        or `ready`."""
        if self.artifact:
            return "cached"
        if self.key is None:
            return "waits"
        if self.queue and not review_queue.complete(self.queue):
            return "asks"
        return "ready"

    @property
    def dropped(self) -> list[str]:
        """The sorted ids of the rows and problems that the stage leaves out as too similar to a test."""
        return sorted(self.contamination.dropped) if self.contamination else []


class Graph:
    """The nodes of a recipe, in an order in which they can run. `refresh` updates them from the store.

    `absent` has a sentence about each file and model that is not here; a run needs all of them."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        base: Path,
        need_files: bool = True,
        given: Mapping[str, Artifact] | None = None,
    ):
        """Build the graph. `base` is the folder that relative paths in the recipe are resolved against.
        `given` has the results of stages that are finished whatever their key, by name: a model of another
        run, which need not be copied.

        Raises LimbeckError for a file or a model that is not here, unless `need_files` is False: then it is
        noted in `absent`, and the keys of the stages that read it stand for nothing."""
        self.absent: list[str] = []
        self.recipe = resolve_paths(recipe, base, None if need_files else self.absent)
        self.store = store
        self._files: dict[Path, str] = {}
        tests = evaluated_problems(self.recipe)
        identities = {name: self._source(problems) for name, problems in tests.items()}
        self.decontamination = Decontamination(store, tests, identities)
        self.given = given or {}
        nodes = [replace(node, artifact=self.given.get(node.name)) for node in nodes_of(self.recipe)]
        self.nodes: dict[str, Node] = {node.name: node for node in nodes}
        self.refresh()

    def refresh(self) -> None:
        """Compute the key of every node without an artifact whose inputs are all finished, and look up its
        artifact in the store."""
        for name, node in self.nodes.items():
            if node.artifact:
                continue
            artifacts = self.artifacts_of(node)
            if all(artifacts.values()):
                self.nodes[name] = self._keyed(node, artifacts)

    def check_contamination(self) -> None:
        """Compare the training data of all stages with the test problems, then compute every node's key
        again."""
        self.decontamination.thorough = True
        for name, node in self.nodes.items():
            self.nodes[name] = replace(node, key=None, artifact=self.given.get(name))
        self.refresh()

    def artifacts_of(self, node: Node) -> dict[str, Artifact | None]:
        """Return the artifacts of a node's inputs by input name, None for an input that is not finished."""
        return {cited: self.nodes[cited].artifact for cited in node.inputs}

    def _keyed(self, node: Node, artifacts: dict[str, Artifact]) -> Node:
        """Return the node with its key, its contamination report and, if the store has it, its artifact."""
        if isinstance(node.stage, Curate) and not node.stage.auto:
            queue = review_queue.queue_folder(self.store.root, artifacts[node.stage.rows].digest)
            node = replace(node, queue=queue, review_bytes=review_queue.extent(queue))
        identities = {name: self._source(problems) for name, problems in node.problems.items()}
        report = self.decontamination.compare(node.stage, node.problems, identities, artifacts)
        node = replace(node, contamination=report)
        key = digest_of(self.identity(node))
        return replace(node, key=key, artifact=self.store.find(node.kind, key))

    def identity(self, node: Node) -> dict[str, Any]:
        """Return the JSON value of everything that determines a stage's result. Its hash is the stage's
        key."""
        identity = {
            "version": VERSIONS.get(stored_kind(node.kind), 1),
            "settings": self._settings(node.stage),
            "seed": seed_of(self.recipe, node),
            "problems": {name: self._source(problems) for name, problems in node.problems.items()},
            "inputs": {name: artifact.digest for name, artifact in self.artifacts_of(node).items()},
            "control": node.control,
            "files": self._directory(Path(node.stage.path)) if isinstance(node.stage, Load) else None,
            "reviews": review_queue.digest(node.queue, node.review_bytes) if node.review_bytes else None,
        }
        if node.dropped:
            identity["dropped"] = node.dropped
        return identity

    def _settings(self, stage: Stage) -> dict[str, Any]:
        """Return the settings of a stage that change its result."""
        configured = {k: v for k, v in stage.model_dump(mode="json").items() if k not in QUIET}
        # with the names of older versions and without None, so that a renamed or a new option changes no key
        settings = {k: v for k, v in stored(configured).items() if v is not None}
        settings = {k: v for k, v in settings.items() if UNCHANGING.get(k, None) != v}
        settings = _without_defaults_of_optimizer(settings)
        if isinstance(stage, Evaluate):
            settings = {k: v for k, v in settings.items() if k not in ("models", "forced", "without_thought")}
            settings |= self._suites(stage)
        if settings.get("engine"):  # that another engine sampled changes the result, not where it runs
            settings["engine"] = "vllm"
        if isinstance(stage, Load):  # the model's content is hashed, not its path
            settings.pop("path")
        if "adapter" in settings:
            settings["adapter"] = self._directory(Path(stage.adapter))
        settings.pop("licence", None)  # the permitted uses of a result do not change it
        tables = {name: self._digest(Path(name)) for name in tables_of(stage)}
        if tables:
            settings |= rename_tables(stage, tables)
        return settings

    def _suites(self, stage: Evaluate) -> dict[str, Any]:
        """Return the setting `suites` with the digests of the benchmarks' files; {} if it is not set."""
        suites = {}
        for name, options in (stage.suites or {}).items():
            files = suite_files(find_suite(name), Path(options.data))
            digests = {path.name: self._digest(path) for path in files}
            suites[name] = options.model_dump(exclude_none=True) | {"data": digests}
        return {"suites": suites} if suites else {}

    def _source(self, problems: Problems) -> dict[str, Any]:
        """Return the settings of a problem source; the path of a file is replaced by the file's digest."""
        settings = stored_problems(
            problems.model_dump(mode="json", exclude={"licence", "teachers", "download"})
        )
        if settings.get("system") is None:  # as if there were no such setting, so that it changes no key
            settings.pop("system", None)
        if isinstance(problems, Files):
            settings["path"] = self._digest(Path(problems.path))
        return settings

    def _directory(self, path: Path) -> dict[str, str]:
        """Return the digest of each file in a folder by its relative path. For a path that is a single file,
        return its digest by its name."""
        if not path.is_dir():
            return {path.name: self._digest(path)}
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {file.relative_to(path).as_posix(): self._digest(file) for file in files}

    def _digest(self, path: Path) -> str:
        """Return the SHA-256 of a file, "" for one that is not here; each file is read only once per
        graph."""
        if path not in self._files:
            self._files[path] = digest_file(path) if path.exists() or not self.absent else ""
        return self._files[path]

    def dependents(self, name: str) -> set[str]:
        """Return the names of all stages that need the stage `name`, directly or through other stages."""
        dependents: set[str] = set()
        for node in self.nodes.values():  # in order, so that one pass finds all
            if name in node.inputs or dependents & set(node.inputs):
                dependents.add(node.name)
        return dependents

    def shorter(self, node: Node) -> Shorter | None:
        """Return the finished stage that a node with a key was continued from if it ran now, or could not be
        although only its length differs; None if there is none, and for a finished node. Reads the manifests
        of the whole store."""
        if node.artifact or node.key is None or node.kind not in LENGTHS:
            return None
        return find_shorter(self.store, node.stage, self.identity(node))

    def why(self, node: Node) -> list[str]:
        """Return the reasons to run a node, as phrases: its differences from the most similar artifact of the
        stage of the same name, the inputs that must run first, or "never run"."""
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


def resolve_paths(recipe: Recipe, base: Path, absent: list[str] | None = None) -> Recipe:
    """Return the recipe with absolute paths, so that it can be read from any working directory.

    Raises LimbeckError for a file or a model that is found neither relative to `base` nor to the working
    directory. If a list `absent` is given, the error's sentence is added to it, and the path stays.
    """
    problems = dict(recipe.problems)
    stages = {name: with_defaults(recipe, stage) for name, stage in recipe.stages.items()}
    for settings, resolve in ((problems, _resolve_source), (stages, _resolve_stage)):
        for name in settings:
            try:
                settings[name] = resolve(name, settings[name], base)
            except LimbeckError as error:
                if absent is None:
                    raise
                absent.append(str(error))
    return recipe.model_copy(update={"problems": problems, "stages": stages})


def _resolve_source(name: str, source: Problems, base: Path) -> Problems:
    """Return the source of problems with an absolute path."""
    if not isinstance(source, Files):
        return source
    key = f"problems.{name}.path"
    remedy = f"; get it with `{source.download}`, or name yours with --set {key}=FILE" * bool(source.download)
    return source.model_copy(update={"path": _find_file(key, source.path, base, remedy)})


def with_defaults(recipe: Recipe, stage: Stage) -> Stage:
    """Return the stage with the recipe's precision and exactness where it sets none of its own."""
    if not isinstance(stage, ModelStage):
        return stage
    unset = {name: getattr(recipe, name) for name in UNCHANGING if getattr(stage, name) is None}
    return stage.model_copy(update=unset)


def _resolve_stage(name: str, stage: Stage, base: Path) -> Stage:
    """Return the stage with absolute paths."""
    if isinstance(stage, Load):
        from ..model.find import find_model

        path = find_model(stage.path, base, f"stages.{name}.path: ")
        stage = stage.model_copy(update={"path": str(path.resolve())})
        if stage.adapter:
            adapter = _find_directory(f"stages.{name}.adapter", stage.adapter, base)
            stage = stage.model_copy(update={"adapter": adapter})
    if isinstance(stage, Evaluate) and stage.suites:
        stage = stage.model_copy(update={"suites": _resolve_suites(name, stage.suites, base)})
    tables = tables_of(stage)
    if tables:
        setting = f"stages.{name}.{table_setting(stage)}"
        paths = {table: _find_file(setting, table, base) for table in tables}
        stage = stage.model_copy(update=rename_tables(stage, paths))
    return stage


def _find_file(setting: str, path: str, base: Path, remedy: str = "") -> str:
    """Return the absolute path of a file relative to `base` or to the working directory. `setting` names the
    recipe's setting in the error message, and `remedy` ends it. Raises LimbeckError if there is no such
    file."""
    for place in (base / path, Path(path)):
        if place.is_file():
            return str(place.resolve())
    raise LimbeckError(f"{setting}: {path} is no file, neither beside the recipe nor here{remedy}")


def _find_directory(setting: str, path: str, base: Path) -> str:
    """Return the absolute path of a directory; see `_find_file`."""
    for place in (base / path, Path(path)):
        if place.is_dir():
            return str(place.resolve())
    raise LimbeckError(f"{setting}: {path} is no directory, neither beside the recipe nor here")


def _resolve_suites(name: str, suites: Mapping[str, SuiteOptions], base: Path) -> dict[str, SuiteOptions]:
    """Return the benchmarks of the stage `name` with absolute paths."""
    resolved = {}
    for suite, options in suites.items():
        data = _find_data(f"stages.{name}.suites.{suite}.data", options.data, base)
        resolved[suite] = options.model_copy(update={"data": data})
    return resolved


def _find_data(setting: str, path: str, base: Path) -> str:
    """Return the absolute path of a file or directory; see `_find_file`."""
    for place in (base / path, Path(path)):
        if place.exists():
            return str(place.resolve())
    raise LimbeckError(f"{setting}: {path} is neither beside the recipe nor here")


def tables_of(stage: Stage) -> list[str]:
    """Return the paths of the table files (such as JSONL) that a stage reads rows from. Names of other stages
    are not included."""
    cited: Iterable[str] = ()
    if isinstance(stage, Calibrate | Reward):
        cited = [stage.rows]
    elif isinstance(stage, DPO):
        cited = stage.pairs
    return [name for name in cited if name.endswith(TABLES)]


def table_setting(stage: Stage) -> str:
    """Return the name of the stage's setting that contains the paths of its table files: "pairs" or
    "rows"."""
    return "pairs" if isinstance(stage, DPO) else "rows"


def rename_tables(stage: Calibrate | Reward | DPO, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the stage's setting that contains paths of table files, as {setting: value}, with each path
    replaced by its entry in `names`."""
    if isinstance(stage, DPO):
        return {"pairs": {names.get(cited, cited): share for cited, share in stage.pairs.items()}}
    return {"rows": names[stage.rows]}


def seed_of(recipe: Recipe, node: Node) -> str:
    """Return the seed string of a stage, from which all its random draws derive. The evaluations of several
    models by one evaluate stage share it, so that all models get the same problems."""
    return f"{recipe.seed}/{node.name.split('/')[0]}"


# ---------------------------------------------------------------- nodes


def nodes_of(recipe: Recipe) -> list[Node]:
    """Return the stages of a recipe as nodes without keys, in an order in which they can run. Reads no
    files."""
    return list(_ordered(_expand(recipe)))


def _expand(recipe: Recipe) -> Iterator[Node]:
    """Yield the nodes of all stages except reports. An evaluate stage yields one node for each model that it
    evaluates."""
    for name, stage in recipe.stages.items():
        if isinstance(stage, Evaluate):
            problems, _ = _problems(recipe, stage)
            for model in stage.models:
                yield Node(f"{name}/{model}", stage, (model,), problems)
            for model in stage.forced:
                yield Node(f"{name}/{model}+forced", stage, (model,), problems, control="forced")
            for model in stage.without_thought or []:
                yield Node(f"{name}/{model}+cut", stage, (model,), problems, control="cut")
        elif not isinstance(stage, Report):
            yield _node(recipe, name, stage)


def _node(recipe: Recipe, name: str, stage: Stage) -> Node:
    """Return the node of a stage that is neither an evaluation nor a report."""
    problems, screens = _problems(recipe, stage)
    if isinstance(stage, Curate):  # the policy may need the problems that the rows answer
        problems = _problems_of_policy(recipe, stage)
    cited = inputs(stage)
    calibrations = [recipe.stages[other] for other in cited if isinstance(recipe.stages[other], Calibrate)]
    cited += [calibration.judge for calibration in calibrations]  # a calibrated judge is asked again
    endpoints = {other: recipe.stages[other] for other in cited if isinstance(recipe.stages[other], Remote)}
    return Node(name, stage, tuple(dict.fromkeys([*cited, *screens])), problems, endpoints=endpoints)


def _problems_of_policy(recipe: Recipe, stage: Curate) -> dict[str, Problems]:
    """Return the problem sources that the policy of a curate stage may need: all miniatures or, for `steps`,
    those whose problems its rows answer."""
    if stage.policy == "steps":
        return _answered_problems(recipe, stage)
    return {cited: source for cited, source in recipe.problems.items() if source.source == "miniature"}


def _answered_problems(recipe: Recipe, stage: Stage) -> dict[str, Problems]:
    """Return the problem sources whose problems are answered in the rows of a stage."""
    problems, _ = _problems(recipe, stage)
    for cited in inputs(stage):
        if recipe.stages[cited].kind in ROWS:
            problems |= _answered_problems(recipe, recipe.stages[cited])
    return problems


def report_nodes(recipe: Recipe) -> list[tuple[str, Report]]:
    """Return the report stages as (name, stage); they run after all other stages."""
    return [(name, stage) for name, stage in recipe.stages.items() if isinstance(stage, Report)]


def _problems(recipe: Recipe, stage: Stage) -> tuple[dict[str, Problems], list[str]]:
    """Return the problem sources of a stage and the names of the `screen` stages among its sources. The
    sources that those screen stages draw from are included."""
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
    """Yield each node after all of its inputs, otherwise in the order of the recipe."""
    pending = list(nodes)
    done: set[str] = set()
    while pending:
        node = next(candidate for candidate in pending if done.issuperset(candidate.inputs))
        pending.remove(node)
        done.add(node.name)
        yield node


def _without_defaults_of_optimizer(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a stage, those of its optimizer without what changes no result."""
    if "optimizer" not in settings:
        return settings
    learning = {
        k: v
        for k, v in settings["optimizer"].items()
        if k not in QUIET and UNCHANGING_OF_OPTIMIZER.get(k) != v
    }
    return {**settings, "optimizer": learning}


# ---------------------------------------------------------------- differences


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys, such as `{"settings.policy.kl_coef": 0.01}`."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _difference(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return one phrase for each key at which two flattened identities differ. `mine` is the identity now,
    `theirs` that of an earlier artifact."""
    sentences = []
    for name in {**theirs, **mine}:
        before = theirs.get(name)
        now = mine.get(name)
        if before == now:
            continue
        if name.startswith("inputs."):
            sentences.append(f"input {name.removeprefix('inputs.')} has changed")
        else:
            setting = current_name(name).removeprefix("settings.")
            sentences.append(f"{setting}: {before!r} -> {now!r}")
    return sentences
