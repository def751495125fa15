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
    index = number_groups(groups)
    count, mean = int(index.max()) + 1, float(values.mean())
    right_or_wrong = bool(np.isin(values, (0.0, 1.0)).all())
    if right_or_wrong and (count == len(values) or mean in (0.0, 1.0)):
        low, high = wilson(mean, count)
    elif count == 1:
        low = high = None
    else:
        low, high = (float(bound[0]) for bound in bootstrap(values[:, None], index, seed))
    return {"mean": mean, "low": low, "high": high, "samples": len(values)}


def intervals(values: np.ndarray, groups: Sequence[Any], seed: int = 0) -> list[Score]:
    """
    The means of the columns of `(n, columns)` values, NaN where there is none, with bootstrap intervals by group.
    """
    index, there = number_groups(groups), ~np.isnan(values)
    low, high = bootstrap(values, index, seed)
    result = []
    for column in range(values.shape[1]):
        some = there[:, column]
        known = len(set(index[some])) > 1
        result.append(
            {
                "mean": float(values[some, column].mean()) if some.any() else None,
                "low": float(low[column]) if known else None,
                "high": float(high[column]) if known else None,
                "samples": int(some.sum()),
            }
        )
    return result


def number_groups(groups: Sequence[Any]) -> np.ndarray:
    """`(n,)` numbers, the same for the same group, from 0 on."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups])


def wilson(share: float, count: int) -> tuple[float, float]:
    """The interval of a share among so many independent samples; 100 of 100 give (.963, 1)."""
    spread = Z**2 / count
    center = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return (0.0 if share == 0 else max(0.0, center - half)), (1.0 if share == 1 else min(1.0, center + half))


def bootstrap(values: np.ndarray, index: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """
    Intervals of means when groups of rows are drawn anew.

    Args:
        values: `(n, columns)`, NaN where there is none.
        index: `(n,)` numbers of the groups.
        seed: of the draws, which are the same for all columns.

    Returns:
        `(columns,)` lower and upper bounds.
    """
    there = ~np.isnan(values)
    count = int(index.max()) + 1
    sums, sizes = np.zeros((count, values.shape[1])), np.zeros((count, values.shape[1]))
    np.add.at(sums, index, np.where(there, values, 0.0))
    np.add.at(sizes, index, there)
    rng, means = np.random.default_rng(seed), []
    step = max(1, AT_A_TIME // max(count, values.shape[1]))
    for start in range(0, RESAMPLES, step):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=min(RESAMPLES - start, step)).astype(float)
        with np.errstate(invalid="ignore"):  # a column whose few groups were not drawn
            means.append(drawn @ sums / (drawn @ sizes))
    low, high = np.full((2, values.shape[1]), np.nan)
    some = there.any(0)
    low[some], high[some] = np.nanquantile(np.concatenate(means)[:, some], [0.025, 0.975], axis=0)
    return low, high
