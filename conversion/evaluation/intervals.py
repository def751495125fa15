"""What is known of a mean after so many samples: 95% intervals."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


Z = 1.959964  # standard deviations on each side
RESAMPLES = 10_000
AT_A_TIME = 2**24  # numbers

Score = dict[str, Any]
"""`{"mean", "low", "high", "samples"}`, as it stands in results.json."""


def interval(values: Sequence[float], groups: Sequence[Any], seed: int = 0) -> Score:
    """
    The mean with its interval.

    Where all values are 0 or 1 and each sample is a group of its own, the interval is Wilson's (Journal of the
    American Statistical Association 22, 1927). Otherwise groups are resampled (percentile bootstrap), as questions
    about one story, or stretches of one book, are not independent. If all groups agree, there is nothing to resample:
    then it is Wilson's for as many samples as there are groups.

    Args:
        values: of the samples.
        groups: to which group each belongs.
        seed: of the resampling.

    Returns:
        `mean`, `low`, `high` and the number of `samples`; all but the last None if there are none, and the bounds None
        if one group cannot tell.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        return {"mean": None, "low": None, "high": None, "samples": 0}
    numbers: dict[Any, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    mean = float(values.mean())
    right_or_wrong = bool(np.isin(values, (0.0, 1.0)).all())
    if right_or_wrong and (len(numbers) == len(values) or mean in (0.0, 1.0)):
        low, high = wilson(mean, len(numbers))
    elif len(numbers) == 1:
        low = high = None
    else:
        low, high = bootstrap(values, index, seed)
    return {"mean": mean, "low": low, "high": high, "samples": len(values)}


def wilson(share: float, count: int) -> tuple[float, float]:
    """The interval of a share among so many independent samples; 100 of 100 give (.963, 1)."""
    spread = Z**2 / count
    center = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return (0.0 if share == 0 else max(0.0, center - half)), (1.0 if share == 1 else min(1.0, center + half))


def bootstrap(values: np.ndarray, index: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The interval of the mean of `(n,)` values when groups, of which `index` has the numbers, are drawn anew."""
    sums, sizes = np.bincount(index, values), np.bincount(index)
    rng, count, means = np.random.default_rng(seed), len(sums), []
    size = max(1, AT_A_TIME // count)
    for start in range(0, RESAMPLES, size):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=min(RESAMPLES - start, size))
        means.append(drawn @ sums / (drawn @ sizes))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)
