"""Where a weight comes from: problems, samplers, people and licences, carried from artifact to artifact.

What binds a model binds whatever learns from it, from its outputs or from its scores, through any number of stages. A
teacher is a model whose outputs or scores feed the learning of a model that does not descend from it; a model that
learns from what its own base wrote stays under its own licence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from ...config.recipe import Curate, Files, Load, Recipe, Stage
from ...config.validate import MODELS
from ...types import LimbeckError
from ..graph import Graph, Node, key_of, tables_of
from ..store import Artifact
from .licences import NOBODY_KNOWS, UNDECLARED, declared, known, of_model, terms

BROUGHT = {"load", "remote"}  # models that others made
LEARNING = (MODELS | {"reward"}) - BROUGHT
KINDS = ("problems", "models", "teachers", "editors")


@dataclass(frozen=True)
class LicenceTrace:
    """What reaches a stage: `LicenceTrace({"MIT": "stages.base"}, {"MIT": "stages.base"}, frozenset({"zero"}), "base")`.

    `bound` says of each licence who brought it in, `own` which of them came with the weights; `makers` are the models
    that wrote or chose its rows, `root` is the stage at which its weights began (none for rows).
    """

    bound: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, str] = field(default_factory=dict)
    makers: frozenset[str] = frozenset()
    root: str = ""


@dataclass(frozen=True)
class LicenceViolation:
    """Terms that a stage would break: `LicenceViolation("small", "OpenAI-Terms", "stages.small learns from ...")`."""

    stage: str
    licence: str
    sentence: str


def trace(graph: Graph) -> tuple[dict[str, LicenceTrace], list[LicenceViolation]]:
    """What binds each stage, and what may not be done, from the recipe alone: nothing has to have been run."""
    found: dict[str, LicenceTrace] = {}
    breaches: list[LicenceViolation] = []
    for name, node in graph.nodes.items():
        weights = getattr(node.stage, "model", None) if node.kind in LEARNING else None
        fed = [found[cited] for cited in feeding(node) if cited != weights]
        taught = {**_of_problems(node), **_union(d.bound for d in fed)}
        descended = found.get(weights, LicenceTrace())
        brought = _brought(name, node.stage, graph.recipe) if node.kind in BROUGHT else {}
        makers = frozenset().union(
            *(d.makers | ({c} if d.root else frozenset()) for c, d in _fed(node, found, weights))
        )
        model = node.kind in LEARNING | BROUGHT
        found[name] = LicenceTrace(
            {**taught, **descended.bound, **brought},
            {**descended.own, **brought} if model else {},
            makers | descended.makers,
            (descended.root or name) if model else "",
        )
        if node.kind in LEARNING:
            breaches += _breaches(name, descended, taught)
    return found, breaches


def check(
    graph: Graph, right: str | None = None
) -> tuple[dict[str, LicenceTrace], dict[str, list[dict[str, str]]]]:
    """The descent of every stage, and by stage the rights that somebody claims to have (`right` is the reason given).

    Raises LimbeckError before anything runs, naming clause and remedy, where terms forbid what a recipe does or nobody
    has said what they are.
    """
    found, breaches = trace(graph)
    if breaches and not (right or "").strip():
        raise LimbeckError(
            f'{breaches[0].sentence}; or, if you may, run with --i-have-the-right "why", which every artifact then carries for ever'
        )
    claims: dict[str, list[dict[str, str]]] = {}
    for breach in breaches:
        clause = terms(breach.licence).clause("outputs")
        claim = {
            "licence": breach.licence,
            "stage": breach.stage,
            "clause": clause,
            "reason": right or "",
            **_signed(),
        }
        claims.setdefault(breach.stage, []).append(claim)
    return found, claims


def feeding(node: Node) -> list[str]:
    """The inputs that reach what a stage makes; a stage to compare FLOPs with does not."""
    aside = getattr(node.stage, "flops_of", None)
    return [cited for cited in node.inputs if cited != aside or cited == getattr(node.stage, "model", None)]


def teachers_of(name: str, found: Mapping[str, LicenceTrace]) -> list[str]:
    """The models that taught a stage's model and are not of its own descent."""
    return sorted(maker for maker in found[name].makers if found[maker].root != found[name].root)


def origin_of(
    node: Node,
    outcome: Mapping[str, Any],
    given: Mapping[str, Artifact],
    found: Mapping[str, LicenceTrace],
    claims: Mapping[str, list],
) -> dict[str, Any]:
    """What an artifact's manifest says of where it comes from: licences, sources, and rights that were claimed."""
    fed = [given[cited].manifest for cited in feeding(node)]
    licences = {licence for manifest in fed for licence in manifest["licences"]} | set(found[node.name].bound)
    rights = [right for manifest in fed for right in manifest.get("rights", [])] + claims.get(node.name, [])
    sources = _sources(node, outcome, {cited: given[cited] for cited in feeding(node)}, found)
    return {"licences": sorted(licences), "rights": _distinct(rights), "sources": sources}


def grown(manifest: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, Any] | None:
    """The origin of an artifact that was made before, with what is known now; None where that is nothing new.

    What is known of an origin only grows: a licence declared late, a right claimed once, stay.
    """
    before = {
        "licences": manifest["licences"],
        "rights": manifest.get("rights", []),
        "sources": manifest["sources"],
    }
    names = set(before["licences"]) | set(origin["licences"])
    licences = sorted(names - {UNDECLARED} or names)
    rights = _distinct([*before["rights"], *origin["rights"]])
    sources = {kind: sorted({*before["sources"].get(kind, []), *origin["sources"][kind]}) for kind in KINDS}
    after = {"licences": licences, "rights": rights, "sources": sources}
    return after if after != before else None


def _signed() -> dict[str, str]:
    return {"by": os.environ.get("USER", "somebody"), "date": date.today().isoformat()}


def _distinct(rights: list[dict[str, str]]) -> list[dict[str, str]]:
    """Each claim once: repeated on another day it is the same."""
    return list({json.dumps({**right, "date": ""}): right for right in reversed(rights)}.values())[::-1]


# ---------------------------------------------------------------- who brings what


def _brought(name: str, stage: Stage, recipe: Recipe) -> dict[str, str]:
    """The licences of a model that is brought in: as declared, as its source says, and as its name is known."""
    said, called, origin = stage.licence, [getattr(stage, "model", "")], {}
    if isinstance(stage, Load):
        path = Path(stage.path)
        card = path / "provenance.json"
        origin = json.loads(card.read_text(encoding="utf-8")) if card.exists() else {}
        said, called = stage.licence or recipe.licence, [str(origin.get("source", "")), path.name]
    names = [
        *declared(said),
        *declared(origin.get("licence")),
        *(licence for model in called for licence in of_model(model)),
    ]
    return dict.fromkeys(names or [UNDECLARED], f"stages.{name}")


def _of_problems(node: Node) -> dict[str, str]:
    """The licences of rows in files, and of the models that wrote, filtered or judged them."""
    found: dict[str, str] = {}
    if node.kind in LEARNING and tables_of(node.stage):
        found |= dict.fromkeys(
            declared(node.stage.licence) or [UNDECLARED], f"stages.{node.name}.{key_of(node.stage)}"
        )
    for name, problems in node.problems.items():
        if isinstance(problems, Files):
            found |= dict.fromkeys(declared(problems.licence) or [UNDECLARED], f"problems.{name}")
            for teacher in problems.teachers:
                found |= dict.fromkeys(
                    of_model(teacher) or [UNDECLARED], f"problems.{name}.teachers ({teacher})"
                )
    return found


def _fed(
    node: Node, found: Mapping[str, LicenceTrace], weights: str | None
) -> list[tuple[str, LicenceTrace]]:
    return [(cited, found[cited]) for cited in feeding(node) if cited != weights]


def _union(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    return {licence: source for part in parts for licence, source in part.items()}


def _breaches(name: str, descended: LicenceTrace, taught: Mapping[str, str]) -> list[LicenceViolation]:
    """What the terms of teachers and data forbid, and what nobody has declared."""
    found = []
    for licence, source in {**taught, **descended.bound}.items():
        if terms(licence) is NOBODY_KNOWS:
            found.append(LicenceViolation(name, licence, _unknown(name, licence, source)))
        elif (
            licence in taught
            and licence not in descended.own
            and terms(licence).outputs in ("own kind", "no")
        ):
            found.append(LicenceViolation(name, licence, _forbidden(name, licence, source)))
    return found


def _unknown(name: str, licence: str, source: str) -> str:
    if licence != UNDECLARED:
        return f"stages.{name} learns from {source}, whose licence {licence!r} is not among those that Limbeck knows ({', '.join(known())})"
    where = (
        f"{source.removesuffix('.rows').removesuffix('.pairs')}.licence"
        if "teachers" not in source
        else source
    )
    remedy = (
        "name a model that limbeck/pipeline/provenance/licences.yaml knows"
        if "teachers" in source
        else f"set {where}, for instance to Apache-2.0"
    )
    own = " or, where you made it yourself, to own" if "teachers" not in source else ""
    return f"stages.{name} learns from {source}, whose licence is undeclared; {remedy}{own}"


def _forbidden(name: str, licence: str, source: str) -> str:
    only = " but one under the same licence" if terms(licence).outputs == "own kind" else ""
    clause = terms(licence).clause("outputs")
    return f"stages.{name} learns from outputs of {source}, whose terms forbid that for any model{only}: {clause}; take another teacher"


def _sources(
    node: Node, outcome: Mapping[str, Any], given: Mapping[str, Artifact], found: Mapping[str, LicenceTrace]
) -> dict[str, list[str]]:
    """What fed an artifact: problem sources by name, the models that wrote its rows, teachers, and who edited them."""
    merged: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for name, artifact in given.items():
        for kind, names in artifact.manifest["sources"].items():
            merged.setdefault(kind, set()).update(names)
        if artifact.kind in LEARNING | BROUGHT:
            merged["models"].add(_called(name, artifact))
    merged["models"] |= {
        f"{name} ({remote.model} at {remote.url})" for name, remote in node.endpoints.items()
    }
    merged["problems"] |= {_described(name, problems) for name, problems in node.problems.items()}
    for problems in node.problems.values():
        merged["teachers"] |= set(getattr(problems, "teachers", []))
    if node.kind in LEARNING:
        merged["teachers"] |= {
            model for model in merged["models"] if model.split()[0] in teachers_of(node.name, found)
        }
    if isinstance(node.stage, Curate):
        merged["editors"] |= set(outcome.get("notes", {}).get("reviewers", [f"policy: {node.stage.policy}"]))
        merged["problems"] = {p for a in given.values() for p in a.manifest["sources"]["problems"]}
    return {kind: sorted(names) for kind, names in merged.items()}


def _called(name: str, artifact: Artifact) -> str:
    return f"{name} {artifact.digest[:12]}"


def _described(name: str, problems: Any) -> str:
    what = {
        "miniature": "clock",
        "gym": getattr(problems, "generator", ""),
        "files": Path(getattr(problems, "path", "")).name,
    }
    return f"{name} ({problems.source} {what[problems.source]})"
