"""The cost of reinforcement learning: rollouts with their longest sample, learning, and switching over.

    rollout    samples (completions) are decoded side by side until each has reached its length; the last one
               decodes alone: the sum over tokens t of step(samples alive at t, context at t)
    learning   FLOPs of every sampled token, forward and backward, and forward for each set of log-probs
    changing   weights and optimizer state go to the host's memory and come back, engines are woken up
    overlap    asynchronous systems sample the next batch while they learn: the longer of the two counts

Ideal decoding and ideal learning are several times too cheap, because small batches at the end of a rollout,
not arithmetic, take most of the time. The tail of a rollout is the time in which less than half of the
engine's slots are in use. A slot holds one sample that is being decoded.

N samples · P points in time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import exp, gcd, log, sqrt
from statistics import NormalDist

import numpy as np

from ..model.config import ModelConfig
from ..types import LimbeckError
from . import cost
from .cluster import Cluster
from .inference import Replica

# low, middle, high share of the 16-bit peak, causal; 0.19 is Delethink's backward (2510.06557)
LEARNER_MFU = (0.12, 0.20, 0.35)
WAKE = 20.0  # seconds to wake engines and learners up, a rollout: guessed
HOST_LINK = 20e9  # bytes a second of one chip to its host's memory and back: PCIe 4.0 as it is reached
STATE = 16  # bytes of learning for a weight (weights, gradients, AdamW in mixed precision)
POINTS = 96  # points in time at which the samples alive are counted
SPREAD = 0.7  # standard deviation of the logarithm of a length, where nobody has measured it
BISECTIONS = 60  # halvings of the median's interval
SQUARE_SAMPLES = 256  # lengths from which the mean square is taken
GOLDEN = 0.618  # share of the count that the stride of a shuffle is near


@dataclass(frozen=True)
class Lengths:
    """The distribution of completion lengths in tokens.

    `Lengths(8000, cap=32768)` is a lognormal distribution whose values are cut at the cap; `mean` is the mean
    after the cut, and `spread` the standard deviation of the logarithm. `Lengths.of(samples, cap)` is the
    empirical distribution of `samples`, which are kept in `seen`.
    """

    mean: float
    cap: float
    spread: float = SPREAD
    seen: tuple[float, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[float], cap: float) -> Lengths:
        """Return the empirical distribution of the lengths `samples`, each cut at `cap`.

        Raises LimbeckError if there are no samples.
        """
        cut = tuple(sorted(min(float(sample), cap) for sample in samples))
        if not cut:
            raise LimbeckError("no lengths were given")
        return cls(sum(cut) / len(cut), cap, seen=cut)

    @cached_property
    def _median(self) -> float:
        """The median of the lognormal distribution before the cut, for which the mean after it is `mean`.

        Raises LimbeckError if the mean is above the cap.
        """
        if self.mean > self.cap:
            raise LimbeckError(
                f"completions of {self.mean:,.0f} tokens on average do not fit under a cap of {self.cap:,.0f}"
            )
        low = 1e-3
        high = 1e3 * self.cap
        for _ in range(BISECTIONS):
            middle = sqrt(low * high)
            if self._cut_mean(middle) < self.mean:
                low = middle
            else:
                high = middle
        return low

    def _cut_mean(self, median: float) -> float:
        """Return the mean of min(x, cap) for a lognormal x with this median."""
        normal = NormalDist()
        s = self.spread
        z = (log(self.cap) - log(median)) / s
        below = median * exp(s * s / 2) * normal.cdf(z - s)
        return below + self.cap * (1 - normal.cdf(z))

    def quantile(self, share: float) -> float:
        """Return the length that the share `share` of the completions does not exceed."""
        if self.seen:
            index = int(share * len(self.seen))
            return self.seen[min(len(self.seen) - 1, index)]
        return min(self.cap, self._median * exp(self.spread * NormalDist().inv_cdf(share)))

    def draw(self, count: int, of: int | None = None) -> list[float]:
        """Return `count` evenly spaced quantiles as a sample of lengths.

        If `of` is larger than `count`, the last one is the longest expected among `of` samples.
        """
        lengths = [self.quantile((i + 0.5) / count) for i in range(count)]
        if of and of > count:
            lengths[-1] = self.quantile(1 - 0.5 / of)
        return lengths

    @property
    def truncated(self) -> float:
        """The share of completions that reach the cap."""
        if self.seen:
            return sum(length >= self.cap for length in self.seen) / len(self.seen)
        return 1 - NormalDist().cdf((log(self.cap) - log(self._median)) / self.spread)

    @property
    def square(self) -> float:
        """The mean square of the lengths over their mean, in tokens.

        It is the mean length of the completion that a randomly chosen token belongs to.
        """
        sample = self.draw(SQUARE_SAMPLES)
        return sum(length * length for length in sample) / sum(sample)

    def times(self, factor: float) -> Lengths:
        """Return a lognormal distribution with the mean times `factor`, under the same cap."""
        return replace(self, mean=min(self.mean * factor, 0.95 * self.cap), seen=())


StepTime = Callable[[float, float], float]  # samples alive, tokens of context -> seconds


def decode_seconds(
    lengths: Sequence[float], slots: int, step: StepTime, prompt: float
) -> tuple[float, float]:
    """Return the seconds until all samples are decoded on one replica, and those of the tail.

    `lengths` are the samples' lengths in tokens; at most `slots` samples are decoded at once. `step(samples,
    context)` is the seconds of one decode step, and `prompt` the tokens of a prompt. The tail is the time in
    which less than half of the slots are in use.
    """
    slots = min(slots, len(lengths))
    begin_N, end_N = _occupy(lengths, slots)
    last = end_N.max()
    at_P1 = (last * (np.arange(POINTS) + 0.5) / POINTS)[:, None]
    alive_PN = (begin_N <= at_P1) & (at_P1 < end_N)
    alive_P = np.maximum(1, alive_PN.sum(1))
    age_P = ((at_P1 - begin_N) * alive_PN).sum(1) / alive_P
    step_P = np.array([step(float(n), prompt + float(age)) for n, age in zip(alive_P, age_P, strict=True)])
    took_P = step_P * last / POINTS
    tail_P = alive_P < 0.5 * slots
    return float(took_P.sum()), float(took_P[tail_P].sum())


def _occupy(lengths: Sequence[float], slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the decode steps at which each sample begins and ends, two arrays [N].

    A new sample takes the slot that becomes free first.
    """
    order = lengths if len(lengths) == slots else _shuffle(lengths)
    free = [0.0] * slots
    ends: list[float] = []
    for length in order:
        end = heapq.heappop(free) + length
        heapq.heappush(free, end)
        ends.append(end)
    end_N = np.array(ends, dtype=float)
    return end_N - np.array(order, dtype=float), end_N


def _shuffle(lengths: Sequence[float]) -> list[float]:
    """Return the lengths in a fixed shuffled order: every k-th in turn, k coprime to their number."""
    count = len(lengths)
    stride = int(count * GOLDEN) | 1
    while gcd(stride, count) != 1:
        stride += 2
    return [lengths[i * stride % count] for i in range(count)]


@dataclass(frozen=True)
class Phase:
    """A part of a run: rollouts with one distribution of lengths, `Phase(512, Lengths(6000, 32768))`."""

    rollouts: int
    lengths: Lengths


@dataclass(frozen=True)
class RL:
    """A run of reinforcement learning on a cluster; each rollout samples `samples` completions.

    `replica` is the number of chips that serve one copy of the model. Each token is scored by `extra`
    additional forward passes (old policy, reference). `speculation` is the mean tokens a decode step with
    self-speculation. `overlap` samples the next rollout while the model learns. `window` limits the context
    of decoding in tokens, for methods that think in chunks (0: no limit). `slower` is the engine's step time
    over the ideal one. `grading` and `wake` are seconds for each rollout; `offload` moves weights and
    optimizer state to the host between sampling and learning.

    Raises LimbeckError if the cluster's chips do not divide evenly into replicas.
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
        """The chips that serve one copy of the model."""
        return Replica(self.config, self.cluster, self.replica, self.precision)

    def parts(self, lengths: Lengths) -> dict[str, float]:
        """Return the seconds of each part of one rollout and its learning.

        The part "tail" is contained in the part "rollout".
        """
        rollout, tail = self._decoding(lengths)
        return {
            "rollout": rollout,
            "tail": tail,
            "learning": self._learning(lengths),
            "changing over": self._changing(),
            # rewards are computed while the last samples decode
            "grading": max(0.0, self.grading - tail),
        }

    def _decoding(self, lengths: Lengths) -> tuple[float, float]:
        """Return the seconds of one rollout, and of its tail."""
        samples = max(1, self.samples // (self.cluster.count // self.replica))
        context = min(self.prompt + lengths.square / 2, self.window or 1e9)
        slots = min(samples, self.replica * max(1, self.unit.most_rows(context)))

        def step(rows: float, context: float) -> float:
            if self.window:
                context = min(context, 0.75 * self.window)
            chip_rows = max(1.0, rows) / self.replica
            return self.unit.decode(chip_rows, context).seconds * self.slower / self.speculation

        return decode_seconds(lengths.draw(samples, self.samples), slots, step, self.prompt)

    def _learning(self, lengths: Lengths) -> float:
        """Return the seconds of learning from one rollout."""
        tokens = self.samples * (lengths.mean + self.prompt)
        attended = min(lengths.square, self.window or 1e9)
        flops = cost.flops_per_token(self.config, attended) * (1 + self.extra / 3)
        chip = self.cluster.chip
        peak = chip.rate("bf16" if "bf16" in chip.figures else "fp16")
        return tokens * flops / (self.cluster.count * peak * self.mfu)

    def _changing(self) -> float:
        """Return the seconds of changing from sampling to learning and back, once for each rollout."""
        if not self.offload:
            return 0.0
        moved = 2 * STATE * cost.weights(self.config)
        return self.wake + moved / self.cluster.count / HOST_LINK

    def seconds(self) -> float:
        """Return the seconds of the whole run, all phases together."""
        return sum(phase.rollouts * self._wall(self.parts(phase.lengths)) for phase in self.phases)

    def _wall(self, parts: dict[str, float]) -> float:
        """Return the wall-clock seconds of one rollout and its learning, from the seconds of their parts."""
        if self.overlap:
            return max(parts["rollout"] + parts["grading"], parts["learning"])
        return sum(parts.values()) - parts["tail"]

    def plan(self) -> RLCost:
        """Return the run's cost with its interval.

        Each unknown is varied by itself; the logarithms of the effects are added like independent errors, as
        the root of the sum of squares.
        """
        middle = self.seconds()
        up = down = 0.0
        for low, high in self._unknowns():
            effects = [log(run.seconds() / middle) for run in (low, high)]
            up += max(0.0, *effects) ** 2
            down += min(0.0, *effects) ** 2
        low = middle * exp(-sqrt(down))
        high = middle * exp(sqrt(up))
        total = self._total_parts()
        tokens = sum(phase.rollouts * self.samples * phase.lengths.mean for phase in self.phases)
        return RLCost(middle, low, high, total, tokens, self.cluster.count, _binds(total))

    def _total_parts(self) -> dict[str, float]:
        """Return the seconds of each part over the whole run."""
        total: dict[str, float] = {}
        for phase in self.phases:
            for name, seconds in self.parts(phase.lengths).items():
                total[name] = total.get(name, 0.0) + phase.rollouts * seconds
        return total

    def _unknowns(self) -> list[tuple[RL, RL]]:
        """Return, for each unknown, the run with its most favourable and its least favourable value.

        The unknowns are the engine's speed, the learner's speed, the mean length, the spread of lengths, and
        the gain by speculation.
        """
        low_mfu, middle_mfu, high_mfu = LEARNER_MFU
        undrafted = replace(self, speculation=1.0)
        fast_engine = replace(self, slower=self.slower / 1.4)
        slow_engine = replace(self, slower=self.slower * 1.6)
        fast_learner = replace(self, mfu=self.mfu * high_mfu / middle_mfu)
        slow_learner = replace(self, mfu=self.mfu * low_mfu / middle_mfu)
        return [
            (fast_engine, slow_engine),
            (fast_learner, slow_learner),
            (self._with_lengths(0.65, 0), self._with_lengths(1.5, 0)),
            (self._with_lengths(1, -0.2), self._with_lengths(1, 0.2)),
            (undrafted, undrafted),
        ]

    def _with_lengths(self, factor: float, spread: float) -> RL:
        """Return the run with all mean lengths times `factor` and `spread` added to all spreads.

        Empirical lengths have no spread and are kept if `factor` is 1.
        """
        phases: list[Phase] = []
        for phase in self.phases:
            lengths = phase.lengths
            if not lengths.seen or factor != 1:
                lengths = replace(lengths.times(factor), spread=lengths.spread + spread)
            phases.append(replace(phase, lengths=lengths))
        return replace(self, phases=tuple(phases))


def _binds(total: dict[str, float]) -> str:
    """Return the name in words of the longest part of a run, with its share of the time."""
    parts = {
        "decoding the longest samples": total["tail"],
        "decoding": total["rollout"] - total["tail"],
        "learning": total["learning"],
        "changing over": total["changing over"],
    }
    longest = max(parts, key=parts.get)
    share = parts[longest] / sum(parts.values())
    return f"{longest}: {share:.0%} of the time"


@dataclass(frozen=True)
class RLCost:
    """The cost of a run: `seconds` between `low` and `high`, and its longest part (`binds`).

    `parts` has the seconds of each part over the whole run, and `tokens` is the number of sampled tokens.
    """

    seconds: float
    low: float
    high: float
    parts: dict[str, float] = field(default_factory=dict)
    tokens: float = 0.0
    chips: int = 1
    binds: str = ""

    @property
    def chip_hours(self) -> tuple[float, float, float]:
        """Chip-hours: the estimate, and the low and the high end of its interval."""
        return tuple(seconds * self.chips / 3600 for seconds in (self.seconds, self.low, self.high))


def r1_zero(config: ModelConfig, cluster: Cluster) -> RL:
    """Return R1-Zero's run of reinforcement learning (2501.12948v2, sections 2.1 and B.1).

    It has 10,400 updates, 16 for each rollout of 512 x 16 completions. The cap on lengths doubles at update
    8,200. Mean lengths are read off its Figure 1 (b). MTP drafts one token, of which 85 % are accepted (V3,
    5.4.3), and a step with a draft takes about a fifth longer. That 64 chips serve one copy is assumed.
    """
    phases = (
        Phase(125, Lengths(1500, 32768, 0.8)),
        Phase(187, Lengths(5000, 32768, 0.8)),
        Phase(200, Lengths(8500, 32768, 0.8)),
        Phase(138, Lengths(13000, 65536, 0.8)),
    )
    precision = "fp8" if "fp8" in cluster.chip.figures else "bf16"
    return RL(
        config,
        cluster,
        phases,
        samples=8192,
        replica=min(64, cluster.count),
        precision=precision,
        speculation=1.85 / 1.2,
    )
