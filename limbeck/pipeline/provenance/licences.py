"""Licences and terms as data: what each asks, which model has which, and what binds whoever is bound by several.

The table is `licences.yaml`. Restrictions add up by their maximum: of two licences the stricter one decides, question
by question. What is not in the table counts as undeclared, which is stricter than anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from ...config.parts import Settings

OUTPUTS = ("free", "passes on", "own kind", "no")
RELEASE = ("free", "conditions", "no")
UNDECLARED = "undeclared"
SILENT = {"", "unknown", "other", "none", UNDECLARED}  # what model cards say instead of a licence


class Terms(Settings):
    """One licence: `Terms(title="MIT License", release="conditions", source="https://opensource.org/license/mit")`."""

    title: str
    outputs: Literal["free", "passes on", "own kind", "no"] = "free"
    release: Literal["free", "conditions", "no"] = "free"
    commercial: bool = True
    users: int | None = None
    excluded: tuple[str, ...] = ()
    prefix: str = ""
    display: tuple[str, ...] = ()
    duties: tuple[str, ...] = ()
    clauses: dict[str, str] = Field({})
    aliases: tuple[str, ...] = ()
    hub: str = "other"
    source: str
    dated: str = ""
    read: Literal["primary", "secondary"] = "primary"

    def clause(self, question: str) -> str:
        """Where it says so: `Llama 3.1 Community License Agreement, section 1.b.i (https://...)`."""
        return ", ".join(filter(None, [self.title, self.clauses.get(question, "")])) + f" ({self.source})"


NOBODY_KNOWS = Terms(title="no terms are known", outputs="no", release="no", source="docs/explanation/provenance.md")


@dataclass(frozen=True)
class CombinedTerms:
    """What several licences ask together: `CombinedTerms(("MIT", "Llama-3.1"), "passes on", "conditions", True, 700_000_000, ...)`."""

    licences: tuple[str, ...]
    outputs: str
    release: str
    commercial: bool
    users: int | None
    excluded: tuple[str, ...]
    prefixes: tuple[str, ...]
    display: tuple[str, ...]

    def sentence(self) -> str:
        """The conclusion, for people."""
        if not self.licences:
            return "bound by no licence"
        outputs = {
            "free": "outputs may train other models",
            "passes on": "outputs may train other models, which are then bound as well",
            "own kind": "outputs may train models under the same licence only",
            "no": "outputs may train no other model",
        }[self.outputs]
        release = {
            "free": "release is free",
            "conditions": "release is allowed, with duties",
            "no": "release is forbidden",
        }[self.release]
        limits = [
            "" if self.commercial else "not for money",
            f"at most {self.users:,} monthly users without asking" if self.users else "",
            f"not in {' and '.join(self.excluded)}" if self.excluded else "",
            f"its name begins with {' and '.join(self.prefixes)}" if self.prefixes else "",
            *(f"shows “{text}”" for text in self.display),
        ]
        return f"{' AND '.join(self.licences)}: {'; '.join(filter(None, [outputs, release, *limits]))}"


def bind(licences: Iterable[str]) -> CombinedTerms:
    """The maximum of the restrictions.

    >>> bind(["MIT", "Llama-3.1"]).outputs, bind(["MIT", "Llama-3"]).outputs
    ('passes on', 'own kind')
    """
    names = tuple(sorted(set(licences)))
    all_terms = [terms(name) for name in names]
    prefixes = dict.fromkeys(t.prefix for t in all_terms if t.prefix)
    return CombinedTerms(
        names,
        max((t.outputs for t in all_terms), key=OUTPUTS.index, default="free"),
        max((t.release for t in all_terms), key=RELEASE.index, default="free"),
        all(t.commercial for t in all_terms),
        min((t.users for t in all_terms if t.users), default=None),
        tuple(dict.fromkeys(region for t in all_terms for region in t.excluded)),
        tuple(p for p in prefixes if not any(other != p and other.startswith(p) for other in prefixes)),
        tuple(dict.fromkeys(" or ".join(t.display) for t in all_terms if t.display)),
    )


def terms(name: str) -> Terms:
    """The terms of a licence by its name in the table; those of nobody's else."""
    return _table()[0].get(name, NOBODY_KNOWS)


def declared(text: str | None) -> list[str]:
    """The licences that a recipe or a model card names; one that is not in the table stays as it is written.

    >>> declared("mit AND apache-2.0"), declared("llama3.1"), declared("other")
    (['MIT', 'Apache-2.0'], ['Llama-3.1'], [])
    """
    words = [word.strip() for word in re.split(r"\s+AND\s+|,|&", text or "")]
    return [_table()[1].get(word.lower(), word) for word in words if word.lower() not in SILENT]


def of_model(name: str) -> list[str]:
    """The licences of a model that the table knows by name: `of_model("deepseek-ai/DeepSeek-R1") == ["MIT"]`."""
    bare = re.split(r"/|--", name.removeprefix("hf:").rstrip("/"))[-1]
    return next(
        (list(row["licences"]) for row in _table()[2] if re.fullmatch(row["names"], bare, re.IGNORECASE)), []
    )


def known() -> list[str]:
    return list(_table()[0])


@cache
def _table() -> tuple[dict[str, Terms], dict[str, str], list[dict[str, Any]]]:
    """Terms by name, names by alias (in small letters), and models."""
    tree = yaml.safe_load((Path(__file__).parent / "licences.yaml").read_text(encoding="utf-8"))
    table = {name: Terms.model_validate(entry) for name, entry in tree["licences"].items()}
    names = {
        alias.lower(): name
        for name, t in table.items()
        for alias in (name, *t.aliases, *([t.hub] if t.hub != "other" else []))
    }
    return table, names, tree["models"]
