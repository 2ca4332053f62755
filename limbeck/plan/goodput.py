"""How much of the time a cluster computes: failures, checkpoints (Young 1974, Daly 2006), restarts, slow hosts.

A run of T useful seconds with a checkpoint of d seconds after every t, failures every M seconds at random, and r
seconds to notice and begin again takes, in expectation (Daly 2006, eq. 20)

    M exp(r/M) (exp((t + d)/M) - 1) T/t

which is least at about t = sqrt(2 d M) - d (Young's, with Daly's correction).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt

DAY = 86400.0
HOUR = 3600.0

# Unexpected interruptions of Llama 3.1's run: 419 in 54 days on 16,384 H100 (2407.21783, section 3.3.4).
CHIP_HOURS_BETWEEN_FAILURES = 16384 * 54 * 24 / 419


@dataclass(frozen=True)
class Reliability:
    """How a cluster fails and recovers: hours between failures of one chip, seconds to save, and to be at work again.

    Saving stalls for seconds where the copy goes out beside the computation (MegaScale 2402.15627, section 4.4;
    Fire-Flyer saves every five minutes so). To notice took MegaScale under 10 minutes and to catch up under 15.
    """

    chip_hours: float = CHIP_HOURS_BETWEEN_FAILURES
    save_seconds: float = 5.0
    restart_seconds: float = 600.0

    def mean_seconds(self, chips: int) -> float:
        """Between failures of `chips` together."""
        return self.chip_hours * HOUR / chips


@dataclass(frozen=True)
class Goodput:
    """The share of the time that is useful: `Goodput(0.92, 0.85, 0.97, 350.0, 7.8)`."""

    share: float
    low: float
    high: float
    interval_seconds: float
    failures_per_day: float


def checkpoint_interval(save_seconds: float, mean_seconds: float) -> float:
    """Daly's best time between two checkpoints, in seconds of work (2006, eq. 37); all of M where failures outrun it."""
    ratio = save_seconds / (2 * mean_seconds)
    if ratio >= 1:
        return mean_seconds
    return sqrt(2 * save_seconds * mean_seconds) * (1 + sqrt(ratio) / 3 + ratio / 9) - save_seconds


def useful_share(
    chips: int, reliability: Reliability = Reliability(), interval: float | None = None
) -> float:
    """Useful seconds in a second, with a checkpoint every `interval` seconds of work (else the best)."""
    mean = reliability.mean_seconds(chips)
    t = interval or checkpoint_interval(reliability.save_seconds, mean)
    taken = (
        mean * exp(reliability.restart_seconds / mean) * (exp((t + reliability.save_seconds) / mean) - 1) / t
    )
    return 1 / taken


def goodput(chips: int, reliability: Reliability = Reliability()) -> Goodput:
    """With its interval: half and twice the failures, restarts of a third and of two and a half times as long."""
    mean = reliability.mean_seconds(chips)
    r = reliability
    worse = Reliability(r.chip_hours / 2, r.save_seconds * 3, r.restart_seconds * 2.5)
    better = Reliability(r.chip_hours * 2, r.save_seconds / 2, r.restart_seconds / 3)
    shares = [useful_share(chips, each) for each in (r, worse, better)]
    return Goodput(*shares, checkpoint_interval(r.save_seconds, mean), DAY / mean)
