"""Clusters: a chip, how many, how many a node, and what joins them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ..types import LimbeckError
from . import chips
from .chips import LOADER, Chip

FILE = Path(__file__).with_name("clusters.yaml")
NUMBERS = (
    "per_node",
    "nics",
    "nic",
    "pcie",
    "latency",
    "pod",
    "oversubscription",
    "sites",
    "site_link",
    "site_latency",
    "every",
)
COUNTED = re.compile(r"(?P<count>\d+)\s*x\s*(?P<chip>[\w.-]+)$", re.IGNORECASE)
NAMED = re.compile(r"(?P<chip>[a-z0-9-]*[a-z0-9])-(?P<count>\d+)$", re.IGNORECASE)


@dataclass(frozen=True)
class Fabric:
    """What joins chips; numbers as in clusters.yaml: Gbit/s of a card, GB/s of a slot, microseconds, chips.

    Eight chips behind one card of 200 Gbit/s is `Fabric("mine", "fat-tree", nics=1, nic=200, pcie=32)`.
    """

    name: str
    topology: str
    per_node: int = 8
    nics: int = 8
    nic: float = 400
    pcie: float = 64
    latency: float = 14
    pod: int = 0
    oversubscription: float = 1
    sites: int = 1
    site_link: float = 0
    site_latency: float = 0
    every: int = 100
    source: str = ""


@dataclass(frozen=True)
class Cluster:
    """`cluster("2048xH800")`: 256 nodes of eight chips. Bytes a second are of one direction."""

    name: str
    chip: Chip
    count: int
    fabric: Fabric

    @property
    def per_node(self) -> int:
        return min(self.fabric.per_node, self.count)

    @property
    def nodes(self) -> int:
        return -(-self.count // self.fabric.per_node)

    @property
    def inside(self) -> float:
        """What a chip can send to the others of its node: half of its link, or its slot; in a node of one, all memory."""
        return self.chip.link / 2 or 1e9 * self.fabric.pcie

    @property
    def linked(self) -> bool:
        """Whether chips of a node are joined by more than PCIe."""
        return self.chip.link > 0

    @property
    def outside(self) -> float:
        """What all cards of a node send together."""
        return self.fabric.nics * self.fabric.nic * 1e9 / 8

    @property
    def card(self) -> float:
        """The most that one chip sends out of its node: one card, or its share where cards are thin and many."""
        return max(self.fabric.nic * 1e9 / 8, self.outside / self.per_node)

    @property
    def latency(self) -> float:
        """Seconds of a hop between nodes."""
        return 1e-6 * self.fabric.latency

    def outside_of(self, chips_spanned: int) -> float:
        """`outside` where a group spans so many chips: above a pod the network is thinner."""
        thin = self.fabric.pod and chips_spanned > self.fabric.pod
        return self.outside / (self.fabric.oversubscription if thin else 1)

    def across(self, count: int) -> Cluster:
        """The first `count` chips of it."""
        return replace(self, name=f"{count} of {self.name}", count=count)

    def tell(self) -> str:
        inner = (
            f"{self.chip.link / 1e9:.0f} GB/s links"
            if self.linked
            else f"PCIe of {self.fabric.pcie:.0f} GB/s"
        )
        cards = (
            f"{self.fabric.nics} x {self.fabric.nic:.0f} Gbit/s a node, {self.fabric.topology}"
            if self.nodes > 1
            else "one node"
        )
        far = (
            f"; {self.fabric.sites} sites joined by {self.fabric.site_link:g} Gbit/s"
            if self.fabric.sites > 1
            else ""
        )
        return f"{self.count} x {self.chip.name}, {self.per_node} a node with {inner}; {cards}{far}"


@cache
def _tree() -> dict[str, Any]:
    return yaml.load(FILE.read_text(encoding="utf-8"), LOADER)


def fabric(name: str) -> Fabric:
    if name not in _tree()["fabrics"]:
        raise LimbeckError(f"fabric {name!r} is not known; known are {', '.join(_tree()['fabrics'])}")
    return Fabric(name, **_tree()["fabrics"][name])


def cluster(text: str, **changes: Any) -> Cluster:
    """A cluster by name (`h800-2048`, `fire-flyer-2`), by count and chip (`2048xH800`, `8x4090`, `h800-64`), changed:
    `cluster("2048xH800", nvlink=900)`, `chip="h20"`, `nics=1`, `fabric="two-zone"`, or any figure of the chip.
    """
    name = text.strip().lower()
    entry = _tree()["clusters"].get(name) or _counted(name, text)
    chip = chips.find(changes.pop("chip", entry["chip"]))
    woven = fabric(
        changes.pop("fabric", entry.get("fabric") or _tree()["defaults"].get(chip.name, "infiniband-400"))
    )
    count = int(changes.pop("count", entry["count"]))
    if count < 1:
        raise LimbeckError(f"{text}: a cluster has at least one chip")
    if "nvlink" in changes:
        changes["link"] = changes.pop("nvlink")
    woven = _woven(woven, {key: changes.pop(key) for key in list(changes) if key in NUMBERS})
    return Cluster(
        name, chip.change(**{key: _number(key, value) for key, value in changes.items()}), count, woven
    )


def _counted(name: str, text: str) -> dict[str, Any]:
    for pattern in (COUNTED, NAMED):
        if found := pattern.match(name):
            return {"chip": found["chip"], "count": int(found["count"])}
    known = ", ".join(_tree()["clusters"])
    try:
        return {"chip": chips.find(name).name, "count": 1}
    except LimbeckError:
        raise LimbeckError(
            f"{text!r} is no cluster: write COUNTxCHIP, for instance 8x4090, or one of {known}"
        ) from None


def _woven(woven: Fabric, changes: dict[str, Any]) -> Fabric:
    whole = ("per_node", "nics", "pod", "sites", "every")
    numbers = {key: _number(key, value) for key, value in changes.items()}
    for key in ("sites", "every"):
        if numbers.get(key, 1) < 1:
            raise LimbeckError(f"{key}={changes[key]}: one at least")
    return replace(woven, **{key: int(value) if key in whole else value for key, value in numbers.items()})


def _number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise LimbeckError(f"{key}={value!r} is no number") from None
    if number < 0:
        raise LimbeckError(f"{key}={value} is less than nothing")
    return number
