"""What it takes to exchange data: NCCL's ring and tree, HFReduce, and all-to-all with node-limited routing.

Every cost is latency plus bytes over bandwidth. Latencies of ring and tree are NCCL's own (src/graph/tuning.cc, protocol
Simple); the efficiency of links is one of the planner's constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, comb, log2

from .cluster import Cluster

# microseconds (NCCL, src/graph/tuning.cc, protocol Simple): once, and a hop by NVLink, PCIe and network
RING = {"base": 8.4, "nvlink": 3.4, "pcie": 5.7, "net": 14.0}
TREE = {"base": 8.4, "nvlink": 4.0, "pcie": 4.0, "net": 14.0}
TREE_SHARE = 0.92  # of the bandwidth that a ring has left after its halving, NCCL's own correction
HFREDUCE_PASSES = 24  # of a byte through host memory: arXiv 2408.14158, section 4.2
HOST_MEMORY = 320e9  # bytes a second of a Fire-Flyer 2 host, ibid.
HFREDUCE_SHARE = 0.6  # of the bound that it reaches: 8.1 of 13.3 GB/s, ibid. (two chips share one root port)


@dataclass(frozen=True)
class Group:
    """`size` chips of which `local` are in one node; `rivals` groups like it share the node's cards."""

    cluster: Cluster
    size: int
    local: int
    rivals: int
    span: int
    links: float = 1.0  # share of its bandwidth that a link inside a node gives
    cards: float = 1.0  # the same of a card
    rings: int = 0  # rings between nodes; 0: as many as there are cards

    @property
    def nodes(self) -> int:
        return ceil(self.size / self.local)

    @property
    def inside(self) -> float:
        """Bytes a second of one chip to its neighbours; on PCIe all chips of a node share the host's way."""
        return (
            self.cluster.inside
            * self.links
            / (1 if self.cluster.linked else max(1, self.cluster.per_node / 2))
        )

    @property
    def outside(self) -> float:
        """Bytes a second that the group's members in one node send out together."""
        lanes = min(self.local, self.rings or self.local)
        return self.cards * min(self.cluster.outside_of(self.span) / self.rivals, lanes * self.cluster.card)

    @property
    def ring(self) -> float:
        """Bytes a second around a ring: the thinnest place of it."""
        ways = [self.inside] if self.local > 1 else []
        return min([*ways, self.outside] if self.nodes > 1 else ways or [float("inf")])


def group(
    cluster: Cluster, size: int, stride: int = 1, links: float = 1.0, cards: float = 1.0, rings: int = 0
) -> Group:
    """Every `stride`-th chip: `group(c, 8)` is a node, `group(c, 64, 8)` one chip of each of 64 nodes."""
    local = max(1, min(size, cluster.per_node // stride if stride < cluster.per_node else 1))
    return Group(cluster, size, local, max(1, cluster.per_node // local), size * stride, links, cards, rings)


def _hop(g: Group, table: dict[str, float]) -> float:
    return table["nvlink" if g.cluster.linked else "pcie"]


def _net(g: Group, table: dict[str, float]) -> float:
    return table["net"] * g.cluster.fabric.latency / 14.0


def ring_latency(g: Group, steps: int) -> float:
    """Seconds of `steps` hops round a ring: most inside nodes, as many between nodes as there are nodes in it."""
    if g.size < 2:
        return 0.0
    outer = steps * g.nodes / g.size if g.nodes > 1 else 0.0
    return 1e-6 * (RING["base"] + (steps - outer) * _hop(g, RING) + outer * _net(g, RING))


def ring_all_reduce(g: Group, size: float) -> float:
    """2(n-1) steps; each chip sends 2(n-1)/n of its bytes."""
    n = g.size
    return ring_latency(g, 2 * (n - 1)) + 2 * (n - 1) / n * size / g.ring if n > 1 else 0.0


def tree_all_reduce(g: Group, size: float) -> float:
    """Up and down a tree: latency grows with the logarithm of the nodes, bandwidth is a little less than the ring's."""
    if g.size < 2:
        return 0.0
    hops = 2 * ((g.local - 1) * _hop(g, TREE) + (log2(g.nodes) if g.nodes > 1 else 0.0) * _net(g, TREE))
    return 1e-6 * (TREE["base"] + hops) + 2 * size / (g.ring * TREE_SHARE)


def all_reduce(g: Group, size: float) -> float:
    """Seconds; ring or tree, whichever is faster, as NCCL chooses."""
    return min(ring_all_reduce(g, size), tree_all_reduce(g, size))


def all_gather(g: Group, size: float) -> float:
    """Seconds until every chip holds all `size` bytes; a reduce-scatter of `size` bytes takes as long. NCCL has only
    the ring for these, so latency grows with the number of chips."""
    n = g.size
    return ring_latency(g, n - 1) + (n - 1) / n * size / g.ring if n > 1 else 0.0


def hfreduce(g: Group, size: float, bridged: bool = False) -> float:
    """All-reduce on the hosts' processors (arXiv 2408.14158, section 4): bound by host memory and by the card, whatever
    the number of chips; `bridged` chips are summed in pairs over NVLink first, which halves what the host reads."""
    if g.size < 2:
        return 0.0
    memory = HOST_MEMORY / HFREDUCE_PASSES * (2 if bridged else 1)
    card = g.cluster.fabric.nic * 1e9 / 8 / 2 if g.nodes > 1 else float("inf")
    hops = 2 * log2(g.nodes) * TREE["net"] * 1e-6 if g.nodes > 1 else 0.0
    return hops + size / (HFREDUCE_SHARE * min(memory, card))


def send(cluster: Cluster, size: float, inside: bool, links: float = 1.0, cards: float = 1.0) -> float:
    """Seconds of one message from chip to chip, all chips of a node sending at once."""
    if inside:
        return 1e-6 * (RING["nvlink"] if cluster.linked else RING["pcie"]) + size / (cluster.inside * links)
    return 1e-6 * cluster.fabric.latency + size / (
        cards * min(cluster.card, cluster.outside / cluster.per_node)
    )


# ------------------------------------------------------------ experts


def nodes_met(experts: float, nodes: int, limit: int = 0) -> float:
    """Nodes that a token's experts lie on, on average: `experts` drawn evenly over `nodes`, at most `limit` of them."""
    free = nodes * (1 - (1 - 1 / nodes) ** experts)
    if not limit or limit >= nodes:
        return free
    return limit * (1 - (1 - 1 / limit) ** experts)


@dataclass(frozen=True)
class AllToAll:
    """Where a token goes: `far` other nodes, `near` other chips, by network and by link; seconds a token of one byte a
    value are `network` and `link`."""

    far: float
    near: float
    network: float
    link: float

    def seconds(
        self, tokens: float, hidden: int, dispatch: float = 1.0, combine: float = 2.0
    ) -> tuple[float, float]:
        """Of sending a batch's tokens to their experts and of getting the answers back, `dispatch` and `combine` bytes
        a value. The two ways work side by side, so the slower counts."""
        slow = max(self.network, self.link)
        return tokens * hidden * dispatch * slow, tokens * hidden * combine * slow


def all_to_all(g: Group, experts: float, limit: int = 0, once: bool = True) -> AllToAll:
    """Expert traffic in a group: over the network `once` for each node a token's experts lie on (arXiv 2412.19437,
    section 3.2.2), then by NVLink to the chips; without `once` a copy goes to each expert."""
    nodes, local = g.nodes, g.local
    met = nodes_met(experts, nodes, limit)
    far = (met if once else experts) * (nodes - 1) / nodes if nodes > 1 else 0.0
    near = experts * (1 - 1 / local) if local > 1 else 0.0
    network = far / (g.outside / local) if far else 0.0
    link = near / g.inside if near else 0.0
    return AllToAll(far, near, network, link)


def decode_bound(
    tokens: int = 32, experts: int = 9, hidden: float = 7e3, bandwidth: float = 50e9, layers: int = 61
) -> tuple[float, float]:
    """Seconds of one layer's dispatch (1 byte) and combine (2 bytes), and of a token through `layers` of them, each
    with two micro-batches: 120.96 us and 14.76 ms (arXiv 2505.09343, section 2.3.2)."""
    layer = (1 + 2) * tokens * experts * hidden / bandwidth
    return layer, 2 * layer * layers


def free_experts(link: float = 160e9, network: float = 50e9, nodes: int = 4) -> float:
    """Experts a token may have at the price of `nodes` network hops: 160/50 x 4, "up to 13" (arXiv 2412.19437, 3.2.2)."""
    return nodes * link / network


def spread(experts: int, chosen: int, copies: int) -> float:
    """Chance that a chip with `copies` of `experts` gets a token that goes to `chosen` of them."""
    return 1 - comb(experts - copies, chosen) / comb(experts, chosen)
