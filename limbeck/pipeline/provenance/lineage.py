"""Lineage: from a model back to all stages, problems, people, teachers, licences and rows behind it; and
recall: from a withdrawn row forward to every artifact that it influenced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config.aliases import current_kind
from ...run_log import read
from ...types import LimbeckError
from .. import model_name
from ..dataset_rows import PROBLEMS, ROWS, practised_problems, problem_of, source_of, training_rows
from ..model_name import RELEASED
from ..run_folder import indexes, read_json
from ..store import Artifact, Store
from .licences import UNDECLARED, bind, licences_of_model, parse_licences
from .propagate import KINDS, LEARNING

PROVENANCE = "provenance.json"  # in a directory that `limbeck pull` wrote
ENTRY_KEYS = (
    "kind",
    "key",
    "stage",
    "title",
    "settings",
    "digest",
    "seed",
    "code_version",
    "tokens",
    "flops",
    "seconds",
    "joules",
    "notes",
    "licences",
    "rights",
    "sources",
    "decontamination",
    "continued",
)  # of a manifest, the keys that a lineage's entry repeats


@dataclass(frozen=True)
class Lineage:
    """A model and all artifacts that it was made from:
    `Lineage("3fa9...", {"3fa9...": {"stage": "dev1", "inputs": {...}}})`.

    `root` is the key of the model's artifact. `entries` maps each artifact's key to the `ENTRY_KEYS` of its
    manifest and the keys of its inputs. `store` contains the artifacts; it is None for a released directory.
    """

    root: str
    entries: Mapping[str, Mapping[str, Any]]
    store: Store | None = None

    @property
    def head(self) -> Mapping[str, Any]:
        """The entry of the model itself, which is that of the key `root`."""
        return self.entries[self.root]

    @property
    def conclusion(self) -> str:
        """The combined terms of all licences, as a sentence."""
        return bind(self.licences).sentence()

    @property
    def licences(self) -> list[str]:
        """The names of the licences that bind the model."""
        return list(self.head["licences"])

    def sources(self) -> dict[str, list[str]]:
        """Return the names of the problem sources, models, teachers and editors behind the model, by kind."""
        return {kind: list(self.head["sources"].get(kind, [])) for kind in KINDS}

    def parents(self, key: str) -> dict[str, str]:
        """Return the inputs of the artifact `key` that are in the lineage, as input name -> artifact key."""
        inputs = self.entries[key]["inputs"]
        return {name: parent for name, parent in inputs.items() if parent in self.entries}

    def input_folders(self, key: str) -> dict[str, Path]:
        """Return the folders of the inputs of the artifact `key`, by input name. Needs a store."""
        folders = {}
        for name, parent in self.parents(key).items():
            folders[name] = self.store.root / self.entries[parent]["artifact"]
        return folders

    def weights(self) -> Iterator[str]:
        """Yield the keys of the stages that trained the model's weights, the last stage first."""
        key: str | None = self.root
        while key:
            yield key
            base = self.entries[key]["settings"].get("model", "")
            key = self.parents(key).get(base)

    def tell(self) -> dict[str, Any]:
        """Return the lineage as a JSON object, as a release has it in `lineage.json`."""
        return {
            "schema": 1,
            "root": self.root,
            "conclusion": self.conclusion,
            "licences": self.licences,
            "rights": self.head.get("rights", []),
            "sources": self.sources(),
            "artifacts": self.entries,
        }


def lineage_of(artifact: Artifact, store: Store) -> Lineage:
    """Return the lineage of an artifact. Inputs that are no longer in the store are left out."""
    by_key = {known.manifest["key"]: known for known in store.all()}
    entries: dict[str, dict[str, Any]] = {}
    pending = [artifact]
    while pending:
        current = pending.pop()
        key = current.manifest["key"]
        if key in entries:
            continue
        inputs = {name: cited["key"] for name, cited in current.manifest["inputs"].items()}
        entry = {name: current.manifest[name] for name in ENTRY_KEYS if name in current.manifest}
        entries[key] = {**entry, "artifact": current.folder.name, "inputs": inputs}
        pending += [by_key[parent] for parent in inputs.values() if parent in by_key]
    return Lineage(artifact.manifest["key"], entries, store)


# ---------------------------------------------------------------- finding a model


def find(name: str, runs: Path) -> Lineage:
    """Return the lineage of what `model_name.find` finds by `name`: an artifact, a released directory, or a
    model that no stage made, whose lineage is its `provenance.json` alone.

    Raises LimbeckError unless the name stands for exactly one thing."""
    model = model_name.find(name, runs)
    if model.artifact:
        return lineage_of(model.artifact, model.store)
    released = read_json(model.path / RELEASED) if model.path.is_dir() else {}
    if released:
        return Lineage(released["root"], released["artifacts"])
    return _brought(model.title, model.path)


def _brought(title: str, path: Path) -> Lineage:
    """Return the lineage of a model directory or GGUF file from elsewhere: one entry of kind `load`, with the
    licence that its `provenance.json` states or that is known for its name."""
    card = read_json(path / PROVENANCE) if path.is_dir() else {}
    source = str(card.get("source", path))
    licences = parse_licences(card.get("licence")) + licences_of_model(source) + licences_of_model(title)
    entry = {
        "kind": "load",
        "stage": title,
        "artifact": path.name,
        "settings": {},
        "inputs": {},
        "licences": sorted(set(licences)) or [UNDECLARED],
        "sources": {**{kind: [] for kind in KINDS}, "models": [source]},
        "notes": {"source": source},
    }
    return Lineage(title, {title: entry})


# ---------------------------------------------------------------- rows


def rows_behind(lineage: Lineage) -> Iterator[dict[str, Any]]:
    """Yield every row that the model or the weights it started from were trained on, and every problem that
    they practised on by reinforcement learning.

    Keys: `id`, `learned_by` (stage), `given_by` (stage, or "practice" for a problem), `origin`, `editor`
    (None for an unchanged row), `times` (per epoch, or training steps for a problem), and for rows `row`
    itself. Raises LimbeckError for a released directory or a model from elsewhere, which contain no rows.
    """
    if lineage.store is None:
        raise LimbeckError(
            f"{lineage.head['stage']} comes without the rows that trained it; they stay in the store of the "
            "run that made it"
        )
    for key in lineage.weights():
        entry = lineage.entries[key]
        if current_kind(entry["kind"]) not in LEARNING:
            continue
        for giver, row, times in training_rows(entry, lineage.input_folders(key)):
            yield _describe_row(entry["stage"], giver, row, times)
        for problem, times in practised_problems(lineage.store.root / entry["artifact"]).items():
            yield {
                "id": problem,
                "learned_by": entry["stage"],
                "given_by": "practice",
                "origin": {},
                "editor": None,
                "times": times,
            }


def _describe_row(stage: str, giver: str, row: dict[str, Any], times: int) -> dict[str, Any]:
    """Return a row as `rows_behind` yields it. `giver` is the stage that made the row, `times` the times per
    epoch."""
    origin = dict(row.get("origin") or {})
    editor = origin.pop("editor", None)
    return {
        "id": row["id"],
        "learned_by": stage,
        "given_by": giver,
        "origin": origin,
        "editor": editor,
        "times": times,
        "row": row,
    }


# ---------------------------------------------------------------- recall


@dataclass(frozen=True)
class Recall:
    """The artifacts that a withdrawn row influenced. The first four maps go from the names of artifact
    folders to stage names.

    `holds` contain the row; `learned` were trained on it; `tainted` were made from the outputs or weights of
    those. `unsure` may have been trained on it, but were made before practised problems were recorded.
    `again` lists, by run, the stages that a rerun must compute again; `seconds` and `flops` are what those
    artifacts have cost.
    """

    row: str
    holds: dict[str, str]
    learned: dict[str, str]
    tainted: dict[str, str]
    unsure: dict[str, str]
    again: dict[str, list[str]]
    seconds: float
    flops: float


def recall(row: str, runs: Path, given_by: str = "") -> Recall:
    """Find every artifact of the store that a row influenced, also through models that were trained on it and
    then sampled rows for other models. `row` is the id of a row, or of a problem, which stands for all its
    rows. `given_by` limits the search to the rows of that stage.

    Raises LimbeckError if no artifact has such a row or problem.
    """
    store = Store(runs / "store")
    artifacts = {artifact.manifest["key"]: artifact for artifact in store.all()}
    reach = _Reach(row, given_by, artifacts)
    for key in _in_order(artifacts):
        reach.visit(key)
    if not (reach.holds or reach.learned or reach.unsure):
        raise LimbeckError(
            f"{row}: no artifact in {store.root} has a row or a problem of that id; "
            "`limbeck why MODEL --rows` lists them"
        )
    return reach.summarize(runs)


@dataclass
class _Reach:
    """The search of `recall`: its four maps, from keys to artifacts. `visit` must be called for an artifact's
    inputs before the artifact."""

    row: str
    given_by: str
    artifacts: Mapping[str, Artifact]
    holds: dict[str, Artifact] = field(default_factory=dict)
    learned: dict[str, Artifact] = field(default_factory=dict)
    tainted: dict[str, Artifact] = field(default_factory=dict)
    unsure: dict[str, Artifact] = field(default_factory=dict)

    def visit(self, key: str) -> None:
        """Add the artifact `key` to the maps that it belongs to."""
        artifact = self.artifacts[key]
        parents = _data_parents(artifact)
        if self._holds(artifact, parents):
            self.holds[key] = artifact
        practised = practised_problems(artifact.folder)
        if self.row in practised or self._trained(artifact, parents):
            self.learned[key] = artifact
        elif artifact.kind == "rl" and not practised and self._may_have_practised(artifact):
            self.unsure[key] = artifact
        if any(parent in self.learned or parent in self.tainted for parent in parents.values()):
            self.tainted[key] = artifact

    def _holds(self, artifact: Artifact, parents: Mapping[str, str]) -> bool:
        """Return True if the artifact contains the row and, with `given_by`, has it from that stage.
        `parents` maps its inputs' names to keys."""
        if not self._has_row(artifact):
            return False
        if not self.given_by or artifact.manifest["stage"] == self.given_by:
            return True
        return any(parent in self.holds for parent in parents.values())

    def _has_row(self, artifact: Artifact) -> bool:
        """Return True if one of the artifact's files contains the row or a row of the problem."""
        for name in (ROWS, PROBLEMS):
            if any(self._matches(row["id"]) for row in read(artifact.folder / name)):
                return True
        return False

    def _trained(self, artifact: Artifact, parents: Mapping[str, str]) -> bool:
        """Return True if the artifact was trained on the row. Reads no file if none of its inputs contains
        the row."""
        if artifact.kind not in LEARNING:
            return False
        if not any(parent in self.holds for parent in parents.values()):
            return False
        folders = {}
        for name, parent in parents.items():
            if parent in self.artifacts:
                folders[name] = self.artifacts[parent].folder
        return any(self._matches(row["id"]) for _, row, _ in training_rows(artifact.manifest, folders))

    def _matches(self, row_id: str) -> bool:
        """Return True if `row_id` is the searched row, or a row of the searched problem."""
        return self.row in (row_id, problem_of(row_id))

    def _may_have_practised(self, artifact: Artifact) -> bool:
        """Return True if the searched id is a problem's, and the artifact drew problems of the same problem
        source."""
        if problem_of(self.row) != self.row:
            return False
        names = [described.split(" ")[0] for described in artifact.manifest["sources"]["problems"]]
        return source_of(self.row) in names

    def summarize(self, runs: Path) -> Recall:
        """Return the result, with the stages of each run that a rerun must compute again."""
        tainted = {key: artifact for key, artifact in self.tainted.items() if key not in self.learned}
        reached = {**self.learned, **tainted}
        folders = _stages_by_folder(reached)
        again = {}
        for run, stages in indexes(runs).items():
            stale = [stage for stage, folder in stages.items() if folder in folders]
            if stale:
                again[run] = stale
        return Recall(
            row=self.row,
            holds=_stages_by_folder(self.holds),
            learned=_stages_by_folder(self.learned),
            tainted=_stages_by_folder(tainted),
            unsure=_stages_by_folder(self.unsure),
            again=again,
            seconds=sum(artifact.manifest["seconds"] for artifact in reached.values()),
            flops=sum(artifact.manifest.get("flops", 0) for artifact in reached.values()),
        )


def _stages_by_folder(artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """Return the stage names of artifacts by the names of their folders."""
    return {artifact.folder.name: artifact.manifest["stage"] for artifact in artifacts.values()}


def _data_parents(artifact: Artifact) -> dict[str, str]:
    """Return the inputs that influence the artifact's content, as name -> key. A stage that only sets the
    FLOP budget (`flops_of`) is left out."""
    settings = artifact.manifest["settings"]
    compared = settings.get("flops_of")
    parents = {}
    for name, cited in artifact.manifest["inputs"].items():
        if name != compared or name == settings.get("model"):
            parents[name] = cited["key"]
    return parents


def _in_order(artifacts: Mapping[str, Artifact]) -> list[str]:
    """Return the keys of all artifacts, each after the keys of its inputs."""
    done: dict[str, None] = {}

    def visit(key: str) -> None:
        if key not in artifacts or key in done:
            return
        for parent in artifacts[key].manifest["inputs"].values():
            visit(parent["key"])
        done[key] = None

    for key in artifacts:
        visit(key)
    return list(done)
