"""Which genes of a cell stay when it is longer than the context: a uniform sample without replacement.

Upstream shuffles the genes and keeps the first ones. The order of a cell's tokens has no meaning to the model, so ours
keeps it: selection sampling (Knuth, The Art of Computer Programming, volume 2, algorithm 3.4.2 S) walks the genes once,
taking gene i with probability (still wanted) / (still to come). Every subset is equally likely, ids stay ascending, and
nothing is sorted or swapped.
"""
import numpy as np
from numba import njit, uint64
from numpy.typing import NDArray

from scgpt.rng import bits

_S32 = np.uint64(32)


@njit(cache=True, nogil=True)
def sample(key: np.uint64, chosen: NDArray[np.int32], n_values: int, n_wanted: int, drawn: NDArray[np.uint32]) -> int:
    """Write min(n_values, n_wanted) ascending positions in [0, n_values) to `chosen`; returns how many.

    Args:
        key: stream of the cell for PURPOSE_SAMPLE; draw i decides about value i.
        chosen: (>= min(n_values, n_wanted) + 1,), the place after the last is scratch.
        n_values: of the cell.
        n_wanted: at most so many.
        drawn: (>= n_values,) scratch.
    """
    if n_values <= n_wanted:
        for i in range(n_values):
            chosen[i] = i
        return n_values
    for i in range(n_values):   # on their own: compiles to vector operations
        # The upper 32 bits times the values still to come, over 2**32: a whole number below that, biased by < 2**-32.
        drawn[i] = ((bits(key, i) >> _S32) * uint64(n_values - i)) >> _S32
    wanted = uint64(n_wanted)
    left = wanted
    for i in range(n_values):   # unsigned: a comparison and a subtraction with borrow a value
        chosen[wanted - left] = i
        left -= uint64(uint64(drawn[i]) < left)
    return n_wanted


@njit(cache=True, nogil=True)
def take(values: NDArray[np.generic], chosen: NDArray[np.int32], out: NDArray[np.generic]) -> None:
    """out[t] = values[chosen[t]], in the type of `out`."""
    for t in range(len(out)):
        out[t] = values[np.uint64(chosen[t])]   # unsigned: no check for a place counted from the end
