"""Value binning: the quantile bins of one whole cell, as upstream's `binning` defines them.

Edges e_0 .. e_{B-2} are the quantiles of the cell's values at B - 1 evenly spaced probabilities, linearly interpolated
in float64 (`numpy.quantile`, to the bit). A value x with `below` edges < x and `upto` edges <= x gets a bin drawn
evenly from below + 1 .. upto (tie rule "spread": upstream's main), or `upto` ("highest": upstream's pretraining
branches). A value between two edges has below == upto and gets that number. Bins are 1 .. B - 1; 0 stays that of zero.

Nearly all counts are small integers, so sorting is counting and a bin is a table look-up; the few larger ones of a
cell are sorted and compared with the edges. Values of any type are sorted as 32-bit keys that rise with the value: an
integer itself, or the bits of a positive float32.
"""
import functools
from typing import NamedTuple

import numpy as np
from numba import njit, uint64
from numpy.typing import NDArray

from scgpt.errors import DataError
from scgpt.rng import PURPOSE_VALUE, fill, stream

TABLE = 128   # integers below this, a power of two, are sorted by counting and binned by look-up
COUNTERS = 8  # of each of them
FEW = 32      # keys that are sorted by insertion
DIGIT_BITS = 11
_LAST_DIGIT = (1 << DIGIT_BITS) - 1
_LOWER, _S32 = np.uint64(0xFFFFFFFF), np.uint64(32)


class Scratch(NamedTuple):
    """What the steps hand to each other, used again for every cell."""

    sorted_keys: NDArray[np.uint32]  # (longest cell,)
    spare: NDArray[np.uint32]        # (longest cell,)
    ends: NDArray[np.int32]          # (COUNTERS x TABLE,) counters of each value; the first then of those up to it
    starts: NDArray[np.int32]        # (digits,) of the radix sort
    around: NDArray[np.float64]      # (2, n_bins - 1) values on either side of each edge
    edges: NDArray[np.float64]       # (n_bins - 1,)
    table: NDArray[np.uint32]        # (TABLE + 1,) of each value its highest bin, and the edges that equal it << 16


def scratch_for(longest: int, n_bins: int) -> Scratch:
    """Room for cells of up to `longest` values."""
    return Scratch(np.empty(longest, np.uint32), np.empty(longest, np.uint32),
                   np.empty(COUNTERS * TABLE, np.int32), np.empty(_LAST_DIGIT + 1, np.int32),
                   np.empty((2, n_bins - 1)), np.empty(n_bins - 1), np.empty(TABLE + 1, np.uint32))


@functools.cache
def probabilities(n_bins: int) -> NDArray[np.float64]:
    """The probabilities of the edges, (n_bins - 1,): 0 to 1, evenly spaced (upstream's linspace); read-only."""
    at = np.linspace(0, 1, n_bins - 1)
    at.flags.writeable = False
    return at


def bin_cell(expressions: NDArray[np.generic], n_bins: int, *, seed: int, epoch: int, cell_id: int,
             tie_rule: str = "spread") -> NDArray[np.float32]:
    """Bins of all values of one cell, (values,) float32 in 1 .. n_bins - 1; what `collate` does to each cell.

    `expressions`: (values,) uint16, uint32 or float32. Raises DataError unless all are finite and above 0.
    """
    if not (np.isfinite(expressions) & np.greater(expressions, 0)).all():
        raise DataError("only finite values above 0 have a bin", where=f"cell {cell_id}", fix="leave zeros out")
    n_values = len(expressions)
    bins = np.empty(n_values, np.float32)
    if n_values == 0:
        return bins
    keys, integers, scratch = sort_keys(expressions), expressions.dtype != np.float32, scratch_for(n_values, n_bins)
    fill_edges(keys, integers, as_values(scratch.sorted_keys, expressions.dtype), probabilities(n_bins), scratch)
    every = np.arange(n_values, dtype=np.int32)
    find_bins(expressions, keys, every, n_values, fill_table(integers, scratch), scratch)
    words = np.empty(n_values, np.uint64)
    fill(np.uint64(stream(np.uint64(seed), epoch, np.uint64(cell_id), PURPOSE_VALUE)), every, words)
    draw_bins(scratch.spare, words, tie_rule == "spread", bins)
    return bins


def sort_keys(expressions: NDArray[np.generic]) -> NDArray[np.unsignedinteger]:
    """Values > 0 as unsigned integers in the same order, a view: uint16 and uint32 are themselves."""
    return expressions.view(np.uint32 if expressions.dtype == np.float32 else expressions.dtype)


def as_values(sorted_keys: NDArray[np.uint32], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """Sorted keys read as the values that they stand for, a view: float32, or uint32 where `dtype` is of integers."""
    return sorted_keys.view(np.float32) if dtype == np.float32 else sorted_keys


@njit(cache=True, nogil=True)
def sort(keys: NDArray[np.unsignedinteger], ordered: NDArray[np.uint32], spare: NDArray[np.uint32],
         starts: NDArray[np.int32]) -> None:
    """Sort `keys` into `ordered`: a few by insertion, more by radix, least digit first.

    Args:
        keys: (values,) uint16 or uint32; may be the beginning of `ordered`.
        ordered: (>= values,), overwritten.
        spare: (>= values,), overwritten.
        starts: (DIGITS,), overwritten.
    """
    n_values = len(keys)
    if n_values > FEW:
        _sort_by_radix(keys, ordered, spare, starts)
        return
    for i in range(n_values):
        key, place = keys[i], i
        while place > 0 and ordered[place - 1] > key:
            ordered[place] = ordered[place - 1]
            place -= 1
        ordered[place] = key


@njit(cache=True, nogil=True)
def _sort_by_radix(keys: NDArray[np.unsignedinteger], ordered: NDArray[np.uint32], spare: NDArray[np.uint32],
                   starts: NDArray[np.int32]) -> None:
    """Passes of DIGIT_BITS bits, as many as the largest key needs."""
    n_values = len(keys)
    largest = 0
    for i in range(n_values):
        ordered[i] = keys[i]
        largest = max(largest, int(ordered[i]))
    source, target = ordered, spare
    shift = 0
    while largest >> shift:
        n_digits = min(_LAST_DIGIT, largest >> shift) + 1
        for digit in range(n_digits):
            starts[digit] = 0
        for i in range(n_values):
            starts[(source[i] >> shift) & _LAST_DIGIT] += 1
        start = 0
        for digit in range(n_digits):
            count = starts[digit]
            starts[digit] = start
            start += count
        for i in range(n_values):
            digit = (source[i] >> shift) & _LAST_DIGIT
            target[starts[digit]] = source[i]
            starts[digit] += 1
        source, target = target, source
        shift += DIGIT_BITS
    if (shift // DIGIT_BITS) % 2:   # an odd number of passes ended in `spare`
        for i in range(n_values):
            ordered[i] = source[i]


@njit(cache=True, nogil=True)
def count(keys: NDArray[np.unsignedinteger], ends: NDArray[np.int32], larger: NDArray[np.uint32]) -> int:
    """ends[x] = keys <= x, for each x below TABLE; the other keys go to the beginning of `larger`.

    Counters of each value are taken in turn: most counts are 1, and one counter would wait for itself.

    Args:
        keys: (values,) uint16 or uint32.
        ends: (COUNTERS x TABLE,), overwritten; flat, so that where each counter lies is known to the compiler.
        larger: (>= values,), overwritten.

    Returns how many keys are below TABLE.
    """
    ends[:] = 0
    n_values, n_larger = len(keys), 0
    whole = n_values - n_values % COUNTERS
    for first in range(0, whole, COUNTERS):
        united = np.uint64(0)
        for counter in range(COUNTERS):
            united |= np.uint64(keys[first + counter])
        if united < np.uint64(TABLE):
            for counter in range(COUNTERS):
                ends[np.uint64(counter * TABLE) + np.uint64(keys[first + counter])] += np.int32(1)
        else:
            n_larger = _count_one_by_one(keys, first, first + COUNTERS, ends, larger, n_larger)
    n_larger = _count_one_by_one(keys, whole, n_values, ends, larger, n_larger)
    for counter in range(1, COUNTERS):
        for value in range(TABLE):
            ends[value] += ends[counter * TABLE + value]
    for value in range(1, TABLE):
        ends[value] += ends[value - 1]
    return n_values - n_larger


@njit(cache=True, nogil=True, inline="always")
def _count_one_by_one(keys: NDArray[np.unsignedinteger], first: int, stop: int, ends: NDArray[np.int32],
                      larger: NDArray[np.uint32], n_larger: int) -> int:
    """Count keys[first:stop], of which some are TABLE or more; returns how many larger ones there are by then."""
    for i in range(first, stop):
        if keys[i] < TABLE:
            ends[np.uint64(keys[i])] += np.int32(1)
        else:
            larger[n_larger] = keys[i]
            n_larger += 1
    return n_larger


@njit(cache=True, nogil=True)
def _value_at(rank: int, value: int, ends: NDArray[np.int32]) -> int:
    """The counted value of that rank (from 0), looked for from `value` upwards."""
    while ends[value] <= rank:
        value += 1
    return value


@njit(cache=True, nogil=True)
def fill_edges(keys: NDArray[np.unsignedinteger], integers: bool, ordered: NDArray[np.generic],  # noqa: FBT001 compiled
               at: NDArray[np.float64], scratch: Scratch) -> None:
    """Write the quantiles of the values at the probabilities `at`, (n_bins - 1,) float64, to `scratch.edges`.

    `ordered` is `scratch.sorted_keys` read as the values' type. The interpolation is NumPy's, operation by operation
    (`numpy.quantile`, method "linear"), so that the edges are equal to the bit. At least one value.
    """
    n_values, n_counted, value = len(keys), 0, 0
    ends, sorted_keys, lows, highs = scratch.ends, scratch.sorted_keys, scratch.around[0], scratch.around[1]
    if integers:
        n_counted = count(keys, ends, sorted_keys)
        sort(sorted_keys[:n_values - n_counted], sorted_keys, scratch.spare, scratch.starts)
    else:
        sort(keys, sorted_keys, scratch.spare, scratch.starts)
    for e in range(len(at)):
        left = int((n_values - 1) * at[e])
        right = min(left + 1, n_values - 1)
        if left < n_counted:
            value = _value_at(left, value, ends)
        low = high = np.float64(value)
        if left >= n_counted:
            low = np.float64(ordered[left - n_counted])
        if right >= n_counted:
            high = np.float64(ordered[right - n_counted])
        elif right > left:
            high = np.float64(_value_at(right, value, ends))
        lows[e], highs[e] = low, high
    for e in range(len(at)):   # on its own: compiles to vector operations
        place = (n_values - 1) * at[e]
        part, step = place - np.floor(place), highs[e] - lows[e]
        upwards, downwards = lows[e] + step * part, highs[e] - step * (1 - part)
        scratch.edges[e] = upwards if part < 0.5 else downwards


@njit(cache=True, nogil=True)
def fill_table(integers: bool, scratch: Scratch) -> int:  # noqa: FBT001 compiled
    """For each integer x below TABLE: its number of edges <= x, and of those that equal it.

    Returns the end of what was filled: values from there on are compared with the edges; 0 where values are floats.
    """
    if not integers:
        return 0
    table = scratch.table   # first what each integer adds to the one before it
    table[:] = 0
    for edge in scratch.edges:
        below = int(edge)
        first = below + int(edge > below)   # the first integer that is not below the edge; it equals it, or none does
        table[np.uint64(min(first, TABLE))] += np.uint32(1 + (1 << 16))
        table[np.uint64(min(below + 1, TABLE))] -= np.uint32(1 << 16)
    total = np.uint32(0)
    for value in range(TABLE):
        total = np.uint32(total + table[value])
        table[value] = total
    return TABLE


@njit(cache=True, nogil=True)
def find_bins(expressions: NDArray[np.generic], keys: NDArray[np.unsignedinteger], chosen: NDArray[np.int32],
              n_chosen: int, table_end: int, scratch: Scratch) -> None:
    """Write of each chosen value its highest bin, and in the upper 16 bits how many it has, to `scratch.spare`."""
    edges = scratch.edges
    for t in range(n_chosen):
        i = np.uint64(chosen[t])   # unsigned: no check for a place counted from the end
        if keys[i] < table_end:
            scratch.spare[t] = scratch.table[keys[i]]
            continue
        value = np.float64(expressions[i])
        upto, below = 0, 0
        for e in range(len(edges)):   # a plain count: compiles to a few vector comparisons
            upto += edges[e] <= value
            below += edges[e] < value
        scratch.spare[t] = upto | (upto - below) << 16


@njit(cache=True, nogil=True)
def draw_bins(found: NDArray[np.uint32], words: NDArray[np.uint64], spread: bool,  # noqa: FBT001 compiled
              bins: NDArray[np.float32]) -> None:
    """Write the bins to `bins`, (chosen,): the highest, or by the lower 32 bits of words[t] one of those of value t.

    `found`: see find_bins. On its own, with few arrays: compiles to vector operations.
    """
    for t in range(len(bins)):
        ties = uint64(found[t] >> np.uint32(16)) if spread else uint64(0)
        drawn = ((words[t] & _LOWER) * ties) >> _S32   # below `ties`, biased by < 2**-32
        bins[t] = np.float32(np.int32(found[t] & np.uint32(0xFFFF)) - np.int32(drawn))
