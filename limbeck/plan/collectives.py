"""Seconds of collective communication: NCCL's ring and tree, HFReduce, node-limited all-to-all.

Each is latency plus bytes over bandwidth. Latencies of ring and tree are NCCL's own (src/graph/tuning.cc,
protocol Simple); the efficiency of links is one of the planner's constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from .cluster import Cluster

# microseconds (NCCL, src/graph/tuning.cc, protocol Simple): once, and a hop by NVLink, PCIe and network
RING = {"base": 8.4, "nvlink": 3.4, "pcie": 5.7, "net": 14.0}
TREE = {"base": 8.4, "nvlink": 4.0, "pcie": 4.0, "net": 14.0}
NET_LATENCY = 14.0  # microseconds of a hop between nodes, for which both tables are
TREE_SHARE = 0.92  # of the bandwidth that a ring has left after its halving, NCCL's own correction
HFREDUCE_PASSES = 24  # of a byte through host memory: arXiv 2408.14158, section 4.2
HOST_MEMORY = 320e9  # bytes a second of a Fire-Flyer 2 host, ibid.
HFREDUCE_SHARE = 0.6  # of the bound that it reaches: 8.1 of 13.3 GB/s, ibid. (two chips share one root port)


@dataclass(frozen=True)
class Group:
    """`size` chips of which `local` are in one node; `rivals` such groups share the node's cards.

    The group spans `span` chips of the cluster.
    """

    cluster: Cluster
    size: int
    local: int
    rivals: int
    span: int
    links: float = 1.0  # share of its bandwidth that a link inside a node reaches
    cards: float = 1.0  # the same of a card
    rings: int = 0  # rings between nodes; 0: as many as there are cards

    @property
    def nodes(self) -> int:
        """Nodes with members of the group."""
        return ceil(self.size / self.local)

    @property
    def inside(self) -> float:
        """Bytes a second of one chip to its neighbours; on PCIe a node's chips share the host's lanes."""
        sharing = 1 if self.cluster.linked else max(1, self.cluster.per_node / 2)
        return self.cluster.inside * self.links / sharing

    @property
    def outside(self) -> float:
        """Bytes a second that the group's members in one node send out together."""
        lanes = min(self.local, self.rings or self.local)
        share = self.cluster.outside_of(self.span) / self.rivals
        return self.cards * min(share, lanes * self.cluster.card)

    @property
    def ring(self) -> float:
        """Bytes a second around a ring: those of its slowest hop."""
        slowest = float("inf")
        if self.local > 1:
            slowest = self.inside
        if self.nodes > 1:
            slowest = min(slowest, self.outside)
        return slowest


def group(
    cluster: Cluster, size: int, stride: int = 1, links: float = 1.0, cards: float = 1.0, rings: int = 0
) -> Group:
    """Every `stride`-th chip: `group(c, 8)` is a node, `group(c, 64, 8)` one chip of each of 64 nodes."""
    a_node = cluster.per_node // stride if stride < cluster.per_node else 1
    local = max(1, min(size, a_node))
    rivals = max(1, cluster.per_node // local)
    return Group(cluster, size, local, rivals, size * stride, links, cards, rings)


def _hop(g: Group, table: dict[str, float]) -> float:
    """Microseconds of a hop inside a node."""
    return table["nvlink" if g.cluster.linked else "pcie"]


def _net(g: Group, table: dict[str, float]) -> float:
    """Microseconds of a hop between nodes."""
    return table["net"] * g.cluster.fabric.latency / NET_LATENCY


def ring_latency(g: Group, steps: int) -> float:
    """Seconds of `steps` hops round a ring, which passes between nodes as often as there are nodes in it."""
    if g.size < 2:
        return 0.0
    outer = steps * g.nodes / g.size if g.nodes > 1 else 0.0
    inner = steps - outer
    return 1e-6 * (RING["base"] + inner * _hop(g, RING) + outer * _net(g, RING))


def ring_all_reduce(g: Group, size: float) -> float:
    """Seconds of a ring all-reduce: 2(n-1) steps; each chip sends 2(n-1)/n of `size` bytes."""
    n = g.size
    if n < 2:
        return 0.0
    steps = 2 * (n - 1)
    return ring_latency(g, steps) + steps / n * size / g.ring


def tree_all_reduce(g: Group, size: float) -> float:
    """Seconds of a tree all-reduce: latency grows with the logarithm of the nodes."""
    if g.size < 2:
        return 0.0
    depth = log2(g.nodes) if g.nodes > 1 else 0.0
    hops = 2 * ((g.local - 1) * _hop(g, TREE) + depth * _net(g, TREE))
    return 1e-6 * (TREE["base"] + hops) + 2 * size / (g.ring * TREE_SHARE)


def all_reduce(g: Group, size: float) -> float:
    """Seconds of an all-reduce by ring or tree, whichever is faster, as NCCL chooses."""
    return min(ring_all_reduce(g, size), tree_all_reduce(g, size))


def all_gather(g: Group, size: float) -> float:
    """Seconds until every chip holds all `size` bytes; a reduce-scatter of `size` bytes takes as long.

    NCCL has only the ring for these, so latency grows with the number of chips.
    """
    n = g.size
    if n < 2:
        return 0.0
    return ring_latency(g, n - 1) + (n - 1) / n * size / g.ring


def hfreduce(g: Group, size: float, bridged: bool = False) -> float:
    """Seconds of an all-reduce on the hosts' processors (arXiv 2408.14158, section 4).

    It is bound by host memory and by the card, whatever the number of chips. `bridged` chips are summed in
    pairs over NVLink first, which halves the bytes that the host reads.
    """
    if g.size < 2:
        return 0.0
    memory = HOST_MEMORY / HFREDUCE_PASSES * (2 if bridged else 1)
    card = float("inf")
    hops = 0.0
    if g.nodes > 1:
        card = g.cluster.fabric.nic * 1e9 / 8 / 2
        hops = 2 * log2(g.nodes) * TREE["net"] * 1e-6
    return hops + size / (HFREDUCE_SHARE * min(memory, card))


def send(cluster: Cluster, size: float, inside: bool, links: float = 1.0, cards: float = 1.0) -> float:
    """Seconds of one message of `size` bytes from chip to chip, while all chips of a node send."""
    if inside:
        latency = RING["nvlink"] if cluster.linked else RING["pcie"]
        return 1e-6 * latency + size / (cluster.inside * links)
    share = min(cluster.card, cluster.outside / cluster.per_node)
    return 1e-6 * cluster.fabric.latency + size / (cards * share)


# ------------------------------------------------------------ experts


def nodes_met(experts: float, nodes: int, limit: int = 0) -> float:
    """Mean number of nodes of a token's `experts`, drawn evenly over `nodes`, at most `limit` of them."""
    if limit and limit < nodes:
        nodes = limit
    return nodes * (1 - (1 - 1 / nodes) ** experts)


@dataclass(frozen=True)
class AllToAll:
    """Destinations of a token: `far` other nodes, `near` other chips.

    `network` and `link` are the seconds of a token of one byte by network and by link.
    """

    far: float
    near: float
    network: float
    link: float

    def seconds(
        self, tokens: float, hidden: int, dispatch: float = 1.0, combine: float = 2.0
    ) -> tuple[float, float]:
        """Seconds to send a batch's tokens to their experts, and to return the outputs.

        `dispatch` and `combine` are bytes a value. Network and link work side by side, so the slower counts.
        """
        slow = max(self.network, self.link)
        return tokens * hidden * dispatch * slow, tokens * hidden * combine * slow


def all_to_all(g: Group, experts: float, limit: int = 0, once: bool = True) -> AllToAll:
    """Expert traffic in a group.

    A token crosses the network `once` for each node of its experts (arXiv 2412.19437, section 3.2.2), then
    goes by NVLink to the chips; without `once` a copy goes to each expert.
    """
    nodes = g.nodes
    local = g.local
    copies = nodes_met(experts, nodes, limit) if once else experts
    far = copies * (nodes - 1) / nodes if nodes > 1 else 0.0
    near = experts * (1 - 1 / local) if local > 1 else 0.0
    network = far / (g.outside / local) if far else 0.0
    link = near / g.inside if near else 0.0
    return AllToAll(far, near, network, link)


def decode_bound(
    tokens: int = 32, experts: int = 9, hidden: float = 7e3, bandwidth: float = 50e9, layers: int = 61
) -> tuple[float, float]:
    """Seconds of one layer's dispatch (1 byte) and combine (2 bytes), and of a token through all layers.

    Each layer has two micro-batches: 120.96 us and 14.76 ms (arXiv 2505.09343, section 2.3.2).
    """
    layer = (1 + 2) * tokens * experts * hidden / bandwidth
    return layer, 2 * layer * layers


def free_experts(link: float = 160e9, network: float = 50e9, nodes: int = 4) -> float:
    """Experts a token at the price of `nodes` network hops.

    With the defaults 160/50 x 4, "up to 13" (arXiv 2412.19437, section 3.2.2).
    """
    return nodes * link / network
