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

BLOCK = 32   # values that are drawn for at once
_S32 = np.uint64(32)


@njit(cache=True, nogil=True)
def sample(key: np.uint64, chosen: NDArray[np.int32], n_values: int, n_wanted: int, limits: NDArray[np.uint64]) -> int:
    """Write min(n_values, n_wanted) ascending positions in [0, n_values) to `chosen`; returns how many.

    Args:
        key: stream of the cell for PURPOSE_SAMPLE; draw i decides about value i.
        chosen: (>= min(n_values, n_wanted) + 1,), the place after the last is scratch.
        n_values: of the cell.
        n_wanted: at most so many.
        limits: (BLOCK,) scratch.
    """
    if n_values <= n_wanted:
        for i in range(n_values):
            chosen[i] = i
        return n_values
    wanted, found = uint64(n_wanted), uint64(0)
    for first in range(0, n_values, BLOCK):
        for place in range(BLOCK):   # compiles to vector operations, which run beside the other loop; the last in vain
            # The upper 32 bits times the values still to come, over 2**32: a whole number below, biased by < 2**-32.
            i = first + place
            drawn = ((bits(key, i) >> _S32) * uint64(n_values - i)) >> _S32
            limits[place] = wanted - min(drawn, wanted)   # value i stays if fewer than so many were found before it
        for place in range(min(BLOCK, n_values - first)):   # unsigned: a comparison and an addition with carry a value
            chosen[found] = first + place
            found += uint64(found < limits[place])
    return n_wanted


@njit(cache=True, nogil=True)
def any_above(ids: NDArray[np.int32], last: np.uint32) -> bool:
    """Whether an id, read as unsigned, is above `last`; a loop of its own compiles to vector operations."""
    found = np.uint32(0)
    for t in range(len(ids)):
        found |= np.uint32(np.uint32(ids[t]) > last)
    return bool(found > 0)


@njit(cache=True, nogil=True)
def copy(values: NDArray[np.generic], out: NDArray[np.generic]) -> None:
    """out[t] = values[t], in the type of `out`; a loop of its own compiles to vector operations."""
    for t in range(len(out)):
        out[t] = values[t]


@njit(cache=True, nogil=True)
def take(values: NDArray[np.generic], chosen: NDArray[np.int32], out: NDArray[np.generic]) -> None:
    """out[t] = values[chosen[t]], in the type of `out`."""
    for t in range(len(out)):
        out[t] = values[np.uint64(chosen[t])]   # unsigned: no check for a place counted from the end
