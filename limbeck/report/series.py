"""Long series shortened to curves of a few points: means of neighbouring values, and running means.

Shapes: N values of a series, P pieces that it is cut into.
"""

from __future__ import annotations

import numpy as np


def cuts(length: int, points: int) -> np.ndarray:
    """Return the [P + 1] positions that cut `length` values into P pieces of nearly equal size, where P is
    at most `points`.

    The first position is 0, the last is `length`.
    """
    pieces = min(length, points)
    return np.linspace(0, length, pieces + 1).astype(int)


def means(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the means [P] of the pieces of `values` [N] between neighbouring cuts `at` [P + 1]. Values
    that are not finite are left out.

    A piece without a finite value gives NaN.
    """
    if len(at) == len(values) + 1:
        return values
    starts_P = at[:-1]
    finite_N = np.isfinite(values)
    count_P = np.add.reduceat(finite_N, starts_P, dtype=float)
    total_P = np.add.reduceat(np.where(finite_N, values, 0.0), starts_P)
    means_P = np.full(len(count_P), np.nan)
    return np.divide(total_P, count_P, out=means_P, where=count_P > 0)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the running mean [N] of `values` [N]. The window reaches a thirtieth of all values to each
    side, less at the ends.

    Values that are not finite are left out; a window without a finite value gives NaN.
    """
    reach = max(1, len(values) // 30)
    smooth = []
    for i in range(len(values)):
        window = values[max(0, i - reach) : i + reach + 1]
        finite = window[np.isfinite(window)]
        smooth.append(np.mean(finite) if len(finite) else np.nan)
    return np.array(smooth)
