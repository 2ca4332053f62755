"""Where a weight comes from: problems, samplers, people and licences, carried from artifact to artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..recipe import Curate, Load, Recipe, Remote
from .graph import Node
from .store import Artifact


def licences_of(node: Node, outcome: dict[str, Any], given: dict[str, Artifact], recipe: Recipe) -> list[str]:
    """The licences that bind an artifact: its own and those of everything it was made from."""
    found = {licence for artifact in given.values() for licence in artifact.manifest["licences"]}
    if isinstance(node.stage, Load):
        found.add(recipe.licence or outcome["notes"].get("licence") or "undeclared")
    if isinstance(node.stage, Remote):
        found.add(node.stage.licence or "undeclared")
    return sorted(found)


def sources_of(node: Node, outcome: dict[str, Any], given: dict[str, Artifact]) -> dict[str, list[str]]:
    """What fed an artifact: problem sources by name, the models that wrote its rows, who edited them."""
    merged: dict[str, set[str]] = {"problems": set(), "models": set(), "editors": set()}
    for artifact in given.values():
        for kind, names in artifact.manifest["sources"].items():
            merged[kind] |= set(names)
        if artifact.manifest["kind"] in ("load", "pretrain", "rl", "sft", "preference", "distill", "reward"):
            merged["models"].add(f"{artifact.manifest['stage']} {artifact.digest[:12]}")
    merged["models"] |= {f"{name} ({remote.model} at {remote.url})" for name, remote in node.endpoints.items()}
    merged["problems"] |= {_described(name, problems) for name, problems in node.problems.items()}
    if isinstance(node.stage, Curate):
        merged["editors"] |= set(outcome["notes"].get("reviewers", [f"policy: {node.stage.policy}"]))
        merged["problems"] = {p for a in given.values() for p in a.manifest["sources"]["problems"]}
    return {kind: sorted(names) for kind, names in merged.items()}


def _described(name: str, problems: Any) -> str:
    what = {"miniature": "clock", "gym": getattr(problems, "generator", ""), "files": Path(getattr(problems, "path", "")).name}
    return f"{name} ({problems.source} {what[problems.source]})"
