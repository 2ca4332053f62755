"""Chips as data: every figure with its source and date; a figure that is not public is absent, and is never guessed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..types import LimbeckError

FILE = Path(__file__).with_name("chips.yaml")
UNITS = {"memory": 1e9, "bandwidth": 1e9, "link": 1e9, "die_link": 1e9}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where there is one: ten times as fast
RATES = {"bf16": 16, "fp16": 16, "tf32": 19, "fp32": 32, "fp8": 8, "int8": 8}  # precision -> bits an operand
WHAT = {
    "memory": "GB of memory",
    "bandwidth": "GB/s of memory",
    "link": "GB/s of its scale-up link, both directions",
    "watts": "watts",
}


@dataclass(frozen=True)
class Source:
    """Where a figure was read: `Source("NVIDIA H100 data sheet", "2023-03")`."""

    text: str
    date: str


@dataclass(frozen=True)
class Chip:
    """An accelerator: `find("h800").rate("bf16")` is 989e12 FLOP/s, `.memory` 80e9 bytes, `.link` 400e9 bytes/s.

    `figures` are in the units of chips.yaml. A package of several dies is one chip with `dies` and `die_link`: half
    of what a die reads lies with another, so its memory is no faster than the link between them lets it be.
    """

    name: str
    generation: str
    figures: dict[str, float]
    sources: dict[str, Source] = field(default_factory=dict)
    datacentre: bool = True

    def figure(self, key: str) -> float:
        """One figure, in the units of chips.yaml; one sentence where it is not known."""
        try:
            return self.figures[key]
        except KeyError:
            what = WHAT.get(key, f"{key} TFLOPS" if key in RATES else key)
            known = ", ".join(sorted(self.figures))
            raise LimbeckError(
                f"chip {self.name}: {what} is not known here; give it as {key}=NUMBER (known: {known})"
            ) from None

    def rate(self, precision: str) -> float:
        """Peak FLOP/s, dense. Throughput of a matrix product on several dies is that of all of them."""
        return 1e12 * self.figure(precision)

    @property
    def memory(self) -> float:
        """Bytes."""
        return 1e9 * self.figure("memory")

    @property
    def bandwidth(self) -> float:
        """Bytes a second: of n dies, each finds 1/n of what it reads beside it, and the rest behind the link."""
        whole, dies = 1e9 * self.figure("bandwidth"), int(self.figures.get("dies", 1))
        if dies == 1:
            return whole
        far = (dies - 1) / dies
        return 1 / max(1 / whole, far / (1e9 * self.figure("die_link")))

    @property
    def link(self) -> float:
        """Bytes a second of the scale-up link, both directions together; 0 without one."""
        return 1e9 * self.figure("link")

    @property
    def watts(self) -> float:
        return self.figure("watts")

    def change(self, **figures: float) -> Chip:
        """The same chip with other figures: `find("h100").change(link=400)` is nearly an H800."""
        known = {*RATES, *UNITS, "watts", "area", "gemm", "dies"}
        for key in figures:
            if key not in known:
                raise LimbeckError(f"{key} is no figure of a chip; {_near(key, known)}")
        told = {key: Source("given by the user", "now") for key in figures}
        return replace(self, figures={**self.figures, **figures}, sources={**self.sources, **told})


@cache
def catalogue() -> dict[str, Chip]:
    """All chips, by their first name."""
    tree = yaml.load(FILE.read_text(encoding="utf-8"), LOADER)
    texts = {key: Source(value["text"], str(value["date"])) for key, value in tree["sources"].items()}
    return {name: _chip(name, entry, texts) for name, entry in tree["chips"].items()}


@cache
def _names() -> dict[str, str]:
    tree = yaml.load(FILE.read_text(encoding="utf-8"), LOADER)["chips"]
    return {other: name for name, entry in tree.items() for other in (name, *entry.get("names", ()))}


def find(name: str) -> Chip:
    """A chip by any of its names, in upper or lower case."""
    key = name.strip().lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-")
    if key not in _names():
        raise LimbeckError(f"chip {name!r} is not known; {_near(key, _names())}, or add it to {FILE.name}")
    return catalogue()[_names()[key]]


def _near(key: str, known: Any) -> str:
    close = get_close_matches(key, list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"


def _chip(name: str, entry: dict[str, Any], texts: dict[str, Source]) -> Chip:
    figures, sources = {}, {}
    for key, value in entry["figures"].items():
        value, source = value if isinstance(value, list) else (value, entry["sources"][0])
        figures[key], sources[key] = value, texts[source]
    return Chip(name, entry["generation"], figures, sources, entry.get("datacentre", True))
