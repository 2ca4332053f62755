"""May this be sold there on that day? Export rules as data (export_rules.yaml), each with its dates, clause and source.

A rule date and a destination are always asked for: no fixed list of forbidden chips is right for long. What a rule
looks at and nobody knows is a mistake, never a pass.
"""

from __future__ import annotations

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
    "tpp": "total processing performance", "density": "performance density", "io_gb_s": "GB/s of transfer", "memory_gb_s": "GB/s of memory",
    "memory_density": "GB/s of memory a mm2", "operations": "operations",
}  # fmt: skip
PCIE = 64.0  # GB/s, both ways, of a slot of 16 lanes (PCIe 4.0)


@dataclass(frozen=True)
class Die:
    """Logic of a package: `Die({16: 989, 8: 1979}, 814)`, dense TOPS by bit length and mm2 of non-planar logic."""

    tops: dict[int, float]
    mm2: float | None = None

    @property
    def tpp(self) -> float:
        """TOPS times bit length, the highest over lengths; a multiply and an add are two operations (88 FR 73458)."""
        return max(bits * tops for bits, tops in self.tops.items())


@dataclass(frozen=True)
class Chip:
    """What export rules ask of a chip: `Chip("A100", (Die({16: 312}, 826),), io_gb_s=600, memory_gb_s=2039)`.

    The dies of a package add up, in performance and in area: planar dies (memory, most input and output) have no part
    in either, so that they do not dilute the density.
    """

    name: str
    dies: tuple[Die, ...]
    io_gb_s: float | None = None
    memory_gb_s: float | None = None
    market: str = "datacentre"

    @property
    def tpp(self) -> float:
        return sum(die.tpp for die in self.dies)

    @property
    def density(self) -> float | None:
        areas = [die.mm2 for die in self.dies]
        return None if None in areas else self.tpp / sum(areas)


def ware(chip: chips.Chip) -> Chip:
    """A chip of the catalogue as the rules look at it. Dies of a package share its figures evenly; without a scale-up link its
    slot is what it transfers by."""
    dies = int(chip.figures.get("dies", 1))
    tops = {
        RATES[name]: value / dies
        for name, value in chip.figures.items()
        if name in ("bf16", "fp16", "fp8", "int8")
    }
    if not tops:
        chip.figure("bf16")  # says what is missing
    area, link = chip.figures.get("area"), chip.figures.get("link")
    return Chip(
        chip.name,
        (Die(tops, area and area / dies),) * dies,
        PCIE if link == 0 else link,
        chip.figures.get("bandwidth"),
        "datacentre" if chip.datacentre else "consumer",
    )


@dataclass(frozen=True)
class Weights:
    """A model's weights: `Weights("mine", operations=3.3e24, published=True)`.

    `best_published` is the operations of the best model that anybody has published: what needed fewer is outside.
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
        return self.gb_s / self.mm2


@dataclass(frozen=True)
class Verdict:
    """`Verdict("licence", "ECCN 3A090.a.1", "advanced computing, 2023", ...)`; `free` names no clause.

    `enforced` is False where the rule was published and never applied. `why` has the figures that decided.
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
        if self.decision == "free":
            return f"free: {self.why}"
        told = {"licence": "needs a licence", "review": "needs a licence, reviewed case by case"}[
            self.decision
        ]
        told += f" by {self.clause} ({self.why}); {self.policy}; {self.source}"
        return told if self.enforced else f"{told}: a rule that was published and never enforced"


def judge(ware: Chip | Weights | Memory, destination: str, on: date) -> Verdict:
    """The verdict that counts on that day: enforced rules before others, a review before the licence that it eases.

    Unknown destinations, and figures that a rule needs and the ware lacks, are mistakes of one sentence.
    """
    groups = _groups(destination)
    goods = {Chip: "chip", Weights: "weights", Memory: "memory"}[type(ware)]
    if isinstance(ware, Weights) and (ware.published or ware.operations <= ware.best_published):
        what = (
            "published weights are outside"
            if ware.published
            else "a published model needed as many operations"
        )
        return Verdict("free", why=f"{what} (90 FR 4544, ECCN 4E091)")
    found = [
        verdict for rule in _rules() if rule["goods"] == goods and (verdict := _apply(rule, ware, groups, on))
    ]
    binding = [v for v in found if v.enforced and v.decision == "licence"]
    review = next((v for v in found if v.decision == "review"), None)
    if binding and review and not any("letter" in v.clause for v in binding):
        return review
    if binding or any(not v.enforced for v in found):
        return (binding or [v for v in found if not v.enforced])[0]
    return Verdict("free", why=f"no rule in the table catches {ware.name} to {destination} on {on}")


def _apply(rule: dict[str, Any], ware: Any, groups: set[str], on: date) -> Verdict | None:
    """None where the rule does not catch."""
    if not rule["from"] <= on < rule.get("until", date.max) or not groups & set(rule["to"]):
        return None
    if "named" in rule and ware.name.partition("-")[0].upper() not in rule["named"]:
        return None
    missing = ""
    for test in rule["tests"]:
        if "market" in test and test["market"] != ware.market:
            continue
        figures = {measure: getattr(ware, measure) for measure in WORDS if measure in test}
        outside = [m for m, x in figures.items() if x is not None and not _within(x, test[m])]
        unknown = [m for m, x in figures.items() if x is None]
        if not outside and not unknown:
            why = (
                ", ".join(
                    f"{WORDS[m]} {x:,.0f}" if x >= 100 else f"{WORDS[m]} {x:.3g}" for m, x in figures.items()
                )
                or f"{ware.name} is named"
            )
            return Verdict(
                rule["decision"],
                test["clause"],
                rule["name"],
                rule["policy"],
                rule["source"],
                why,
                rule.get("enforced", True),
            )
        missing = missing or (unknown[0] if not outside else "")
    if missing:
        raise LimbeckError(
            f"{ware.name}: its {WORDS[missing]} is not known, and {rule['name']} ({rule['source']}) asks for it"
        )
    return None


def _within(value: float, range_: dict[str, float]) -> bool:
    return range_.get("least", 0) <= value < range_.get("below", float("inf")) and value > range_.get(
        "above", -1
    )


def _groups(destination: str) -> set[str]:
    """The country itself and its group."""
    countries = _table()["countries"]
    name = destination.strip().lower()
    name = countries["also"].get(name, name)
    found = {group for group in ("d5", "d1_d4", "others", "home") if name in countries[group]}
    if not found:
        raise LimbeckError(
            f"{destination}: no country of the rules' table; write its English name, for instance china, japan or united arab emirates"
        )
    return found | {name}


def _rules() -> list[dict[str, Any]]:
    return _table()["rules"]


@cache
def _table() -> dict[str, Any]:
    return yaml.safe_load(RULES.read_text(encoding="utf-8"))
