"""Export rules as data (export_rules.yaml), each with its dates, clause and source, and verdicts by them.

A date and a destination are always needed: no fixed list of forbidden chips is right for long. A figure that
a rule needs and that is not known is an error, never a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..types import LimbeckError
from . import chips
from .chips import RATES

RULES = Path(__file__).with_name("export_rules.yaml")
WORDS = {
    "tpp": "total processing performance", "density": "performance density",
    "io_gb_s": "GB/s of transfer", "memory_gb_s": "GB/s of memory",
    "memory_density": "GB/s of memory a mm2", "operations": "operations",
}  # fmt: skip
TOPS_FIGURES = ("bf16", "fp16", "fp8", "int8")
PCIE = 64.0  # GB/s, both ways, of a slot of 16 lanes (PCIe 4.0)


@dataclass(frozen=True)
class Die:
    """Logic of a package: `Die({16: 989, 8: 1979}, 814)`, dense TOPS by bits and mm2 of non-planar logic."""

    tops: dict[int, float]
    mm2: float | None = None

    @property
    def tpp(self) -> float:
        """TOPS times bit length, the highest over lengths; a multiply-add is two operations (88 FR 73458)."""
        return max(bits * tops for bits, tops in self.tops.items())


@dataclass(frozen=True)
class Chip:
    """A chip's figures for export rules: `Chip("A100", (Die({16: 312}, 826),), 600, memory_gb_s=2039)`.

    The dies of a package add up, in performance and in area. Planar dies (memory, most input and output)
    count in neither, so they do not dilute the density.
    """

    name: str
    dies: tuple[Die, ...]
    io_gb_s: float | None = None
    memory_gb_s: float | None = None
    market: str = "datacentre"

    @property
    def tpp(self) -> float:
        """Total processing performance of all dies."""
        return sum(die.tpp for die in self.dies)

    @property
    def density(self) -> float | None:
        """Total processing performance a mm2; None where an area is not known."""
        areas = [die.mm2 for die in self.dies]
        if None in areas:
            return None
        return self.tpp / sum(areas)


def ware(chip: chips.Chip) -> Chip:
    """The figures of a chip of the catalogue for export rules.

    The dies of a package share its figures evenly. Without a scale-up link, the transfer rate is that of its
    slot.
    """
    dies = int(chip.figures.get("dies", 1))
    tops: dict[int, float] = {}
    for name, value in chip.figures.items():
        if name in TOPS_FIGURES:
            tops[RATES[name]] = value / dies
    if not tops:
        chip.figure("bf16")  # raises the error of a missing figure
    area = chip.figures.get("area")
    link = chip.figures.get("link")
    die = Die(tops, area / dies if area else area)
    return Chip(
        chip.name,
        (die,) * dies,
        PCIE if link == 0 else link,
        chip.figures.get("bandwidth"),
        "datacentre" if chip.datacentre else "consumer",
    )


@dataclass(frozen=True)
class Weights:
    """A model's weights: `Weights("mine", operations=3.3e24, published=True)`.

    `best_published` is the operations of the best published model: a model that needed fewer is outside the
    rules.
    """

    name: str
    operations: float
    published: bool = False
    best_published: float = 0.0


@dataclass(frozen=True)
class Memory:
    """A stack of memory sold by itself: `Memory("HBM3", 819, 110)`, GB/s and mm2 of its package."""

    name: str
    gb_s: float
    mm2: float

    @property
    def memory_density(self) -> float:
        """GB/s a mm2."""
        return self.gb_s / self.mm2


@dataclass(frozen=True)
class Verdict:
    """A decision with its reason: `Verdict("licence", "ECCN 3A090.a.1", "advanced computing, 2023", ...)`.

    `decision` is `licence`, `review` or `free`, which has no clause. `enforced` is False if the rule was
    published and never applied. `why` has the figures that decided.
    """

    decision: str
    clause: str = ""
    rule: str = ""
    policy: str = ""
    source: str = ""
    why: str = ""
    enforced: bool = True

    @property
    def sentence(self) -> str:
        """The verdict as a sentence."""
        if self.decision == "free":
            return f"free: {self.why}"
        need = "needs a licence"
        if self.decision == "review":
            need = "needs a licence, reviewed case by case"
        sentence = f"{need} by {self.clause} ({self.why}); {self.policy}; {self.source}"
        if not self.enforced:
            sentence += ": a rule that was published and never enforced"
        return sentence


def judge(ware: Chip | Weights | Memory, destination: str, on: date) -> Verdict:
    """The verdict for a destination on a day.

    Enforced rules come before others, and a case-by-case review before the licence that it eases. Raises
    LimbeckError for an unknown destination, and for a figure that a rule needs and that is not known.
    """
    groups = _groups(destination)
    if isinstance(ware, Weights):
        outside = _outside(ware)
        if outside:
            return Verdict("free", why=f"{outside} (90 FR 4544, ECCN 4E091)")
    free = Verdict("free", why=f"no rule in the table catches {ware.name} to {destination} on {on}")
    return _binding(_verdicts(ware, groups, on)) or free


def _binding(verdicts: list[Verdict]) -> Verdict | None:
    """The verdict that counts among those of several rules; None where none counts."""
    licences = [verdict for verdict in verdicts if verdict.enforced and verdict.decision == "licence"]
    reviews = [verdict for verdict in verdicts if verdict.decision == "review"]
    unenforced = [verdict for verdict in verdicts if not verdict.enforced]
    by_letter = any("letter" in verdict.clause for verdict in licences)
    if licences and reviews and not by_letter:
        return reviews[0]
    return next(iter(licences + unenforced), None)


def _outside(weights: Weights) -> str:
    """The reason for which weights are outside the rules; empty if they are not."""
    if weights.published:
        return "published weights are outside"
    if weights.operations <= weights.best_published:
        return "a published model needed as many operations"
    return ""


def _verdicts(ware: Chip | Weights | Memory, groups: set[str], on: date) -> list[Verdict]:
    """The verdicts of all rules that catch a ware, in the table's order."""
    goods = {Chip: "chip", Weights: "weights", Memory: "memory"}[type(ware)]
    verdicts: list[Verdict] = []
    for rule in _table()["rules"]:
        if rule["goods"] == goods and _applies(rule, ware.name, groups, on):
            verdict = _verdict(rule, ware)
            if verdict:
                verdicts.append(verdict)
    return verdicts


def _applies(rule: Mapping[str, Any], name: str, groups: set[str], on: date) -> bool:
    """True if a rule is in force on a day, for a destination in `groups` and a ware of this name."""
    in_force = rule["from"] <= on < rule.get("until", date.max)
    if not in_force or groups.isdisjoint(rule["to"]):
        return False
    family = name.partition("-")[0].upper()
    return "named" not in rule or family in rule["named"]


def _verdict(rule: Mapping[str, Any], ware: Any) -> Verdict | None:
    """The verdict of the rule's first test that a ware meets; None if it meets none.

    Raises LimbeckError if a figure that is not known would decide.
    """
    missing = ""
    for test in rule["tests"]:
        if test.get("market") not in (None, getattr(ware, "market", None)):
            continue
        figures = {measure: getattr(ware, measure) for measure in WORDS if measure in test}
        known = {measure: figure for measure, figure in figures.items() if figure is not None}
        if not all(_within(figure, test[measure]) for measure, figure in known.items()):
            continue
        unknown = [measure for measure in figures if measure not in known]
        if not unknown:
            why = _reason(figures) or f"{ware.name} is named"
            return _caught(rule, test["clause"], why)
        missing = missing or unknown[0]
    if missing:
        raise LimbeckError(
            f"{ware.name}: its {WORDS[missing]} is not known, and "
            f"{rule['name']} ({rule['source']}) asks for it"
        )
    return None


def _caught(rule: Mapping[str, Any], clause: str, why: str) -> Verdict:
    """The verdict of a rule by one of its clauses."""
    enforced = rule.get("enforced", True)
    return Verdict(rule["decision"], clause, rule["name"], rule["policy"], rule["source"], why, enforced)


def _reason(figures: Mapping[str, float]) -> str:
    """Figures with their names."""
    words: list[str] = []
    for measure, figure in figures.items():
        number = f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"
        words.append(f"{WORDS[measure]} {number}")
    return ", ".join(words)


def _within(value: float, bounds: Mapping[str, float]) -> bool:
    """True if a figure is at least `least`, below `below` and above `above`, where a test has them."""
    if value < bounds.get("least", 0) or value >= bounds.get("below", float("inf")):
        return False
    return value > bounds.get("above", -1)


def _groups(destination: str) -> set[str]:
    """The country and its groups. Raises LimbeckError for an unknown destination."""
    countries = _table()["countries"]
    name = destination.strip().lower()
    name = countries["also"].get(name, name)
    groups = {group for group in ("d5", "d1_d4", "others", "home") if name in countries[group]}
    if not groups:
        raise LimbeckError(
            f"{destination}: no country of the rules' table; write its English name, for instance china, "
            "japan or united arab emirates"
        )
    return groups | {name}


@cache
def _table() -> dict[str, Any]:
    """The rules and countries of `export_rules.yaml`."""
    return yaml.safe_load(RULES.read_text(encoding="utf-8"))
