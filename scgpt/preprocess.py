"""Upstream's import path of `binning`: quantile bins of one row, ties spread at random. torch only for torch rows."""
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scgpt.model.row_bins import bin_row
from scgpt.model.row_bins import digitize as _digitize

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["_digitize", "binning"]


def binning(row: "NDArray[Any] | Tensor", n_bins: int, *, tie_rule: str = "spread") -> "NDArray[Any] | Tensor":
    """Bins of a row: 0 for zero, 1 .. n_bins - 1 for the rest by quantiles of the non-zero values.

    Args:
        row: (genes,); zeros may be there, and values below 0 are binned like the rest.
        n_bins: number of bins, that of zero included; at least 2.
        tie_rule: "spread" draws the bin of a value that equals several edges (from NumPy's global generator, which
            `numpy.random.seed` governs, as upstream); "highest" takes the highest, as upstream's pretraining branches.

    Returns an array of the row's dtype for an array, int64 for a tensor; zeros for zeros, nothing for an empty row.
    """
    if isinstance(row, np.ndarray):
        return bin_row(row, n_bins, tie_rule).astype(row.dtype)
    import torch

    return torch.from_numpy(bin_row(row.detach().cpu().numpy(), n_bins, tie_rule))
