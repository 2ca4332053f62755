"""Clusters: a chip, the number of chips, the chips of a node, and the network that joins the nodes."""

from __future__ import annotations

import re
from contextlib import suppress
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
    """The network of a cluster, with numbers in the units of clusters.yaml.

    `per_node` is chips a node, `nics` network cards a node, `nic` Gbit/s of a card, `pcie` GB/s of a PCIe
    slot, and `latency` microseconds of a hop between nodes. Above `pod` chips the network has
    1/`oversubscription` of its bandwidth (`pod=0`: never). `site_link` (Gbit/s) and `site_latency`
    (milliseconds) join `sites` sites, which average their weights once in `every` steps. Eight chips behind
    one card of 200 Gbit/s are `Fabric("mine", "fat-tree", nics=1, nic=200, pcie=32)`.
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
    """`count` equal chips and their network: `cluster("2048xH800")` has 256 nodes of eight chips.

    All bandwidths are in bytes a second in one direction.
    """

    name: str
    chip: Chip
    count: int
    fabric: Fabric

    @property
    def per_node(self) -> int:
        """The number of chips in a node."""
        return min(self.fabric.per_node, self.count)

    @property
    def nodes(self) -> int:
        """The number of nodes; the last one may be only partly used."""
        return -(-self.count // self.fabric.per_node)

    @property
    def inside(self) -> float:
        """Bytes a second from one chip to the other chips of its node.

        It is half of the scale-up link's two-way bandwidth, or the bandwidth of the PCIe slot if there is no
        link.
        """
        return self.chip.link / 2 or 1e9 * self.fabric.pcie

    @property
    def linked(self) -> bool:
        """True if the chips of a node are joined by a scale-up link (such as NVLink), not only by PCIe."""
        return self.chip.link > 0

    @property
    def outside(self) -> float:
        """Bytes a second that all network cards of a node send together."""
        return self.fabric.nics * self.fabric.nic * 1e9 / 8

    @property
    def card(self) -> float:
        """The most bytes a second that one chip can send out of its node.

        It is the bandwidth of one card, or the chip's share of the node's cards if that is more.
        """
        return max(self.fabric.nic * 1e9 / 8, self.outside / self.per_node)

    @property
    def latency(self) -> float:
        """Seconds of latency of one hop between nodes."""
        return 1e-6 * self.fabric.latency

    def outside_of(self, chips_spanned: int) -> float:
        """Return `outside` for a group of chips that spans `chips_spanned` chips.

        A group larger than a pod has less bandwidth, because the network between pods is oversubscribed.
        """
        if self.fabric.pod and chips_spanned > self.fabric.pod:
            return self.outside / self.fabric.oversubscription
        return self.outside

    def across(self, count: int) -> Cluster:
        """Return a cluster of only `count` chips, with the same chip and network."""
        return replace(self, name=f"{count} of {self.name}", count=count)

    def tell(self) -> str:
        """Return a description of the cluster in one line."""
        if self.count == 1:
            return f"1 x {self.chip.name}"
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
    """Return the parsed content of clusters.yaml."""
    return yaml.load(FILE.read_text(encoding="utf-8"), LOADER)


def fabric(name: str) -> Fabric:
    """Return the fabric called `name` in clusters.yaml. Raises LimbeckError for an unknown name."""
    fabrics = _tree()["fabrics"]
    if name not in fabrics:
        raise LimbeckError(f"fabric {name!r} is not known; known are {', '.join(fabrics)}")
    return Fabric(name, **fabrics[name])


def cluster(text: str, **changes: Any) -> Cluster:
    """Return a cluster by name (`fire-flyer-2`), or by count and chip (`2048xH800`, `8x4090`, `h800-64`).

    `changes` replace single values of that cluster: `cluster("2048xH800", nvlink=900)`, `chip="h20"`,
    `nics=1`, `fabric="two-zone"`, or any figure of the chip. Raises LimbeckError for an unknown cluster, chip
    or fabric, and for an impossible number.
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
    """Return the entry of a cluster that is written as a count and a chip, or as a chip alone.

    The entry has the keys `chip` and `count`. `name` is `text` in lower case; `text` is what the error cites.
    Raises LimbeckError if neither form matches.
    """
    with suppress(LimbeckError):
        return {"chip": chips.find(name).name, "count": 1}
    for pattern in (COUNTED, NAMED):
        match = pattern.match(name)
        if match:
            return {"chip": match["chip"], "count": int(match["count"])}
    known = ", ".join(_tree()["clusters"])
    raise LimbeckError(f"{text!r} is no cluster: write COUNTxCHIP, for instance 8x4090, or one of {known}")


def _change(network: Fabric, changes: dict[str, Any]) -> Fabric:
    """Return the fabric with other values of its fields. Raises LimbeckError for an impossible number."""
    numbers = {}
    for key, value in changes.items():
        number = _number(key, value)
        numbers[key] = int(number) if key in WHOLE else number
        if key in ("sites", "every") and number < 1:
            raise LimbeckError(f"{key}={value}: one at least")
    return replace(network, **numbers)


def _number(key: str, value: Any) -> float:
    """Return `value` as a float. Raises LimbeckError, which names `key`, if it is no number or negative."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise LimbeckError(f"{key}={value!r} is no number") from None
    if number < 0:
        raise LimbeckError(f"{key}={value} is less than nothing")
    return number
