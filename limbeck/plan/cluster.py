"""Clusters: a chip, their number, the chips of a node, and the fabric that joins them."""

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
WHOLE = ("per_node", "nics", "pod", "sites", "every")
NUMBERS = (*WHOLE, "nic", "pcie", "latency", "oversubscription", "site_link", "site_latency")
COUNTED = re.compile(r"(?P<count>\d+)\s*x\s*(?P<chip>[\w.-]+)$", re.IGNORECASE)
NAMED = re.compile(r"(?P<chip>[a-z0-9-]*[a-z0-9])-(?P<count>\d+)$", re.IGNORECASE)


@dataclass(frozen=True)
class Fabric:
    """The network of a cluster.

    Numbers are as in clusters.yaml: Gbit/s of a card, GB/s of a slot, microseconds, chips. Eight chips behind
    one card of 200 Gbit/s is `Fabric("mine", "fat-tree", nics=1, nic=200, pcie=32)`.
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
        """Chips a node."""
        return min(self.fabric.per_node, self.count)

    @property
    def nodes(self) -> int:
        """Nodes, the last one perhaps in part."""
        return -(-self.count // self.fabric.per_node)

    @property
    def inside(self) -> float:
        """Bytes a second of a chip to the others of its node: half of its link, or its PCIe slot."""
        return self.chip.link / 2 or 1e9 * self.fabric.pcie

    @property
    def linked(self) -> bool:
        """True if chips of a node are joined by more than PCIe."""
        return self.chip.link > 0

    @property
    def outside(self) -> float:
        """Bytes a second of all cards of a node together."""
        return self.fabric.nics * self.fabric.nic * 1e9 / 8

    @property
    def card(self) -> float:
        """The most bytes a second of one chip out of its node: one card, or its share of several."""
        return max(self.fabric.nic * 1e9 / 8, self.outside / self.per_node)

    @property
    def latency(self) -> float:
        """Seconds of a hop between nodes."""
        return 1e-6 * self.fabric.latency

    def outside_of(self, chips_spanned: int) -> float:
        """`outside` for a group that spans so many chips: above a pod the network is oversubscribed."""
        if self.fabric.pod and chips_spanned > self.fabric.pod:
            return self.outside / self.fabric.oversubscription
        return self.outside

    def across(self, count: int) -> Cluster:
        """The first `count` chips of it."""
        return replace(self, name=f"{count} of {self.name}", count=count)

    def tell(self) -> str:
        """The cluster in one line."""
        fabric = self.fabric
        inner = f"PCIe of {fabric.pcie:.0f} GB/s"
        if self.linked:
            inner = f"{self.chip.link / 1e9:.0f} GB/s links"
        cards = "one node"
        if self.nodes > 1:
            cards = f"{fabric.nics} x {fabric.nic:.0f} Gbit/s a node, {fabric.topology}"
        text = f"{self.count} x {self.chip.name}, {self.per_node} a node with {inner}; {cards}"
        if fabric.sites > 1:
            text += f"; {fabric.sites} sites joined by {fabric.site_link:g} Gbit/s"
        return text


@cache
def _tree() -> dict[str, Any]:
    """The content of clusters.yaml."""
    return yaml.load(FILE.read_text(encoding="utf-8"), LOADER)


def fabric(name: str) -> Fabric:
    """A fabric of clusters.yaml. Raises LimbeckError for an unknown one."""
    fabrics = _tree()["fabrics"]
    if name not in fabrics:
        raise LimbeckError(f"fabric {name!r} is not known; known are {', '.join(fabrics)}")
    return Fabric(name, **fabrics[name])


def cluster(text: str, **changes: Any) -> Cluster:
    """A cluster by name (`fire-flyer-2`), or by count and chip (`2048xH800`, `8x4090`, `h800-64`).

    `changes` are other values: `cluster("2048xH800", nvlink=900)`, `chip="h20"`, `nics=1`,
    `fabric="two-zone"`, or any figure of the chip. Raises LimbeckError for an unknown cluster, chip or
    fabric, and for an impossible number.
    """
    name = text.strip().lower()
    tree = _tree()
    entry = tree["clusters"].get(name) or _parse(name, text)
    chip = chips.find(changes.pop("chip", entry["chip"]))
    default = entry.get("fabric") or tree["defaults"].get(chip.name, "infiniband-400")
    network = fabric(changes.pop("fabric", default))
    count = int(changes.pop("count", entry["count"]))
    if count < 1:
        raise LimbeckError(f"{text}: a cluster has at least one chip")
    if "nvlink" in changes:
        changes["link"] = changes.pop("nvlink")
    of_network = {key: changes.pop(key) for key in list(changes) if key in NUMBERS}
    network = _change(network, of_network)
    figures = {key: _number(key, value) for key, value in changes.items()}
    return Cluster(name, chip.change(**figures), count, network)


def _parse(name: str, text: str) -> dict[str, Any]:
    """The entry of a cluster that is written as a count and a chip, or as a chip alone."""
    for pattern in (COUNTED, NAMED):
        match = pattern.match(name)
        if match:
            return {"chip": match["chip"], "count": int(match["count"])}
    try:
        return {"chip": chips.find(name).name, "count": 1}
    except LimbeckError:
        known = ", ".join(_tree()["clusters"])
        raise LimbeckError(
            f"{text!r} is no cluster: write COUNTxCHIP, for instance 8x4090, or one of {known}"
        ) from None


def _change(network: Fabric, changes: dict[str, Any]) -> Fabric:
    """A fabric with other numbers."""
    numbers = {}
    for key, value in changes.items():
        number = _number(key, value)
        numbers[key] = int(number) if key in WHOLE else number
        if key in ("sites", "every") and number < 1:
            raise LimbeckError(f"{key}={value}: one at least")
    return replace(network, **numbers)


def _number(key: str, value: Any) -> float:
    """A number that is not negative."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise LimbeckError(f"{key}={value!r} is no number") from None
    if number < 0:
        raise LimbeckError(f"{key}={value} is less than nothing")
    return number
