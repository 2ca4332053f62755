"""Goodput, the useful share of time: failures, checkpoints (Young 1974, Daly 2006), restarts.

A run of T useful seconds saves a checkpoint, which takes d seconds, after every t seconds of work. Failures
are random, one every M seconds on average, and noticing one and restarting takes r seconds. The run then
takes, in expectation (Daly 2006, eq. 20),

    M exp(r/M) (exp((t + d)/M) - 1) T/t

seconds, which is least at about t = sqrt(2 d M) - d (Young's formula, with Daly's correction).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt

DAY = 86400.0  # seconds
HOUR = 3600.0  # seconds

# Unexpected interruptions of Llama 3.1's run: 419 in 54 days on 16,384 H100 (2407.21783, section 3.3.4).
CHIP_HOURS_BETWEEN_FAILURES = 16384 * 54 * 24 / 419


@dataclass(frozen=True)
class Reliability:
    """How often chips fail and how long recovery takes.

    `chip_hours` is the mean chip-hours between failures of one chip, `save_seconds` the time that saving a
    checkpoint stalls the run, and `restart_seconds` the time to notice a failure and restart. Saving stalls
    only for seconds if the copy is written while the computation goes on (MegaScale 2402.15627, section 4.4;
    Fire-Flyer does so every five minutes). MegaScale noticed a failure within 10 minutes and caught up within
    15.
    """

    chip_hours: float = CHIP_HOURS_BETWEEN_FAILURES
    save_seconds: float = 5.0
    restart_seconds: float = 600.0

    def mean_seconds(self, chips: int) -> float:
        """Return the mean seconds between failures of any of `chips` chips."""
        return self.chip_hours * HOUR / chips


_PUBLISHED = Reliability()


@dataclass(frozen=True)
class Goodput:
    """The useful share of time, between `low` and `high`: `Goodput(0.92, 0.85, 0.97, 350.0, 7.8)`.

    `interval_seconds` is the seconds of work between two checkpoints, and `failures_per_day` the expected
    number of failures.
    """

    share: float
    low: float
    high: float
    interval_seconds: float
    failures_per_day: float


def checkpoint_interval(save_seconds: float, mean_seconds: float) -> float:
    """Return the best seconds of work between two checkpoints (Daly 2006, eq. 37).

    `mean_seconds` is the mean time between failures. If saving takes at least twice as long as that, the
    result is `mean_seconds`.
    """
    ratio = save_seconds / (2 * mean_seconds)
    if ratio >= 1:
        return mean_seconds
    young = sqrt(2 * save_seconds * mean_seconds)
    return young * (1 + sqrt(ratio) / 3 + ratio / 9) - save_seconds


def useful_share(chips: int, reliability: Reliability = _PUBLISHED, interval: float | None = None) -> float:
    """Return the useful share of time on `chips` chips, between 0 and 1.

    A checkpoint is saved after every `interval` seconds of work; without `interval`, after the best interval.
    """
    mean = reliability.mean_seconds(chips)
    save = reliability.save_seconds
    work = interval or checkpoint_interval(save, mean)
    taken = mean * exp(reliability.restart_seconds / mean) * (exp((work + save) / mean) - 1) / work
    return 1 / taken


def goodput(chips: int, reliability: Reliability = _PUBLISHED) -> Goodput:
    """Return the goodput of a run on `chips` chips, with its interval.

    The upper end takes half of the failures, half of the saving time and a third of the restart time; the
    lower end takes twice the failures, three times the saving time and 2.5 times the restart time.
    """
    hours = reliability.chip_hours
    save = reliability.save_seconds
    restart = reliability.restart_seconds
    worse = Reliability(hours / 2, save * 3, restart * 2.5)
    better = Reliability(hours * 2, save / 2, restart / 3)
    mean = reliability.mean_seconds(chips)
    return Goodput(
        share=useful_share(chips, reliability),
        low=useful_share(chips, worse),
        high=useful_share(chips, better),
        interval_seconds=checkpoint_interval(save, mean),
        failures_per_day=DAY / mean,
    )
