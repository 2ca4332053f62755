"""From a model back to everything that made it: stages, problems, people, teachers, licences and rows; and from a row
that is withdrawn forward to everything that it reached."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config.aliases import current_kind
from ...run_log import read
from ...types import LimbeckError
from ..dataset_rows import PROBLEMS, ROWS, asked_problems, learned_rows
from ..store import MANIFEST, Artifact, Store
from .licences import bind
from .propagate import KINDS, LEARNING

RELEASED = "lineage.json"  # in a released directory
INDEX = "stages.json"
TOLD = (
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
)


@dataclass(frozen=True)
class Lineage:
    """A model and all that it was made from: `Lineage("3fa9...", {"3fa9...": {"stage": "dev1", "inputs": {"base": "71c0..."}}})`.

    `entries` has one entry by key for each artifact (what manifests tell, `TOLD`, and the keys of its inputs);
    `store` is where the artifacts are, None for a directory that was released.
    """

    root: str
    entries: Mapping[str, Mapping[str, Any]]
    store: Store | None = None

    @property
    def head(self) -> Mapping[str, Any]:
        return self.entries[self.root]

    @property
    def conclusion(self) -> str:
        return bind(self.licences).sentence()

    @property
    def licences(self) -> list[str]:
        return list(self.head["licences"])

    def sources(self) -> dict[str, list[str]]:
        return {kind: list(self.head["sources"].get(kind, [])) for kind in KINDS}

    def parents(self, key: str) -> dict[str, str]:
        """Names and keys of the inputs that are known."""
        return {
            name: parent for name, parent in self.entries[key]["inputs"].items() if parent in self.entries
        }

    def weights(self) -> Iterator[str]:
        """The keys of the stages that the weights went through, the last first."""
        key: str | None = self.root
        while key:
            yield key
            key = self.parents(key).get(self.entries[key]["settings"].get("model", ""))

    def tell(self) -> dict[str, Any]:
        """The whole of it as JSON; what a release carries as `lineage.json`."""
        summary = {
            "conclusion": self.conclusion,
            "licences": self.licences,
            "rights": self.head.get("rights", []),
            "sources": self.sources(),
        }
        return {"schema": 1, "root": self.root, **summary, "artifacts": self.entries}


def lineage_of(artifact: Artifact, store: Store) -> Lineage:
    """Everything behind an artifact that is still in the store."""
    by_key = {a.manifest["key"]: a for a in store.all()}
    entries: dict[str, dict[str, Any]] = {}
    waiting = [artifact]
    while waiting:
        one = waiting.pop()
        if one.manifest["key"] in entries:
            continue
        inputs = {name: given["key"] for name, given in one.manifest["inputs"].items()}
        told = {key: one.manifest[key] for key in TOLD if key in one.manifest}
        entries[one.manifest["key"]] = {**told, "artifact": one.folder.name, "inputs": inputs}
        waiting += [by_key[key] for key in inputs.values() if key in by_key]
    return Lineage(artifact.manifest["key"], entries, store)


def find(name: str, runs: Path) -> Lineage:
    """The lineage of a model by a released directory, RUN/STAGE, an artifact's folder or the beginning of its name, or
    the name of a stage that only one run has. Raises LimbeckError for what is none of them, or several."""
    path = Path(name)
    if (path / RELEASED).is_file():
        told = json.loads((path / RELEASED).read_text(encoding="utf-8"))
        return Lineage(told["root"], told["artifacts"])
    artifact, store = find_artifact(name, runs)
    return lineage_of(artifact, store)


def find_artifact(name: str, runs: Path) -> tuple[Artifact, Store]:
    """As `find`, for what is in a store."""
    for path in (Path(name), runs / name):
        if (path / MANIFEST).is_file():
            store = Store(path.resolve().parent)
            return store.open(path.resolve()), store
        if indexed := _in_run(path):
            return indexed
    if not (runs / "store").exists():
        raise LimbeckError(f"{runs}/store does not exist; nothing has been run there yet")
    store = Store(runs / "store")
    named = {run: stages[name] for run, stages in indexes(runs).items() if name in stages}
    if len(set(named.values())) == 1:
        return store.open(store.root / next(iter(named.values()))), store
    if named:
        choices = " or ".join(f"{runs / run / name}" for run in named)
        raise LimbeckError(f"{name}: {len(named)} runs have a stage of that name; say {choices}")
    return store.resolve(name), store


def _in_run(path: Path) -> tuple[Artifact, Store] | None:
    """RUN/STAGE, where a stage's name may have a slash: evaluation/zero."""
    for folder in path.parents:
        if (folder / INDEX).is_file():
            stages, stage = (
                json.loads((folder / INDEX).read_text(encoding="utf-8")),
                path.relative_to(folder).as_posix(),
            )
            if stage not in stages:
                raise LimbeckError(
                    f"{folder} has no finished stage {stage}; it has {', '.join(stages) or 'none'}"
                )
            store = Store(folder.resolve().parent / "store")
            return store.open(store.root / stages[stage]), store
    return None


def indexes(runs: Path) -> dict[str, dict[str, str]]:
    """Run -> stage -> the name of its artifact's folder."""
    return {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(runs.glob(f"*/{INDEX}"))
    }


# ---------------------------------------------------------------- rows


def rows_behind(lineage: Lineage) -> Iterator[dict[str, Any]]:
    """Every row, and every problem practised on, that trained a model or what its weights began with: `id`, `learned_by`,
    `given_by`, `origin`, `editor` (none where nobody changed it), `times`, and for rows the `row` itself."""
    if lineage.store is None:
        raise LimbeckError(
            "a released directory has no rows; they stay in the store that it was released from"
        )
    store = lineage.store
    for key in lineage.weights():
        entry = lineage.entries[key]
        if current_kind(entry["kind"]) not in LEARNING:
            continue
        folders = {
            name: store.root / lineage.entries[parent]["artifact"]
            for name, parent in lineage.parents(key).items()
        }
        for giver, row, times in learned_rows(entry, folders):
            origin = dict(row.get("origin") or {})
            editor = origin.pop("editor", None)
            told = {
                "id": row["id"],
                "learned_by": entry["stage"],
                "given_by": giver,
                "origin": origin,
                "editor": editor,
                "times": times,
            }
            yield {**told, "row": row}
        for problem, times in asked_problems(store.root / entry["artifact"]).items():
            yield {
                "id": problem,
                "learned_by": entry["stage"],
                "given_by": "practice",
                "origin": {},
                "editor": None,
                "times": times,
            }


# ---------------------------------------------------------------- recall


@dataclass(frozen=True)
class Recall:
    """What a withdrawn row reached, as names of artifacts' folders with their stage.

    `holds` contain it; `learned` were trained on it; `tainted` were made from those. `unsure` may have practised on it:
    they are older than the list of what was asked. `again` says by run what a rerun would compute anew.
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
    """Follow a row, by its id, or all rows of a problem, by the problem's, through every artifact of the store: also
    through models that learned from it and sampled what others learned. `given_by` narrows to the rows of one stage."""
    store = Store(runs / "store")
    artifacts = _ordered({a.manifest["key"]: a for a in store.all()})
    holds: dict[str, Artifact] = {}
    learned, tainted, unsure = {}, {}, {}
    for key, one in artifacts.items():
        given = _given(one)
        if _holds(one, row) and (
            not given_by or one.manifest["stage"] == given_by or any(k in holds for k in given.values())
        ):
            holds[key] = one
        folders = {name: artifacts[k].folder for name, k in given.items() if k in holds}
        if (
            one.kind in LEARNING
            and any(_is(r["id"], row) for _, r, _ in _shares(one, given, artifacts, folders))
            or row in (asked := asked_problems(one.folder))
        ):
            learned[key] = one
        elif one.kind == "rl" and not asked and _may_have_asked(one, row):
            unsure[key] = one
        if any(k in learned or k in tainted for k in given.values()):
            tainted[key] = one
    if not (holds or learned or unsure):
        raise LimbeckError(
            f"{row}: no artifact in {store.root} has a row or a problem of that id; `limbeck why MODEL --rows` lists them"
        )
    reached = {**learned, **{k: one for k, one in tainted.items() if k not in learned}}
    again = {
        run: [s for s, folder in stages.items() if folder in _names(reached)]
        for run, stages in indexes(runs).items()
    }
    costs = [one.manifest for one in reached.values()]
    return Recall(
        row,
        _names(holds),
        _names(learned),
        _names({k: o for k, o in tainted.items() if k not in learned}),
        _names(unsure),
        {run: stages for run, stages in again.items() if stages},
        sum(m["seconds"] for m in costs),
        sum(m.get("flops", 0) for m in costs),
    )


def _names(artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    return {one.folder.name: one.manifest["stage"] for one in artifacts.values()}


def _given(one: Artifact) -> dict[str, str]:
    """The inputs that reach what an artifact is, by name."""
    aside = one.manifest["settings"].get("flops_of")
    model = one.manifest["settings"].get("model")
    return {
        name: given["key"] for name, given in one.manifest["inputs"].items() if name != aside or name == model
    }


def _shares(
    one: Artifact, given: Mapping[str, str], artifacts: Mapping[str, Artifact], folders: Mapping[str, Path]
) -> Iterator:
    """The rows learned from, of those inputs that hold the row; nothing is read where none does."""
    present = {name: artifacts[key].folder for name, key in given.items() if key in artifacts}
    return learned_rows(one.manifest, present) if folders else iter(())


def _holds(one: Artifact, row: str) -> bool:
    return any(_is(r["id"], row) for name in (ROWS, PROBLEMS) for r in read(one.folder / name))


def _is(found: str, row: str) -> bool:
    """A row of that id, or any row of the problem of that id."""
    return found == row or found.partition("#")[0] == row


def _may_have_asked(one: Artifact, row: str) -> bool:
    return "#" not in row and any(
        p.split(" ")[0] == row.partition("/")[0] for p in one.manifest["sources"]["problems"]
    )


def _ordered(artifacts: dict[str, Artifact]) -> dict[str, Artifact]:
    """Inputs before what was made from them."""
    done: dict[str, Artifact] = {}

    def visit(key: str) -> None:
        if key in artifacts and key not in done:
            for parent in artifacts[key].manifest["inputs"].values():
                visit(parent["key"])
            done[key] = artifacts[key]

    for key in artifacts:
        visit(key)
    return done
