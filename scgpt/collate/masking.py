"""What the model sees and what it must predict: masked expression (upstream's task "pcpt")."""
import numpy as np
from numba import njit
from numpy.typing import NDArray

from scgpt.rng import PURPOSE_MASK_RATIO, Word, below, stream, uniform


@njit(cache=True, nogil=True)
def draw_ratio(seed: Word, epoch: Word, cell_id: Word, ratios: NDArray[np.float64]) -> float:
    """The mask ratio of a cell: one of `ratios`, evenly. (Upstream draws once a batch; packing needs no common one.)"""
    if len(ratios) == 1:
        return float(ratios[0])
    return float(ratios[below(stream(seed, epoch, cell_id, PURPOSE_MASK_RATIO), 0, len(ratios))])


@njit(cache=True, nogil=True)
def hide(key: np.uint64, ratio: float, mask_value: float, values: NDArray[np.float32],
         target_mask: NDArray[np.bool_]) -> None:
    """Hide each position of one cell's genes, (genes,), independently with probability `ratio`; `<cls>` is not passed.

    Draw t of stream `key` decides about position t: hidden where it is below `ratio`.
    """
    for t in range(len(values)):
        hidden = uniform(key, t) < ratio
        target_mask[t] = hidden
        values[t] = mask_value if hidden else values[t]
