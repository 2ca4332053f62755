"""Licences as data: the terms of each licence, the licences of known models, and the combined terms of
several licences.

The table is `licences.yaml`. Licences combine by strictness: for each question (may outputs train other
models? may the model be released?) the strictest answer counts. A licence that is not in the table is treated
as one with unknown terms, which is stricter than any other.
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
    """The terms of one licence:
    `Terms(title="MIT License", release="conditions", source="https://opensource.org/license/mit")`.

    `outputs` and `release` are answers from `OUTPUTS` and `RELEASE`. `users` is the most monthly users
    without a separate permission, `excluded` the regions without a licence, `prefix` the required beginning
    of a derived model's name, `display` texts to show, of which one suffices, and `hub` the licence's id on
    model hubs. `clauses` maps questions to sections of the licence.
    """

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
        """Return the place in the licence that answers a question (a field such as "release"):
        `Llama 3.1 Community License Agreement, section 1.b.i (https://...)`."""
        section = self.clauses.get(question, "")
        place = f"{self.title}, {section}" if section else self.title
        return f"{place} ({self.source})"


NOBODY_KNOWS = Terms(
    title="no terms are known", outputs="no", release="no", source="docs/explanation/provenance.md"
)


@dataclass(frozen=True)
class CombinedTerms:
    """The combined terms of several licences:
    `CombinedTerms(("MIT", "Llama-3.1"), "passes on", "conditions", True, ...)`.

    The fields are those of `Terms`; `prefixes` and `display` have the entries of all licences.
    """

    licences: tuple[str, ...]
    outputs: str
    release: str
    commercial: bool
    users: int | None
    excluded: tuple[str, ...]
    prefixes: tuple[str, ...]
    display: tuple[str, ...]

    def sentence(self) -> str:
        """Return the terms as a sentence."""
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
    """Return the combined terms of several licences: for each question the strictest answer.

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
    """Return the prefixes that no other prefix extends. A name that begins with "Llama 3" also begins with
    "Llama", so that "Llama" is left out."""
    distinct = list(dict.fromkeys(prefixes))
    longest = []
    for prefix in distinct:
        extended = [other for other in distinct if other != prefix and other.startswith(prefix)]
        if not extended:
            longest.append(prefix)
    return tuple(longest)


def terms(name: str) -> Terms:
    """Return the terms of a licence by its name in the table, `NOBODY_KNOWS` for any other name."""
    return _table().terms.get(name, NOBODY_KNOWS)


def parse_licences(text: str | None) -> list[str]:
    """Return the names of the licences in a recipe's or a model card's text. A licence that is not in the
    table keeps its spelling; words such as "other", which name no licence, are left out.

    >>> parse_licences("mit AND apache-2.0"), parse_licences("llama3.1"), parse_licences("other")
    (['MIT', 'Apache-2.0'], ['Llama-3.1'], [])
    """
    names = _table().names
    words = [word.strip() for word in re.split(r"\s+AND\s+|,|&", text or "")]
    return [names.get(word.lower(), word) for word in words if word.lower() not in SILENT]


def licences_of_model(name: str) -> list[str]:
    """Return the licences of a model by its name, [] if the table does not have it:
    `licences_of_model("deepseek-ai/DeepSeek-R1") == ["MIT"]`."""
    bare = re.split(r"/|--", name.removeprefix("hf:").rstrip("/"))[-1]
    for row in _table().models:
        if re.fullmatch(row["names"], bare, re.IGNORECASE):
            return list(row["licences"])
    return []


def known_licences() -> list[str]:
    """Return the names of all licences in the table."""
    return list(_table().terms)


class _Table(NamedTuple):
    """The content of `licences.yaml`: `terms` by licence name, `names` of licences by alias in lower case,
    and `models`, the licences of models by a pattern of their names."""

    terms: dict[str, Terms]
    names: dict[str, str]
    models: list[dict[str, Any]]


@cache
def _table() -> _Table:
    """Read the table; it is read only once."""
    tree = yaml.safe_load((Path(__file__).parent / "licences.yaml").read_text(encoding="utf-8"))
    by_name = {name: Terms.model_validate(entry) for name, entry in tree["licences"].items()}
    names = {}
    for name, licence in by_name.items():
        for alias in (name, *licence.aliases):
            names[alias.lower()] = name
        if licence.hub != "other":
            names[licence.hub.lower()] = name
    return _Table(by_name, names, tree["models"])
