"""Export rules as data (export_rules.yaml), each with its dates, clause and source, and verdicts by them.

A ware is what is exported: a chip, a model's weights, or a memory stack. A verdict needs a date and a
destination, because no fixed list of forbidden chips stays right for long. If a rule needs a figure that is
not known, that is an error and never a pass.
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
    """The logic of one die: `Die({16: 989, 8: 1979}, 814)`.

    `tops` maps the bits of an operand to dense TOPS; `mm2` is the area of non-planar logic, None if unknown.
    """

    tops: dict[int, float]
    mm2: float | None = None

    @property
    def tpp(self) -> float:
        """Total processing performance: the highest of TOPS times bits over all bit lengths.

        A multiply-add counts as two operations (88 FR 73458).
        """
        return max(bits * tops for bits, tops in self.tops.items())


@dataclass(frozen=True)
class Chip:
    """A chip's figures for export rules: `Chip("A100", (Die({16: 312}, 826),), 600, memory_gb_s=2039)`.

    `io_gb_s` is the transfer rate to other chips and `memory_gb_s` the memory's bandwidth, both in GB/s;
    `market` is "datacentre" or "consumer". The dies of a package add up, in performance and in area. Planar
    dies (memory, most input and output) count in neither, so they do not dilute the performance density.
    """

    name: str
    dies: tuple[Die, ...]
    io_gb_s: float | None = None
    memory_gb_s: float | None = None
    market: str = "datacentre"

    @property
    def tpp(self) -> float:
        """Total processing performance, summed over all dies."""
        return sum(die.tpp for die in self.dies)

    @property
    def density(self) -> float | None:
        """Total processing performance for each mm2 of die area; None if the area of a die is not known."""
        areas = [die.mm2 for die in self.dies]
        if None in areas:
            return None
        return self.tpp / sum(areas)


def ware(chip: chips.Chip) -> Chip:
    """Return the figures for export rules of a chip of the catalogue (chips.py).

    The dies of a package share its figures evenly. Without a scale-up link, the transfer rate is that of the
    PCIe slot. Raises LimbeckError if no 16-bit or 8-bit performance is known.
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

    `operations` is the operations of its training. `best_published` is the training operations of the largest
    published model: weights that needed no more are outside the rules.
    """

    name: str
    operations: float
    published: bool = False
    best_published: float = 0.0


@dataclass(frozen=True)
class Memory:
    """A memory stack that is sold by itself, with GB/s and mm2 of its package: `Memory("HBM3", 819, 110)`."""

    name: str
    gb_s: float
    mm2: float

    @property
    def memory_density(self) -> float:
        """GB/s of memory bandwidth for each mm2 of the package."""
        return self.gb_s / self.mm2


@dataclass(frozen=True)
class Verdict:
    """A decision with its reason: `Verdict("licence", "ECCN 3A090.a.1", "advanced computing, 2023", ...)`.

    `decision` is `licence` (needed), `review` (needed, and decided case by case) or `free` (not needed; no
    clause applies). `policy` says how applications are treated, and `why` has the figures that decided.
    `enforced` is False if the rule was published but never applied.
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
        """The verdict as one English sentence."""
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
    """Return the verdict on exporting `ware` to `destination` (a country) on the day `on`.

    If several rules apply, enforced rules come before others, and a rule of case-by-case review comes before
    the licence rule that it eases. Raises LimbeckError for an unknown destination, and if a rule needs a
    figure that is not known.
    """
    groups = _groups(destination)
    if isinstance(ware, Weights):
        outside = _outside(ware)
        if outside:
            return Verdict("free", why=f"{outside} (90 FR 4544, ECCN 4E091)")
    free = Verdict("free", why=f"no rule in the table catches {ware.name} to {destination} on {on}")
    return _binding(_verdicts(ware, groups, on)) or free


def _binding(verdicts: list[Verdict]) -> Verdict | None:
    """Return the verdict that takes precedence over the others; None if there are none.

    A case-by-case review replaces an enforced licence rule, unless that licence was required by a letter to a
    company; otherwise an enforced verdict comes before one that is not.
    """
    licences = [verdict for verdict in verdicts if verdict.enforced and verdict.decision == "licence"]
    reviews = [verdict for verdict in verdicts if verdict.decision == "review"]
    unenforced = [verdict for verdict in verdicts if not verdict.enforced]
    by_letter = any("letter" in verdict.clause for verdict in licences)
    if licences and reviews and not by_letter:
        return reviews[0]
    return next(iter(licences + unenforced), None)


def _outside(weights: Weights) -> str:
    """Return the reason why weights are outside the rules; an empty string if the rules apply to them."""
    if weights.published:
        return "published weights are outside"
    if weights.operations <= weights.best_published:
        return "a published model needed as many operations"
    return ""


def _verdicts(ware: Chip | Weights | Memory, groups: set[str], on: date) -> list[Verdict]:
    """Return the verdict of every rule that applies to the ware, in the table's order.

    `groups` has the destination's name and its country groups; `on` is the day of the export.
    """
    goods = {Chip: "chip", Weights: "weights", Memory: "memory"}[type(ware)]
    verdicts: list[Verdict] = []
    for rule in _table()["rules"]:
        if rule["goods"] == goods and _applies(rule, ware.name, groups, on):
            verdict = _verdict(rule, ware)
            if verdict:
                verdicts.append(verdict)
    return verdicts


def _applies(rule: Mapping[str, Any], name: str, groups: set[str], on: date) -> bool:
    """Return True if the rule is in force on the day `on` for this destination and this ware.

    `groups` has the destination's name and its country groups; `name` is the ware's name, for rules that list
    products by name.
    """
    in_force = rule["from"] <= on < rule.get("until", date.max)
    if not in_force or groups.isdisjoint(rule["to"]):
        return False
    family = name.partition("-")[0].upper()
    return "named" not in rule or family in rule["named"]


def _verdict(rule: Mapping[str, Any], ware: Any) -> Verdict | None:
    """Return the verdict by the rule's first test that the ware meets; None if it meets none.

    Raises LimbeckError if whether a test is met depends on a figure that is not known.
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
    """Return the verdict of `rule` when its clause `clause` applies; `why` names the figures that decided."""
    enforced = rule.get("enforced", True)
    return Verdict(rule["decision"], clause, rule["name"], rule["policy"], rule["source"], why, enforced)


def _reason(figures: Mapping[str, float]) -> str:
    """Return the figures with their names in words, separated by commas."""
    words: list[str] = []
    for measure, figure in figures.items():
        number = f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"
        words.append(f"{WORDS[measure]} {number}")
    return ", ".join(words)


def _within(value: float, bounds: Mapping[str, float]) -> bool:
    """Return True if `value` is within all of `bounds`.

    The bounds are optional: "least" (at least), "below" (less than) and "above" (more than).
    """
    if value < bounds.get("least", 0) or value >= bounds.get("below", float("inf")):
        return False
    return value > bounds.get("above", -1)


def _groups(destination: str) -> set[str]:
    """Return the set of the destination's name and its country groups.

    Raises LimbeckError for an unknown one.
    """
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
    """Return the rules and the countries of `export_rules.yaml`."""
    return yaml.safe_load(RULES.read_text(encoding="utf-8"))
