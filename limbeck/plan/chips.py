"""Chips as data: every figure with its source and date.

A figure that is not published is absent, not guessed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..types import LimbeckError

FILE = Path(__file__).with_name("chips.yaml")
UNITS = {"memory": 1e9, "bandwidth": 1e9, "link": 1e9, "die_link": 1e9}  # bytes in a unit of chips.yaml
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where there is one: ten times as fast
RATES = {"bf16": 16, "fp16": 16, "tf32": 19, "fp32": 32, "fp8": 8, "int8": 8}  # precision -> bits an operand
FIGURES = {*RATES, *UNITS, "watts", "area", "gemm", "dies"}
WHAT = {
    "memory": "GB of memory",
    "bandwidth": "GB/s of memory",
    "link": "GB/s of its scale-up link, both directions",
    "watts": "watts",
}


@dataclass(frozen=True)
class Source:
    """The source of a figure, with its year and month: `Source("NVIDIA H100 data sheet", "2023-03")`."""

    text: str
    date: str


@dataclass(frozen=True)
class Chip:
    """An accelerator: `find("h800").rate("bf16")` is 989e12 FLOP/s, and its `memory` is 80e9 bytes.

    `figures` are in the units of chips.yaml, and `sources` has the source of each figure. A package of
    several dies is one chip with the figures `dies` and `die_link`. If a package has two dies, half of the
    bytes that a die reads are in the other die's memory, so memory is no faster than the link between the
    dies.
    """

    name: str
    generation: str
    figures: dict[str, float]
    sources: dict[str, Source] = field(default_factory=dict)
    datacentre: bool = True

    def figure(self, key: str) -> float:
        """Return the figure `key` in the unit of chips.yaml. Raises LimbeckError if it is not known."""
        if key in self.figures:
            return self.figures[key]
        what = WHAT.get(key, f"{key} TFLOPS" if key in RATES else key)
        known = ", ".join(sorted(self.figures))
        raise LimbeckError(
            f"chip {self.name}: {what} is not known here; give it as {key}=NUMBER (known: {known})"
        )

    def rate(self, precision: str) -> float:
        """Return the peak dense FLOP/s in `precision`, summed over the chip's dies.

        For int8 it is operations a second.
        """
        return 1e12 * self.figure(precision)

    @property
    def memory(self) -> float:
        """The memory's size in bytes."""
        return 1e9 * self.figure("memory")

    @property
    def bandwidth(self) -> float:
        """The memory's bandwidth in bytes a second.

        With n dies, each die reads 1/n of its bytes from its own memory and the rest over the link between
        dies.
        """
        local = 1e9 * self.figure("bandwidth")
        dies = int(self.figures.get("dies", 1))
        if dies == 1:
            return local
        remote_share = (dies - 1) / dies
        link = 1e9 * self.figure("die_link")
        return 1 / max(1 / local, remote_share / link)

    @property
    def link(self) -> float:
        """Bytes a second of the scale-up link (such as NVLink), both directions together; 0 without one."""
        return 1e9 * self.figure("link")

    @property
    def watts(self) -> float:
        """The chip's rated power in watts, from its data sheet."""
        return self.figure("watts")

    def change(self, **figures: float) -> Chip:
        """Return the same chip with other figures: `find("h100").change(link=400)` is nearly an H800.

        `figures` are in the units of chips.yaml. Raises LimbeckError for the name of a figure that chips do
        not have.
        """
        for key in figures:
            if key not in FIGURES:
                raise LimbeckError(f"{key} is no figure of a chip; {_suggest(key, FIGURES)}")
        sources = {key: Source("given by the user", "now") for key in figures}
        return replace(self, figures=self.figures | figures, sources=self.sources | sources)


@cache
def catalogue() -> dict[str, Chip]:
    """Return all chips of chips.yaml, keyed by each chip's first name."""
    tree = _tree()
    sources = {}
    for key, value in tree["sources"].items():
        sources[key] = Source(value["text"], str(value["date"]))
    return {name: _chip(name, entry, sources) for name, entry in tree["chips"].items()}


@cache
def _tree() -> dict[str, Any]:
    """Return the parsed content of chips.yaml."""
    return yaml.load(FILE.read_text(encoding="utf-8"), LOADER)


@cache
def _names() -> dict[str, str]:
    """Return a mapping from every name of a chip to its first name, the key of `catalogue`."""
    names = {}
    for first, entry in _tree()["chips"].items():
        for name in (first, *entry.get("names", ())):
            names[name] = first
    return names


def find(name: str) -> Chip:
    """Return a chip by any of its names, in upper or lower case. Raises LimbeckError for an unknown name."""
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    key = key.removeprefix("nvidia-").removeprefix("geforce-")
    names = _names()
    if key not in names:
        raise LimbeckError(f"chip {name!r} is not known; {_suggest(key, names)}, or add it to {FILE.name}")
    return catalogue()[names[key]]


def _suggest(key: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the known name nearest to `key`, or else all known names."""
    close = get_close_matches(key, list(known), n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known are {', '.join(sorted(known))}"


def _chip(name: str, entry: dict[str, Any], sources: dict[str, Source]) -> Chip:
    """Build a chip from its entry of chips.yaml.

    A figure of the entry is a number, which has the entry's first source, or a pair of a number and the key
    of its own source. `sources` maps these keys to sources.
    """
    figures = {}
    sources_of_figures = {}
    for key, value in entry["figures"].items():
        source = entry["sources"][0]
        if isinstance(value, list):
            value, source = value
        figures[key] = value
        sources_of_figures[key] = sources[source]
    return Chip(name, entry["generation"], figures, sources_of_figures, entry.get("datacentre", True))
