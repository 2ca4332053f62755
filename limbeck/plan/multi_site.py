"""Training on several sites with thin links: each trains by itself, and at times they average their weights.

DiLoCo (arXiv 2311.08105); over the Internet: INTELLECT-1 (arXiv 2412.01152).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..model.config import ModelConfig
from ..types import LimbeckError
from .cluster import Cluster
from .step import Step, binds

OUTER_BYTES = 1  # a weight's change is sent in eight bits (arXiv 2412.01152, section 2.3)
GRADIENT_BYTES = 2  # a gradient is sent in sixteen, where sites exchange them every step


@dataclass(frozen=True)
class Averaging:
    """The exchange between sites: `seconds` each time, once in `every` steps, a `share` of all time.

    `plain` is the seconds of a step if gradients were exchanged every step.
    """

    sites: int
    every: int
    seconds: float
    share: float
    plain: float

    def tell(self) -> str:
        """The exchange in one line."""
        often = f"{self.sites} sites, averaged every {self.every} steps"
        return (
            f"{often}: {self.seconds:.3g} s each time, {self.share:.1%} of all; "
            f"with gradients exchanged every step {self.plain:.3g} s a step"
        )


def one_of(cluster: Cluster) -> Cluster:
    """The chips of one site.

    Raises LimbeckError if sites differ in size, or the speed of their links is unknown.
    """
    sites = cluster.fabric.sites
    if cluster.count % sites:
        raise LimbeckError(
            f"{cluster.count} chips cannot be dealt evenly to {sites} sites; change count or sites"
        )
    if not cluster.fabric.site_link:
        raise LimbeckError(
            f"{sites} sites are joined by links of unknown speed; give it in Gbit/s, as site_link=10"
        )
    fabric = replace(cluster.fabric, sites=1)
    return replace(cluster, name=f"a site of {cluster.name}", count=cluster.count // sites, fabric=fabric)


def exchange(cluster: Cluster, size: float) -> float:
    """Seconds of a ring over the sites: each sends 2(n-1)/n of `size` bytes, in 2(n-1) hops."""
    fabric = cluster.fabric
    hops = 2 * (fabric.sites - 1)
    bandwidth = fabric.site_link * 1e9 / 8
    return hops / fabric.sites * size / bandwidth + hops * 1e-3 * fabric.site_latency


def averaged(step: Step, config: ModelConfig, cluster: Cluster) -> tuple[Step, Averaging]:
    """The step of all sites, from that of one, with its share of the exchange, which nothing hides."""
    fabric = cluster.fabric
    each = exchange(cluster, OUTER_BYTES * config.parameters)
    late = each / fabric.every
    seconds = step.seconds + late
    parts = {**step.parts, "sites": late}
    whole = replace(
        step,
        seconds=seconds,
        low=step.low + late / 2,
        high=step.high + 2 * late,
        parts=parts,
        binds=binds(parts, seconds),
        tokens=step.tokens * fabric.sites,
        chips=step.chips * fabric.sites,
    )
    plain = step.seconds + exchange(cluster, GRADIENT_BYTES * config.parameters)
    return whole, Averaging(fabric.sites, fabric.every, each, late / seconds, plain)
