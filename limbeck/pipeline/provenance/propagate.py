"""Provenance through the graph of stages: problem sources, models, people and licences are passed on from
each artifact to those made from it.

The licence of a model also binds every model that is trained from its weights, its outputs or its scores,
through any number of stages. A teacher is a model whose outputs or scores are used to train a model that does
not descend from the teacher's own base model. A model that is trained on its own base model's outputs stays
under its own licence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from ...config.recipe import Curate, Files, Load, Problems, Recipe, Stage
from ...config.validate import MODELS
from ...types import LimbeckError
from ..graph import Graph, Node, table_setting, tables_of
from ..store import Artifact
from .licences import NOBODY_KNOWS, UNDECLARED, known_licences, licences_of_model, parse_licences, terms

BROUGHT = {"load", "remote"}  # kinds of stages that bring in somebody else's model
LEARNING = (MODELS | {"reward"}) - BROUGHT  # kinds of stages that train a model
KINDS = ("problems", "models", "teachers", "editors")  # of sources of an artifact


@dataclass(frozen=True)
class LicenceTrace:
    """The licences that bind a stage's result:
    `LicenceTrace({"MIT": "stages.base"}, {"MIT": "stages.base"}, {"zero"}, "base")`.

    `bound` maps each licence to the place in the recipe that it comes from; `own` are the licences that came
    with the model's weights. `makers` are the models that sampled or scored its training rows. `root` is the
    stage in which its weights originated, "" for a stage that has no model.
    """

    bound: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, str] = field(default_factory=dict)
    makers: frozenset[str] = frozenset()
    root: str = ""


@dataclass(frozen=True)
class LicenceViolation:
    """A licence term that a stage would violate:
    `LicenceViolation("small", "OpenAI-Terms", "stages.small learns from ...")`."""

    stage: str
    licence: str
    sentence: str


def trace(graph: Graph) -> tuple[dict[str, LicenceTrace], list[LicenceViolation]]:
    """Return the licence trace of every stage, and the violations. They follow from the recipe alone, and
    from the manifests of models that the graph was given."""
    traces: dict[str, LicenceTrace] = {}
    violations: list[LicenceViolation] = []
    for name, node in graph.nodes.items():
        if name in graph.given:
            licences = dict.fromkeys(graph.given[name].manifest["licences"], f"stages.{name}")
            traces[name] = LicenceTrace(licences, licences, root=name)
            continue
        base = LicenceTrace()
        if node.kind in LEARNING:
            base = traces.get(getattr(node.stage, "model", None), base)
        learned = _learned_licences(node, traces)
        traces[name] = _trace_node(node, graph.recipe, base, learned, traces)
        if node.kind in LEARNING:
            violations += _violations(name, base, learned)
    return traces, violations


def _trace_node(
    node: Node,
    recipe: Recipe,
    base: LicenceTrace,
    learned: Mapping[str, str],
    traces: Mapping[str, LicenceTrace],
) -> LicenceTrace:
    """Return the licence trace of one stage. `base` is the trace of the model that it trains, `learned` maps
    the licences of its data to their places, `traces` are those of the stages before it."""
    brought = _brought(node.name, node.stage, recipe) if node.kind in BROUGHT else {}
    bound = {**learned, **base.bound, **brought}
    makers = _makers(node, traces) | base.makers
    if node.kind not in LEARNING | BROUGHT:
        return LicenceTrace(bound, makers=makers)
    return LicenceTrace(bound, {**base.own, **brought}, makers, base.root or node.name)


def _learned_licences(node: Node, traces: Mapping[str, LicenceTrace]) -> dict[str, str]:
    """Return the licences of a stage's problems and of all its inputs except the weights that it trains, as
    licence -> place in the recipe."""
    licences = _of_problems(node)
    for cited in _teaching_inputs(node):
        licences |= traces[cited].bound
    return licences


def _makers(node: Node, traces: Mapping[str, LicenceTrace]) -> frozenset[str]:
    """Return the models behind a stage's data: the inputs that are models, and the makers of all inputs."""
    makers: set[str] = set()
    for cited in _teaching_inputs(node):
        makers |= traces[cited].makers
        if traces[cited].root:
            makers.add(cited)
    return frozenset(makers)


def _teaching_inputs(node: Node) -> list[str]:
    """Return the inputs that a stage takes data or scores from: all except the weights that it trains."""
    weights = getattr(node.stage, "model", None) if node.kind in LEARNING else None
    return [cited for cited in data_inputs(node) if cited != weights]


def check_licences(
    graph: Graph, right: str | None = None
) -> tuple[dict[str, LicenceTrace], dict[str, list[dict[str, str]]]]:
    """Return the licence trace of every stage, and the exemptions from licence terms that the user claims, by
    stage. `right` is the user's reason for the claim.

    If terms forbid a stage of the recipe or are undeclared and no `right` is given, raises LimbeckError with
    the clause and a remedy.
    """
    traces, violations = trace(graph)
    if violations and not (right or "").strip():
        raise LimbeckError(
            f'{violations[0].sentence}; or, if you may, run with --i-have-the-right "why", '
            "which every artifact then carries for ever"
        )
    claims: dict[str, list[dict[str, str]]] = {}
    for violation in violations:
        claim = {
            "licence": violation.licence,
            "stage": violation.stage,
            "clause": terms(violation.licence).clause("outputs"),
            "reason": right or "",
            "by": os.environ.get("USER", "somebody"),
            "date": date.today().isoformat(),
        }
        claims.setdefault(violation.stage, []).append(claim)
    return traces, claims


def data_inputs(node: Node) -> list[str]:
    """Return the inputs that influence a stage's result. A stage that only sets the FLOP budget (`flops_of`)
    is left out."""
    compared = getattr(node.stage, "flops_of", None)
    model = getattr(node.stage, "model", None)
    return [cited for cited in node.inputs if cited != compared or cited == model]


def teachers_of(name: str, traces: Mapping[str, LicenceTrace]) -> list[str]:
    """Return the models whose outputs or scores trained the model of stage `name`, and whose weights have
    another origin than that model's."""
    root = traces[name].root
    return sorted(maker for maker in traces[name].makers if traces[maker].root != root)


def origin_of(
    node: Node,
    outcome: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    traces: Mapping[str, LicenceTrace],
    claims: Mapping[str, list],
) -> dict[str, Any]:
    """Return the provenance in an artifact's manifest: `licences`, `sources`, and the claimed exemptions
    `rights`.

    `outcome` is what the stage returned, `inputs` are its input artifacts by name, `traces` and `claims` are
    from `check_licences`.
    """
    used = {cited: inputs[cited] for cited in data_inputs(node)}
    licences = set(traces[node.name].bound)
    rights: list[dict[str, str]] = []
    for artifact in used.values():
        licences.update(artifact.manifest["licences"])
        rights += artifact.manifest.get("rights", [])
    rights += claims.get(node.name, [])
    sources = _sources(node, outcome, used, traces)
    return {"licences": sorted(licences), "rights": _distinct(rights), "sources": sources}


def merged_provenance(manifest: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the provenance of an earlier artifact merged with `origin`, the provenance that follows from the
    current recipe. Return None if nothing is added.

    Provenance only grows: a licence that was declared later and a claim that was once made are kept.
    """
    before = {
        "licences": manifest["licences"],
        "rights": manifest.get("rights", []),
        "sources": manifest["sources"],
    }
    names = set(before["licences"]) | set(origin["licences"])
    sources = {}
    for kind in KINDS:
        sources[kind] = sorted({*before["sources"].get(kind, []), *origin["sources"][kind]})
    after = {
        "licences": sorted(names - {UNDECLARED} or names),
        "rights": _distinct([*before["rights"], *origin["rights"]]),
        "sources": sources,
    }
    return after if after != before else None


def _distinct(rights: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return each claim once, in its earliest version. Claims that differ only in their date are the same."""
    distinct: dict[str, dict[str, str]] = {}
    for right in reversed(rights):
        distinct[json.dumps({**right, "date": ""})] = right
    return list(distinct.values())[::-1]


# ---------------------------------------------------------------- licences of a stage's own


def _brought(name: str, stage: Stage, recipe: Recipe) -> dict[str, str]:
    """Return the licences of a model from outside that the stage `name` brings in, as declared in the recipe,
    stated by its source, or known for its name."""
    if isinstance(stage, Load):
        path = Path(stage.path)
        card = path / "provenance.json"
        origin = json.loads(card.read_text(encoding="utf-8")) if card.exists() else {}
        names = parse_licences(stage.licence or recipe.licence) + parse_licences(origin.get("licence"))
        names += licences_of_model(str(origin.get("source", ""))) + licences_of_model(path.name)
    else:
        names = parse_licences(stage.licence) + licences_of_model(getattr(stage, "model", ""))
    return dict.fromkeys(names or [UNDECLARED], f"stages.{name}")


def _of_problems(node: Node) -> dict[str, str]:
    """Return the licences of rows in files, and of the models that wrote, filtered or judged those rows, as
    licence -> place in the recipe."""
    licences: dict[str, str] = {}
    if node.kind in LEARNING and tables_of(node.stage):
        names = parse_licences(node.stage.licence) or [UNDECLARED]
        licences |= dict.fromkeys(names, f"stages.{node.name}.{table_setting(node.stage)}")
    for source, problems in node.problems.items():
        if not isinstance(problems, Files):
            continue
        names = parse_licences(problems.licence) or [UNDECLARED]
        licences |= dict.fromkeys(names, f"problems.{source}")
        for teacher in problems.teachers:
            names = licences_of_model(teacher) or [UNDECLARED]
            licences |= dict.fromkeys(names, f"problems.{source}.teachers ({teacher})")
    return licences


# ---------------------------------------------------------------- violations


def _violations(name: str, base: LicenceTrace, learned: Mapping[str, str]) -> list[LicenceViolation]:
    """Return the licence terms of teachers and data that forbid the training stage `name`, and the licences
    whose terms are unknown or undeclared."""
    violations = []
    for licence, source in {**learned, **base.bound}.items():
        if terms(licence) is NOBODY_KNOWS:
            violations.append(LicenceViolation(name, licence, _unknown(name, licence, source)))
            continue
        foreign = licence in learned and licence not in base.own
        if foreign and terms(licence).outputs in ("own kind", "no"):
            violations.append(LicenceViolation(name, licence, _forbidden(name, licence, source)))
    return violations


def _unknown(name: str, licence: str, source: str) -> str:
    """Return the sentence on a licence whose terms are unknown or undeclared. `source` is the place in the
    recipe that it comes from."""
    if licence != UNDECLARED:
        licences = ", ".join(known_licences())
        return (
            f"stages.{name} learns from {source}, whose licence {licence!r} is not among those that "
            f"Limbeck knows ({licences})"
        )
    if "teachers" in source:
        remedy = "name a model that limbeck/pipeline/provenance/licences.yaml knows"
    else:
        setting = f"{source.removesuffix('.rows').removesuffix('.pairs')}.licence"
        remedy = f"set {setting}, for instance to Apache-2.0 or, where you made it yourself, to own"
    return f"stages.{name} learns from {source}, whose licence is undeclared; {remedy}"


def _forbidden(name: str, licence: str, source: str) -> str:
    """Return the sentence on a licence that forbids the stage `name`. `source` is the place in the recipe
    that it comes from."""
    only = " but one under the same licence" if terms(licence).outputs == "own kind" else ""
    clause = terms(licence).clause("outputs")
    return (
        f"stages.{name} learns from outputs of {source}, whose terms forbid that for any model{only}: "
        f"{clause}; take another teacher"
    )


# ---------------------------------------------------------------- sources


def _sources(
    node: Node,
    outcome: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    traces: Mapping[str, LicenceTrace],
) -> dict[str, list[str]]:
    """Return the names of an artifact's sources by kind: problem sources, models that wrote its rows,
    teachers, and editors."""
    merged = _merge_sources(inputs)
    for name, remote in node.endpoints.items():
        merged["models"].add(f"{name} ({remote.model} at {remote.url})")
    if isinstance(node.stage, Curate):  # the problems that the rows answer, not those that its policy may ask
        reviewers = outcome.get("notes", {}).get("reviewers", [f"policy: {node.stage.policy}"])
        merged["editors"].update(reviewers)
    else:
        merged["problems"].update(_described(name, source) for name, source in node.problems.items())
    for problems in node.problems.values():
        merged["teachers"].update(getattr(problems, "teachers", []))
    if node.kind in LEARNING:
        teachers = teachers_of(node.name, traces)
        merged["teachers"].update(model for model in merged["models"] if model.split()[0] in teachers)
    return {kind: sorted(names) for kind, names in merged.items()}


def _merge_sources(inputs: Mapping[str, Artifact]) -> dict[str, set[str]]:
    """Return the sources of all inputs together, and those inputs that are models themselves."""
    merged: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for name, artifact in inputs.items():
        for kind, names in artifact.manifest["sources"].items():
            merged.setdefault(kind, set()).update(names)
        if artifact.kind in LEARNING | BROUGHT:
            merged["models"].add(f"{name} {artifact.digest[:12]}")
    return merged


def _described(name: str, problems: Problems) -> str:
    """Return the name of a problem source as lineages write it: `chat (miniature clock)`."""
    if problems.source == "miniature":
        what = "clock"
    elif problems.source == "gym":
        what = problems.generator
    elif problems.source == "sums":
        what = "stories" if problems.story else "expressions"
    else:
        what = Path(problems.path).name
    return f"{name} ({problems.source} {what})"
