"""Quantile bins of one row in NumPy, ties drawn from NumPy's global generator: upstream's `binning`, and its model's.

Training bins in `scgpt.collate.binning`: the same distribution from keyed draws, compiled.
"""
from typing import Any

import numpy as np
from numpy.typing import NDArray


def digitize(x: NDArray[Any], bins: NDArray[Any], side: str = "both") -> NDArray[np.int64]:
    """Number of edges at or below each value: (values,) with sorted edges (edges,) -> (values,) int64.

    A value that equals several edges gets any of their numbers, evenly, with `side="both"`; the highest with "one".
    """
    if x.ndim != 1 or bins.ndim != 1:
        raise ValueError(f"x and bins must have one dimension each, not {x.ndim} and {bins.ndim}")
    upto: NDArray[np.int64] = np.digitize(x, bins).astype(np.int64)
    if side == "one":
        return upto
    below = np.digitize(x, bins, right=True)
    drawn: NDArray[np.int64] = np.ceil(np.random.rand(len(x)) * (below - upto) + upto).astype(np.int64)  # noqa: NPY002
    return drawn


def bin_row(values: NDArray[Any], n_bins: int, tie_rule: str = "spread") -> NDArray[np.int64]:
    """(genes,) -> (genes,): 0 for zero, 1 .. n_bins - 1 for the rest by float64 quantiles of the non-zero values.

    Values below 0 are binned like the rest; a row whose maximum is 0 gives zeros. `tie_rule`: "spread" or "highest".
    """
    bins = np.zeros(values.shape, np.int64)
    nonzero = values != 0
    if nonzero.any() and values.max() != 0:
        binned = values[nonzero].astype(np.float64)
        edges = np.quantile(binned, np.linspace(0, 1, n_bins - 1))
        bins[nonzero] = digitize(binned, edges, side="both" if tie_rule == "spread" else "one")
    return bins
