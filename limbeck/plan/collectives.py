"""Seconds of collective communication: NCCL's ring and tree, HFReduce, node-limited all-to-all.

Each time is a latency plus bytes over bandwidth. The latencies of ring and tree are NCCL's own
(src/graph/tuning.cc, protocol Simple). The efficiency of links and cards, the share of the nominal bandwidth
that they reach, is one of the planner's constants. A link joins the chips of a node; a card is a node's
network card; a hop is one message between neighbours in a ring or tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from .cluster import Cluster

# microseconds (NCCL, src/graph/tuning.cc, protocol Simple): once, and a hop by NVLink, PCIe and network
RING = {"base": 8.4, "nvlink": 3.4, "pcie": 5.7, "net": 14.0}
TREE = {"base": 8.4, "nvlink": 4.0, "pcie": 4.0, "net": 14.0}
NET_LATENCY = 14.0  # microseconds of a hop between nodes, for which both tables are
TREE_SHARE = 0.92  # of a ring's bandwidth that a tree reaches: NCCL's own correction
HFREDUCE_PASSES = 24  # times that a byte passes host memory (arXiv 2408.14158, section 4.2)
HOST_MEMORY = 320e9  # bytes a second of a Fire-Flyer 2 host (arXiv 2408.14158)
# share of its bound that HFReduce reaches: 8.1 of 13.3 GB/s, two chips share a root port (arXiv 2408.14158)
HFREDUCE_SHARE = 0.6


@dataclass(frozen=True)
class Group:
    """A group of `size` chips that communicate, of which `local` are in each node.

    The other chips of a node belong to similar groups that communicate at the same time: `rivals` is the
    number of groups that share a node's cards. `span` is the number of consecutive chips of the cluster
    between the first and the last member, for oversubscription.
    """

    cluster: Cluster
    size: int
    local: int
    rivals: int
    span: int
    links: float = 1.0  # share of its bandwidth that a link inside a node reaches
    cards: float = 1.0  # share of its bandwidth that a network card reaches
    rings: int = 0  # rings between nodes; 0: as many as there are cards

    @property
    def nodes(self) -> int:
        """The number of nodes that have members of the group."""
        return ceil(self.size / self.local)

    @property
    def inside(self) -> float:
        """Bytes a second from one chip to a neighbour in its node.

        Without scale-up links, the chips of a node share the host's PCIe bandwidth.
        """
        sharing = 1 if self.cluster.linked else max(1, self.cluster.per_node / 2)
        return self.cluster.inside * self.links / sharing

    @property
    def outside(self) -> float:
        """Bytes a second that all members of the group in one node send out of the node together."""
        lanes = min(self.local, self.rings or self.local)
        share = self.cluster.outside_of(self.span) / self.rivals
        return self.cards * min(share, lanes * self.cluster.card)

    @property
    def ring(self) -> float:
        """Bytes a second around a ring through all members: the bandwidth of its slowest hop."""
        slowest = float("inf")
        if self.local > 1:
            slowest = self.inside
        if self.nodes > 1:
            slowest = min(slowest, self.outside)
        return slowest


def group(
    cluster: Cluster, size: int, stride: int = 1, links: float = 1.0, cards: float = 1.0, rings: int = 0
) -> Group:
    """Return a group of `size` chips that are `stride` apart.

    `group(c, 8)` is a node of eight chips; `group(c, 64, 8)` is one chip of each of 64 such nodes. `links`
    and `cards` are the shares of their bandwidth that links and cards reach; `rings` is the number of rings
    between nodes (0: as many as there are cards).
    """
    a_node = cluster.per_node // stride if stride < cluster.per_node else 1
    local = max(1, min(size, a_node))
    rivals = max(1, cluster.per_node // local)
    return Group(cluster, size, local, rivals, size * stride, links, cards, rings)


def _hop(g: Group, table: dict[str, float]) -> float:
    """Return the microseconds of a hop inside a node, from the table RING or TREE."""
    return table["nvlink" if g.cluster.linked else "pcie"]


def _net(g: Group, table: dict[str, float]) -> float:
    """Return the microseconds of a hop between nodes, from the table RING or TREE."""
    return table["net"] * g.cluster.fabric.latency / NET_LATENCY


def ring_latency(g: Group, steps: int) -> float:
    """Return the seconds of latency of `steps` hops around a ring.

    A full round crosses from one node to the next as often as there are nodes in the group.
    """
    if g.size < 2:
        return 0.0
    outer = steps * g.nodes / g.size if g.nodes > 1 else 0.0
    inner = steps - outer
    return 1e-6 * (RING["base"] + inner * _hop(g, RING) + outer * _net(g, RING))


def ring_all_reduce(g: Group, size: float) -> float:
    """Return the seconds of a ring all-reduce of `size` bytes.

    With n chips it takes 2(n-1) steps, and each chip sends 2(n-1)/n x `size` bytes.
    """
    n = g.size
    if n < 2:
        return 0.0
    steps = 2 * (n - 1)
    return ring_latency(g, steps) + steps / n * size / g.ring


def tree_all_reduce(g: Group, size: float) -> float:
    """Return the seconds of a tree all-reduce of `size` bytes.

    Its latency grows with the logarithm of the number of nodes.
    """
    if g.size < 2:
        return 0.0
    depth = log2(g.nodes) if g.nodes > 1 else 0.0
    hops = 2 * ((g.local - 1) * _hop(g, TREE) + depth * _net(g, TREE))
    return 1e-6 * (TREE["base"] + hops) + 2 * size / (g.ring * TREE_SHARE)


def all_reduce(g: Group, size: float) -> float:
    """Return the seconds of an all-reduce of `size` bytes by ring or tree, whichever is faster.

    NCCL chooses between them in the same way.
    """
    return min(ring_all_reduce(g, size), tree_all_reduce(g, size))


def all_gather(g: Group, size: float) -> float:
    """Return the seconds of an all-gather, after which every chip holds all `size` bytes.

    A reduce-scatter of `size` bytes takes as long. NCCL has only the ring for both, so latency grows with the
    number of chips.
    """
    n = g.size
    if n < 2:
        return 0.0
    return ring_latency(g, n - 1) + (n - 1) / n * size / g.ring


def hfreduce(g: Group, size: float, bridged: bool = False) -> float:
    """Return the seconds of an all-reduce of `size` bytes by HFReduce, on the hosts' CPUs.

    See arXiv 2408.14158, section 4. The host's memory and the network card bound it, whatever the number of
    chips. With `bridged`, pairs of chips are first summed over NVLink, which halves the bytes that the host
    reads.
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
    """Return the seconds of one message of `size` bytes between two chips while all chips of a node send.

    `inside` is True if both chips are in one node. `links` and `cards` are the shares of their bandwidth that
    links and cards reach.
    """
    if inside:
        latency = RING["nvlink"] if cluster.linked else RING["pcie"]
        return 1e-6 * latency + size / (cluster.inside * links)
    share = min(cluster.card, cluster.outside / cluster.per_node)
    return 1e-6 * cluster.fabric.latency + size / (cards * share)


# ------------------------------------------------------------ experts


def nodes_met(experts: float, nodes: int, limit: int = 0) -> float:
    """Return the mean number of different nodes that hold the experts of one token.

    The token's `experts` are drawn evenly over `nodes` nodes, of which at most `limit` are allowed (0: all of
    them).
    """
    if limit and limit < nodes:
        nodes = limit
    return nodes * (1 - (1 - 1 / nodes) ** experts)


@dataclass(frozen=True)
class AllToAll:
    """The traffic of one token to its experts.

    `far` is the mean number of copies sent to other nodes, and `near` of copies sent to other chips of a
    node. `network` and `link` are the seconds that the network and the scale-up link take for one token of
    one byte.
    """

    far: float
    near: float
    network: float
    link: float

    def seconds(
        self, tokens: float, hidden: int, dispatch: float = 1.0, combine: float = 2.0
    ) -> tuple[float, float]:
        """Return the seconds to send `tokens` tokens to their experts and to return the outputs.

        A token has `hidden` values, of `dispatch` bytes each on the way out and `combine` bytes on the way
        back. Network and link work at the same time, so the slower one counts.
        """
        slow = max(self.network, self.link)
        return tokens * hidden * dispatch * slow, tokens * hidden * combine * slow


def all_to_all(g: Group, experts: float, limit: int = 0, once: bool = True) -> AllToAll:
    """Return the traffic of one token to its `experts` experts, which are spread over the group's chips.

    With `once`, a token crosses the network one time for each node of its experts (arXiv 2412.19437, section
    3.2.2), of which there are at most `limit` (0: no limit), and then goes by link to the chips. Without
    `once`, a separate copy goes to each expert.
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
    """Return the least seconds of expert traffic in decoding: for one layer, and for all layers.

    The second figure is the time of one token through the model. One layer dispatches 1 byte and combines 2
    bytes for each value, to `experts` experts of each of `tokens` tokens; each layer has two micro-batches.
    The defaults are DeepSeek's published example: 120.96 us and 14.76 ms (arXiv 2505.09343, section 2.3.2).
    """
    layer = (1 + 2) * tokens * experts * hidden / bandwidth
    return layer, 2 * layer * layers


def free_experts(link: float = 160e9, network: float = 50e9, nodes: int = 4) -> float:
    """Return how many experts a token can reach for the network time of `nodes` copies, one to each node.

    In the time of one network copy (`network` bytes a second), the scale-up link (`link` bytes a second)
    passes on `link / network` copies. The defaults give 160/50 x 4, "up to 13" (arXiv 2412.19437, section
    3.2.2).
    """
    return nodes * link / network
