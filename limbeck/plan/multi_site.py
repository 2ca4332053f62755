"""Training on several sites with slow links: sites train separately and average their weights at intervals.

The method is DiLoCo (arXiv 2311.08105); over the Internet it was used by INTELLECT-1 (arXiv 2412.01152).
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
    """The averaging of weights between sites.

    It takes `seconds` each time, once in `every` steps, which is the `share` of all time. For comparison,
    `plain` is the seconds of a step if the sites exchanged gradients in every step instead.
    """

    sites: int
    every: int
    seconds: float
    share: float
    plain: float

    def tell(self) -> str:
        """Return a description of the averaging in one line."""
        often = f"{self.sites} sites, averaged every {self.every} steps"
        return (
            f"{often}: {self.seconds:.3g} s each time, {self.share:.1%} of all; "
            f"with gradients exchanged every step {self.plain:.3g} s a step"
        )


def one_of(cluster: Cluster) -> Cluster:
    """Return the cluster of one site.

    Raises LimbeckError if the chips do not divide evenly over the sites, or if the speed of the links between
    sites is unknown.
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
    """Return the seconds to average `size` bytes over the sites by a ring.

    With n sites, each sends 2(n-1)/n x `size` bytes in 2(n-1) hops.
    """
    fabric = cluster.fabric
    hops = 2 * (fabric.sites - 1)
    bandwidth = fabric.site_link * 1e9 / 8
    return hops / fabric.sites * size / bandwidth + hops * 1e-3 * fabric.site_latency


def averaged(step: Step, config: ModelConfig, cluster: Cluster) -> tuple[Step, Averaging]:
    """Return the step of all sites together, and the averaging between them.

    `step` is the step of one site. Each step takes its share of the averaging, which overlaps with nothing.
    """
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
