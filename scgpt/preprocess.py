"""Upstream's `scgpt.preprocess.binning`: quantile bins of one row, ties spread at random. torch only for torch rows.

Draws come from NumPy's global generator, as upstream's, so that `numpy.random.seed` still governs them. Training uses
`scgpt.collate.binning`: the same distribution from keyed draws, compiled.
"""
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]


def _digitize(x: Array, bins: Array, side: str = "both") -> NDArray[np.int64]:
    """Number of edges at or below each value: (values,) with sorted edges (edges,) -> (values,) int64.

    A value that equals several edges gets any of their numbers, evenly, with `side="both"`; the highest with "one".
    """
    if x.ndim != 1 or bins.ndim != 1:
        raise ValueError(f"x and bins must have one dimension each, not {x.ndim} and {bins.ndim}")
    upto = np.digitize(x, bins)
    if side == "one":
        return upto.astype(np.int64)
    below = np.digitize(x, bins, right=True)
    return np.ceil(np.random.rand(len(x)) * (below - upto) + upto).astype(np.int64)  # noqa: NPY002 upstream's generator


def binning(row: "Array | Tensor", n_bins: int, *, tie_rule: str = "spread") -> "Array | Tensor":
    """Bins of a row: 0 for zero, 1 .. n_bins - 1 for the rest by quantiles of the non-zero values.

    Args:
        row: (genes,); zeros may be there, and values below 0 are binned like the rest.
        n_bins: number of bins, that of zero included; at least 2.
        tie_rule: "spread" draws the bin of a value that equals several edges; "highest" takes the highest, as
            upstream's pretraining branches.

    Returns an array of the row's dtype for an array, int64 for a tensor; zeros for zeros, nothing for an empty row.
    """
    values: Array = row if isinstance(row, np.ndarray) else row.detach().cpu().numpy()
    bins = np.zeros(values.shape, np.int64)
    nonzero = values != 0
    if nonzero.any() and values.max() != 0:
        binned = values[nonzero].astype(np.float64)
        edges = np.quantile(binned, np.linspace(0, 1, n_bins - 1))
        bins[nonzero] = _digitize(binned, edges, side="both" if tie_rule == "spread" else "one")
    if isinstance(row, np.ndarray):
        return bins.astype(row.dtype)
    import torch

    return torch.from_numpy(bins)
