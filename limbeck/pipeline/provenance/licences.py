"""Licences and terms as data: the demands of each, the licences of known models, and the terms of several
together.

The table is `licences.yaml`. Restrictions combine by their maximum: of two licences the stricter one decides,
question by question. A licence that is not in the table counts as undeclared, which is stricter than any
other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import Field

from ...config.parts import Settings

OUTPUTS = ("free", "passes on", "own kind", "no")  # from lenient to strict
RELEASE = ("free", "conditions", "no")  # from lenient to strict
UNDECLARED = "undeclared"
SILENT = {"", "unknown", "other", "none", UNDECLARED}  # words in model cards that name no licence
OUTPUT_SENTENCES = {
    "free": "outputs may train other models",
    "passes on": "outputs may train other models, which are then bound as well",
    "own kind": "outputs may train models under the same licence only",
    "no": "outputs may train no other model",
}
RELEASE_SENTENCES = {
    "free": "release is free",
    "conditions": "release is allowed, with duties",
    "no": "release is forbidden",
}


class Terms(Settings):
    """One licence:
    `Terms(title="MIT License", release="conditions", source="https://opensource.org/license/mit")`."""

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
        """The place that answers a question:
        `Llama 3.1 Community License Agreement, section 1.b.i (https://...)`."""
        section = self.clauses.get(question, "")
        place = f"{self.title}, {section}" if section else self.title
        return f"{place} ({self.source})"


NOBODY_KNOWS = Terms(
    title="no terms are known", outputs="no", release="no", source="docs/explanation/provenance.md"
)


@dataclass(frozen=True)
class CombinedTerms:
    """The terms of several licences together:
    `CombinedTerms(("MIT", "Llama-3.1"), "passes on", "conditions", True, ...)`."""

    licences: tuple[str, ...]
    outputs: str
    release: str
    commercial: bool
    users: int | None
    excluded: tuple[str, ...]
    prefixes: tuple[str, ...]
    display: tuple[str, ...]

    def sentence(self) -> str:
        """The terms as a sentence."""
        if not self.licences:
            return "bound by no licence"
        phrases = [OUTPUT_SENTENCES[self.outputs], RELEASE_SENTENCES[self.release], *self._limits()]
        return f"{' AND '.join(self.licences)}: {'; '.join(phrases)}"

    def _limits(self) -> list[str]:
        limits = []
        if not self.commercial:
            limits.append("not for money")
        if self.users:
            limits.append(f"at most {self.users:,} monthly users without asking")
        if self.excluded:
            limits.append(f"not in {' and '.join(self.excluded)}")
        if self.prefixes:
            limits.append(f"its name begins with {' and '.join(self.prefixes)}")
        return limits + [f"shows “{text}”" for text in self.display]


def bind(licences: Iterable[str]) -> CombinedTerms:
    """The terms of several licences together: question by question, the strictest.

    >>> bind(["MIT", "Llama-3.1"]).outputs, bind(["MIT", "Llama-3"]).outputs
    ('passes on', 'own kind')
    """
    names = tuple(sorted(set(licences)))
    all_terms = [terms(name) for name in names]
    excluded: dict[str, None] = {}  # in order, each once
    display: dict[str, None] = {}
    for each in all_terms:
        excluded |= dict.fromkeys(each.excluded)
        if each.display:
            display[" or ".join(each.display)] = None
    return CombinedTerms(
        licences=names,
        outputs=max((each.outputs for each in all_terms), key=OUTPUTS.index, default="free"),
        release=max((each.release for each in all_terms), key=RELEASE.index, default="free"),
        commercial=all(each.commercial for each in all_terms),
        users=min((each.users for each in all_terms if each.users), default=None),
        excluded=tuple(excluded),
        prefixes=_longest_prefixes(each.prefix for each in all_terms if each.prefix),
        display=tuple(display),
    )


def _longest_prefixes(prefixes: Iterable[str]) -> tuple[str, ...]:
    """The prefixes that no other one extends: a name that begins with "Llama 3" also begins with "Llama"."""
    distinct = list(dict.fromkeys(prefixes))
    longest = []
    for prefix in distinct:
        extended = [other for other in distinct if other != prefix and other.startswith(prefix)]
        if not extended:
            longest.append(prefix)
    return tuple(longest)


def terms(name: str) -> Terms:
    """The terms of a licence by its name in the table; for any other name, `NOBODY_KNOWS`."""
    return _table().terms.get(name, NOBODY_KNOWS)


def parse_licences(text: str | None) -> list[str]:
    """The licences that a recipe or a model card names; one that is not in the table keeps its spelling.

    >>> parse_licences("mit AND apache-2.0"), parse_licences("llama3.1"), parse_licences("other")
    (['MIT', 'Apache-2.0'], ['Llama-3.1'], [])
    """
    names = _table().names
    words = [word.strip() for word in re.split(r"\s+AND\s+|,|&", text or "")]
    return [names.get(word.lower(), word) for word in words if word.lower() not in SILENT]


def licences_of_model(name: str) -> list[str]:
    """The licences of a model that the table knows by name:
    `licences_of_model("deepseek-ai/DeepSeek-R1") == ["MIT"]`."""
    bare = re.split(r"/|--", name.removeprefix("hf:").rstrip("/"))[-1]
    for row in _table().models:
        if re.fullmatch(row["names"], bare, re.IGNORECASE):
            return list(row["licences"])
    return []


def known_licences() -> list[str]:
    """The names of all licences in the table."""
    return list(_table().terms)


class _Table(NamedTuple):
    """`licences.yaml`: terms by name, names by alias (in small letters), and models by pattern."""

    terms: dict[str, Terms]
    names: dict[str, str]
    models: list[dict[str, Any]]


@cache
def _table() -> _Table:
    """The table, read once."""
    tree = yaml.safe_load((Path(__file__).parent / "licences.yaml").read_text(encoding="utf-8"))
    by_name = {name: Terms.model_validate(entry) for name, entry in tree["licences"].items()}
    names = {}
    for name, licence in by_name.items():
        for alias in (name, *licence.aliases):
            names[alias.lower()] = name
        if licence.hub != "other":
            names[licence.hub.lower()] = name
    return _Table(by_name, names, tree["models"])
