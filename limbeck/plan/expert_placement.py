"""Where a mixture's experts go when their load is uneven: copies of the busiest, packed so that chips are equally busy.

The method is that of EPLB (deepseek-ai/EPLB; DeepSeek-V3, arXiv 2412.19437, section 3.4): groups of experts to nodes,
copies within a node, copies to chips; always the heaviest first, to where it is lightest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..types import LimbeckError


@dataclass(frozen=True)
class Placement:
    """`experts[slot]` is the expert in a slot; slots of a chip are neighbours. `loads` is what each chip gets."""

    experts: tuple[int, ...]
    loads: tuple[float, ...]

    @property
    def balance(self) -> float:
        """Mean load over the greatest: 1 is perfect."""
        return sum(self.loads) / len(self.loads) / max(self.loads)


def place(load: Sequence[float], slots: int, groups: int = 1, nodes: int = 1, chips: int = 1) -> Placement:
    """Place one layer's experts of known `load` in `slots`, of which each chip has as many. Groups stay in a node if
    they divide over nodes (node-limited routing needs that); otherwise nodes are not regarded."""
    if slots < len(load) or slots % chips or len(load) % groups or chips % nodes:
        raise LimbeckError(
            f"{len(load)} experts in {groups} groups do not go into {slots} slots of {chips} chips in {nodes} nodes"
        )
    if groups % nodes:
        groups = nodes = 1
    size = len(load) // groups
    sums = [sum(load[group * size : (group + 1) * size]) for group in range(groups)]
    found: list[int] = []
    for own in _pack(sums, nodes):
        here = [group * size + i for group in own for i in range(size)]
        copies, counts = _copy([load[expert] for expert in here], slots // nodes)
        each = [load[here[copy]] / counts[copy] for copy in copies]
        found += [here[copies[slot]] for pack in _pack(each, chips // nodes) for slot in pack]
    return Placement(tuple(found), _loads(load, found, chips))


def _loads(load: Sequence[float], experts: list[int], chips: int) -> tuple[float, ...]:
    share = len(experts) // chips
    each = [load[expert] / experts.count(expert) for expert in experts]
    return tuple(sum(each[chip * share : (chip + 1) * share]) for chip in range(chips))


def _pack(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Things into packs of equal number: the heaviest first, into the lightest pack that has room."""
    room = len(weights) // packs
    if room == 1:
        return [[i] for i in range(packs)]
    found: list[list[int]] = [[] for _ in range(packs)]
    sums = [0.0] * packs
    for thing in sorted(range(len(weights)), key=lambda i: -weights[i]):
        pack = min((p for p in range(packs) if len(found[p]) < room), key=lambda p: sums[p])
        found[pack].append(thing)
        sums[pack] += weights[thing]
    return found


def _copy(load: Sequence[float], slots: int) -> tuple[list[int], list[int]]:
    """One copy of each, then one more of whichever is busiest a copy, until slots are full; and how many each has."""
    copies, counts = list(range(len(load))), [1] * len(load)
    while len(copies) < slots:
        busiest = max(range(len(load)), key=lambda i: load[i] / counts[i])
        copies.append(busiest)
        counts[busiest] += 1
    return copies, counts
