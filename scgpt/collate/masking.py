"""What the model sees and what it must predict: masked expression (upstream's task "pcpt"), or a cell in two parts.

In generative training a cell is [perception | generation]: the model sees the values of the first part and predicts
those of the second.
"""
import numpy as np
from numba import njit
from numpy.typing import NDArray

from scgpt.collate.sampling import sample
from scgpt.rng import PURPOSE_MASK_RATIO, Word, below, stream


@njit(cache=True, nogil=True)
def draw_ratio(seed: Word, epoch: Word, cell_id: Word, ratios: NDArray[np.float64]) -> float:
    """The mask ratio of a cell: one of `ratios`, evenly. (Upstream draws once a batch; packing needs no common one.)"""
    if len(ratios) == 1:
        return float(ratios[0])
    return float(ratios[below(stream(seed, epoch, cell_id, PURPOSE_MASK_RATIO), 0, len(ratios))])


@njit(cache=True, nogil=True)
def hide(words: NDArray[np.uint64], ratio: float, mask_value: float, targets: NDArray[np.float32],
         values: NDArray[np.float32], target_mask: NDArray[np.bool_]) -> None:
    """Show one cell's `targets` as `values`, both (genes,), each hidden independently with probability `ratio`.

    `<cls>` is not passed. Position t is hidden where words[t], 64 uniform bits, is below `ratio` x 2**64.
    """
    limit = np.uint64(ratio * 2.0 ** 64)
    for t in range(len(values)):
        hidden = words[t] < limit
        target_mask[t] = hidden
        values[t] = mask_value if hidden else targets[t]


@njit(cache=True, nogil=True)
def split(key: np.uint64, ratio: float, chosen: NDArray[np.int32], n_chosen: int, scratch: NDArray[np.int32],
          limits: NDArray[np.uint64]) -> int:
    """Put int(n_chosen x ratio) genes of a cell, a uniform sample without replacement, behind the others.

    Both parts keep their order. (Upstream permutes the genes and takes the first ones; order has no meaning.)

    Args:
        key: stream of the cell for PURPOSE_SPLIT.
        ratio: share of the generation part, rounded down.
        chosen: (>= n_chosen,) what is put in order.
        n_chosen: genes of the cell.
        scratch: (>= n_chosen + 1,), overwritten.
        limits: (BLOCK,), overwritten.

    Returns the genes of the perception part.
    """
    n_generated = sample(key, scratch, n_chosen, int(n_chosen * ratio), limits)
    n_seen = found = 0
    for t in range(n_chosen):
        value = chosen[t]
        if found < n_generated and scratch[found] == t:
            scratch[found] = value   # its place is not asked for again
            found += 1
        else:
            chosen[n_seen] = value
            n_seen += 1
    for g in range(n_generated):
        chosen[n_seen + g] = scratch[g]
    return n_seen
