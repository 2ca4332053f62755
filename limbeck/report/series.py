"""Long histories as curves that an eye can follow: means of neighbours, and running means."""

from __future__ import annotations

import numpy as np


def cuts(length: int, points: int) -> np.ndarray:
    """Where to cut `length` rows into at most `points` pieces of nearly equal size; the first is 0, the last `length`."""
    return np.linspace(0, length, min(length, points) + 1).astype(int)


def means(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The mean of each piece between two cuts, over what is finite; NaN where nothing is."""
    if len(at) == len(values) + 1:
        return values
    finite = np.isfinite(values)
    count = np.add.reduceat(finite, at[:-1], dtype=float)
    total = np.add.reduceat(np.where(finite, values, 0.0), at[:-1])
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of a thirtieth of all neighbours on each side, fewer at the ends; what is not finite is passed over."""
    reach = max(1, len(values) // 30)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return np.array(
        [np.mean(near[np.isfinite(near)]) if np.isfinite(near).any() else np.nan for near in windows]
    )
