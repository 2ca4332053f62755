"""What reinforcement learning costs: rollouts whose longest sample everybody waits for, learning, and changing over.

    rollout    samples decode side by side; rows end at their lengths, and the last one decodes alone:
               the sum over tokens t of step(rows alive at t, context at t)
    learning   FLOPs of every sampled token, forward and backward, and forward once more for each set of log-probabilities
    changing   weights and optimiser go to the host and come back, engines wake up
    overlap    asynchronous systems sample the next batch while they learn: the longer of the two counts

Ideal decoding and ideal learning are several times too cheap: small batches at the tail, not arithmetic, fill the time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import exp, log, sqrt
from statistics import NormalDist

import numpy as np

from ..model.config import ModelConfig
from ..types import LimbeckError
from . import cost
from .cluster import Cluster
from .inference import Replica

LEARNER_MFU = (
    0.12,
    0.20,
    0.35,
)  # low, middle, high: 0.19 is Delethink's backward (2510.06557); causal, 16-bit peak
WAKE = 20.0  # seconds to wake engines and learners up, a rollout: guessed
HOST_LINK = 20e9  # bytes a second of one chip to its host's memory and back: PCIe 4.0 as it is reached
STATE = 16  # bytes a weight that learning keeps (weights, gradients, AdamW in mixed precision)
POINTS = 96  # of the curve of rows alive
SPREAD = 0.7  # standard deviation of the logarithm of a length, where nobody has measured it


@dataclass(frozen=True)
class Lengths:
    """How long completions are, in tokens: `Lengths(8000, cap=32768)` is lognormal; `Lengths.of(samples)` is what was seen.

    `mean` is that of what is sampled, the cap's cut included.
    """

    mean: float
    cap: float
    spread: float = SPREAD
    seen: tuple[float, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[float], cap: float) -> Lengths:
        """An empirical distribution."""
        cut = tuple(sorted(min(float(x), cap) for x in samples))
        if not cut:
            raise LimbeckError("no lengths were given")
        return cls(sum(cut) / len(cut), cap, seen=cut)

    @cached_property
    def _median(self) -> float:
        """Of the lognormal before its cut, so that the mean after it is `mean`."""
        if self.mean > self.cap:
            raise LimbeckError(
                f"completions of {self.mean:,.0f} tokens on average do not fit under a cap of {self.cap:,.0f}"
            )
        low, high = 1e-3, 1e3 * self.cap
        for _ in range(60):
            middle = sqrt(low * high)
            low, high = (middle, high) if self._cut_mean(middle) < self.mean else (low, middle)
        return low

    def _cut_mean(self, median: float) -> float:
        """E min(x, cap) of a lognormal."""
        normal, s = NormalDist(), self.spread
        z = (log(self.cap) - log(median)) / s
        return median * exp(s * s / 2) * normal.cdf(z - s) + self.cap * (1 - normal.cdf(z))

    def quantile(self, share: float) -> float:
        if self.seen:
            return self.seen[min(len(self.seen) - 1, int(share * len(self.seen)))]
        return min(self.cap, self._median * exp(self.spread * NormalDist().inv_cdf(share)))

    def draw(self, count: int, of: int | None = None) -> list[float]:
        """`count` lengths that stand for all: evenly spaced quantiles. The longest is that of `of` samples, if more."""
        lengths = [self.quantile((i + 0.5) / count) for i in range(count)]
        if of and of > count:
            lengths[-1] = self.quantile(1 - 0.5 / of)
        return lengths

    @property
    def truncated(self) -> float:
        """Share that the cap cuts."""
        if self.seen:
            return sum(x >= self.cap for x in self.seen) / len(self.seen)
        return 1 - NormalDist().cdf((log(self.cap) - log(self._median)) / self.spread)

    @property
    def square(self) -> float:
        """Mean of the square over the mean: how long the sample is that a random token is in."""
        sample = self.draw(256)
        return sum(x * x for x in sample) / sum(sample)

    def times(self, factor: float) -> Lengths:
        """As many times as long, under the same cap."""
        return replace(self, mean=min(self.mean * factor, 0.95 * self.cap), seen=())


StepTime = Callable[[float, float], float]  # rows alive, context -> seconds


def decode_seconds(
    lengths: Sequence[float], slots: int, step: StepTime, prompt: float
) -> tuple[float, float]:
    """Seconds until the last of `lengths` is done on one replica of `slots` rows, and of these the tail, when less than half of the
    rows are alive. N samples, P points in time; time is counted in steps, one token each."""
    ends, free = [], [0.0] * min(slots, len(lengths))
    order = lengths if len(lengths) <= slots else _mixed(lengths)
    for length in order:
        end = heapq.heappop(free) + length if len(free) == min(slots, len(lengths)) else length
        heapq.heappush(free, end)
        ends.append((end, length))
    end_N, length_N = np.array(ends).T
    begin_N, last = end_N - length_N, end_N.max()
    at_P1 = (last * (np.arange(POINTS) + 0.5) / POINTS)[:, None]
    alive_PN = (begin_N <= at_P1) & (at_P1 < end_N)
    alive_P = np.maximum(1, alive_PN.sum(1))
    age_P = ((at_P1 - begin_N) * alive_PN).sum(1) / alive_P
    took_P = (
        np.array([step(float(n), prompt + float(age)) for n, age in zip(alive_P, age_P, strict=True)])
        * last
        / POINTS
    )
    return float(took_P.sum()), float(took_P[alive_P < 0.5 * min(slots, len(lengths))].sum())


def _mixed(lengths: Sequence[float]) -> list[float]:
    """A fixed shuffle: every k-th in turn, k prime to the count."""
    n = len(lengths)
    stride = next(k for k in range(int(n * 0.618) | 1, 2 * n + 3, 2) if _prime(k, n))
    return [lengths[i * stride % n] for i in range(n)]


def _prime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


@dataclass(frozen=True)
class Phase:
    """So many rollouts with completions of such lengths: `Phase(512, Lengths(6000, 32768))`."""

    rollouts: int
    lengths: Lengths


@dataclass(frozen=True)
class RL:
    """A run of reinforcement learning on a cluster. One rollout is `samples` completions, learned in `updates` updates.

    `replica` chips serve one copy of the model. `extra` forward passes score each token once more (old policy, reference).
    `speculation` is tokens a step by self-speculation. `overlap` samples while it learns, on the same chips in turn.
    `window` bounds the context that decoding looks back on, for methods that think in chunks.
    """

    config: ModelConfig
    cluster: Cluster
    phases: tuple[Phase, ...]
    samples: int
    replica: int
    precision: str = "bf16"
    prompt: float = 200.0
    extra: int = 2
    speculation: float = 1.0
    mfu: float = LEARNER_MFU[1]
    overlap: bool = False
    window: float = 0.0
    slower: float = 1.0
    grading: float = 0.0
    wake: float = WAKE
    offload: bool = True

    def __post_init__(self) -> None:
        if self.cluster.count % self.replica:
            raise LimbeckError(f"{self.cluster.count} chips do not fall into replicas of {self.replica}")

    @cached_property
    def unit(self) -> Replica:
        return Replica(self.config, self.cluster, self.replica, self.precision)

    def parts(self, lengths: Lengths) -> dict[str, float]:
        """Seconds of one rollout and its learning: rollout, tail (a part of it), learning, changing over, grading."""
        replicas = self.cluster.count // self.replica
        mine = max(1, self.samples // replicas)
        seen = min(self.prompt + lengths.square / 2, self.window or 1e9)
        slots = min(mine, self.replica * max(1, self.unit.most_rows(seen)))

        def step(rows: float, context: float) -> float:
            context = min(context, 0.75 * self.window) if self.window else context
            return (
                self.unit.decode(max(1.0, rows) / self.replica, context).seconds
                * self.slower
                / self.speculation
            )

        rollout, tail = decode_seconds(lengths.draw(mine, self.samples), slots, step, self.prompt)
        tokens = self.samples * (lengths.mean + self.prompt)
        flops = cost.flops_per_token(self.config, min(lengths.square, self.window or 1e9)) * (
            1 + self.extra / 3
        )
        peak = self.cluster.chip.rate("bf16" if "bf16" in self.cluster.chip.figures else "fp16")
        learning = tokens * flops / (self.cluster.count * peak * self.mfu)
        moved = (
            2 * STATE * cost.weights(self.config) / self.cluster.count / HOST_LINK if self.offload else 0.0
        )
        grading = max(0.0, self.grading - tail)  # rewards are computed while the last samples decode
        return {
            "rollout": rollout,
            "tail": tail,
            "learning": learning,
            "changing over": self.wake * self.offload + moved,
            "grading": grading,
        }

    def seconds(self) -> float:
        """Of all phases."""
        return sum(phase.rollouts * self._one(self.parts(phase.lengths)) for phase in self.phases)

    def _one(self, parts: dict[str, float]) -> float:
        if self.overlap:
            return max(parts["rollout"] + parts["grading"], parts["learning"])
        return sum(parts.values()) - parts["tail"]

    def plan(self) -> RLCost:
        """Seconds with their interval: what is not known is varied one by one, and the logarithms of what each changes add
        up like independent errors (squares)."""
        middle = self.seconds()
        up = down = 0.0
        for low, high in self._unknowns():
            up += max(0.0, *(log(one.seconds() / middle) for one in (low, high))) ** 2
            down += min(0.0, *(log(one.seconds() / middle) for one in (low, high))) ** 2
        total: dict[str, float] = {}
        for phase in self.phases:
            for name, value in self.parts(phase.lengths).items():
                total[name] = total.get(name, 0.0) + phase.rollouts * value
        shares = {
            "decoding the longest samples": total["tail"],
            "decoding": total["rollout"] - total["tail"],
            "learning": total["learning"],
            "changing over": total["changing over"],
        }
        name = max(shares, key=shares.get)
        tokens = sum(phase.rollouts * self.samples * phase.lengths.mean for phase in self.phases)
        binds = f"{name}: {shares[name] / sum(shares.values()):.0%} of the time"
        return RLCost(
            middle,
            middle * exp(-sqrt(down)),
            middle * exp(sqrt(up)),
            total,
            tokens,
            self.cluster.count,
            binds,
        )

    def _unknowns(self) -> list[tuple[RL, RL]]:
        """How fast engines are in practice, how well the learner, how long completions get, how far they spread, drafts."""

        def phases(mean: float, spread: float) -> tuple[Phase, ...]:
            return tuple(
                replace(
                    p,
                    lengths=replace(p.lengths.times(mean), spread=p.lengths.spread + spread)
                    if not p.lengths.seen or mean != 1
                    else p.lengths,
                )
                for p in self.phases
            )

        drafts = replace(self, speculation=1.0)
        return [
            (replace(self, slower=self.slower / 1.4), replace(self, slower=self.slower * 1.6)),
            (
                replace(self, mfu=self.mfu * LEARNER_MFU[2] / LEARNER_MFU[1]),
                replace(self, mfu=self.mfu * LEARNER_MFU[0] / LEARNER_MFU[1]),
            ),
            (replace(self, phases=phases(0.65, 0)), replace(self, phases=phases(1.5, 0))),
            (replace(self, phases=phases(1, -0.2)), replace(self, phases=phases(1, 0.2))),
            (drafts, drafts),
        ]


@dataclass(frozen=True)
class RLCost:
    """Seconds within their interval, their parts over the whole run, tokens sampled, and what binds."""

    seconds: float
    low: float
    high: float
    parts: dict[str, float] = field(default_factory=dict)
    tokens: float = 0.0
    chips: int = 1
    binds: str = ""

    @property
    def chip_hours(self) -> tuple[float, float, float]:
        return tuple(x * self.chips / 3600 for x in (self.seconds, self.low, self.high))


def r1_zero(config: ModelConfig, cluster: Cluster) -> RL:
    """R1-Zero's run (2501.12948v2, section 2.1 and B.1): 10,400 updates, 16 for each rollout of 512 questions x 16; the cap doubles
    at update 8,200. Mean lengths were read off its Figure 1 (b); MTP drafts one token, of which 85 % are accepted (V3, 5.4.3),
    and a step with a draft takes about a fifth longer. 64 chips serve one copy: assumed."""
    phases = ((125, 1500, 32768), (187, 5000, 32768), (200, 8500, 32768), (138, 13000, 65536))
    replica = min(64, cluster.count)
    return RL(
        config,
        cluster,
        tuple(Phase(n, Lengths(mean, cap, 0.8)) for n, mean, cap in phases),
        samples=8192,
        replica=replica,
        precision="fp8" if "fp8" in cluster.chip.figures else "bf16",
        speculation=1.85 / 1.2,
    )
