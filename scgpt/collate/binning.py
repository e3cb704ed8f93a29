"""Value binning: the quantile bins of one whole cell, as upstream's `binning` defines them.

Edges e_0 .. e_{B-2} are the quantiles of the cell's values at B - 1 evenly spaced probabilities, linearly interpolated
in float64 (`numpy.quantile`, to the bit). A value x with `below` edges < x and `upto` edges <= x gets a bin drawn
evenly from below + 1 .. upto (tie rule "spread": upstream's main), or `upto` ("highest": upstream's pretraining
branches). A value between two edges has below == upto and gets that number. Bins are 1 .. B - 1; 0 stays that of zero.

Counts are small integers, so sorting is counting and a bin is two table look-ups. Values of any type are sorted as
32-bit keys that rise with the value: an integer itself, or the bits of a positive float32.
"""
import functools

import numpy as np
from numba import njit
from numpy.typing import NDArray

from scgpt.errors import DataError
from scgpt.rng import PURPOSE_BIN_TIES, stream, uniform

DIGIT_BITS = 11
TABLE = 1 << DIGIT_BITS   # integers below this are sorted in one pass and binned by look-up
_DIGIT = TABLE - 1


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
    keys, sorted_keys, spare = sort_keys(expressions), np.empty(n_values, np.uint32), np.empty(n_values, np.uint32)
    ordered = as_values(sorted_keys, expressions.dtype)
    edges, tables = np.empty(n_bins - 1), np.empty((2, TABLE), np.uint16)
    fill_edges(keys, sorted_keys, spare, np.empty((4, TABLE), np.int32), ordered, probabilities(n_bins), edges)
    table_end = fill_tables(edges, expressions.dtype != np.float32, tables)
    key = np.uint64(stream(np.uint64(seed), epoch, np.uint64(cell_id), PURPOSE_BIN_TIES))
    bin_values(expressions, keys, np.arange(n_values, dtype=np.int32), n_values, edges, tables, table_end, key,
               tie_rule == "spread", bins)
    return bins


def sort_keys(expressions: NDArray[np.generic]) -> NDArray[np.unsignedinteger]:
    """Values > 0 as unsigned integers in the same order, a view: uint16 and uint32 are themselves."""
    return expressions.view(np.uint32 if expressions.dtype == np.float32 else expressions.dtype)


def as_values(sorted_keys: NDArray[np.uint32], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """Sorted keys read as the values that they stand for, a view: float32, or uint32 where `dtype` is of integers."""
    return sorted_keys.view(np.float32) if dtype == np.float32 else sorted_keys


@njit(cache=True, nogil=True)
def sort(keys: NDArray[np.unsignedinteger], ordered: NDArray[np.uint32], spare: NDArray[np.uint32],
         counts: NDArray[np.int32]) -> None:
    """Sort `keys` into `ordered`: small ones by counting, others by radix, least digit first.

    Args:
        keys: (values,) uint16 or uint32. `ordered`, `spare`: (>= values,), overwritten.
        counts: (4, TABLE), overwritten.
    """
    largest = _largest(keys)
    if largest < TABLE:
        _sort_by_counting(keys, largest, ordered, counts)
    else:
        _sort_by_radix(keys, largest, ordered, spare, counts[0])


@njit(cache=True, nogil=True)
def _largest(keys: NDArray[np.unsignedinteger]) -> int:
    largest = 0
    for i in range(len(keys)):
        largest = max(largest, int(keys[i]))
    return largest


@njit(cache=True, nogil=True)
def _sort_by_counting(keys: NDArray[np.unsignedinteger], largest: int, ordered: NDArray[np.uint32],
                      counts: NDArray[np.int32]) -> None:
    """Four counters for each value, taken in turn: most counts are 1, and one counter would wait for itself."""
    for counter in range(4):
        for value in range(largest + 1):
            counts[counter, value] = 0
    for i in range(len(keys)):
        counts[i & 3, keys[i]] += 1
    end = 0
    for value in range(largest + 1):
        start, end = end, end + counts[0, value] + counts[1, value] + counts[2, value] + counts[3, value]
        for i in range(start, end):
            ordered[i] = value


@njit(cache=True, nogil=True)
def _sort_by_radix(keys: NDArray[np.unsignedinteger], largest: int, ordered: NDArray[np.uint32],
                   spare: NDArray[np.uint32], starts: NDArray[np.int32]) -> None:
    """Passes of DIGIT_BITS bits, as many as the largest key needs."""
    n_values = len(keys)
    for i in range(n_values):
        ordered[i] = keys[i]
    source, target = ordered, spare
    shift = 0
    while largest >> shift:
        n_digits = min(_DIGIT, largest >> shift) + 1
        for digit in range(n_digits):
            starts[digit] = 0
        for i in range(n_values):
            starts[(source[i] >> shift) & _DIGIT] += 1
        start = 0
        for digit in range(n_digits):
            count = starts[digit]
            starts[digit] = start
            start += count
        for i in range(n_values):
            digit = (source[i] >> shift) & _DIGIT
            target[starts[digit]] = source[i]
            starts[digit] += 1
        source, target = target, source
        shift += DIGIT_BITS
    if (shift // DIGIT_BITS) % 2:   # an odd number of passes ended in `spare`
        for i in range(n_values):
            ordered[i] = source[i]


@njit(cache=True, nogil=True)
def fill_edges(keys: NDArray[np.unsignedinteger], sorted_keys: NDArray[np.uint32], spare: NDArray[np.uint32],
               counts: NDArray[np.int32], ordered: NDArray[np.generic], at: NDArray[np.float64],
               edges: NDArray[np.float64]) -> None:
    """Write the quantiles of the values at the probabilities `at` to `edges`, both (n_bins - 1,) float64.

    `ordered` is `sorted_keys` read as the values' type. The interpolation is NumPy's, operation by operation
    (`numpy.quantile`, method "linear"), so that the edges are equal to the bit. At least one value.
    """
    n_values = len(keys)
    sort(keys, sorted_keys, spare, counts)
    for e in range(len(at)):
        place = (n_values - 1) * at[e]
        if place >= n_values - 1:
            edges[e] = np.float64(ordered[n_values - 1])
            continue
        left = int(np.floor(place))
        low, high = np.float64(ordered[left]), np.float64(ordered[left + 1])
        part = place - left
        edges[e] = low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part)


@njit(cache=True, nogil=True)
def fill_tables(edges: NDArray[np.float64], integers: bool, tables: NDArray[np.uint16]) -> int:  # noqa: FBT001 compiled
    """For each integer x up to the largest, below TABLE: tables[0, x] = edges <= x, tables[1, x] = edges < x.

    Returns the end of what was filled: values from there on are compared with the edges; 0 where values are floats.
    """
    if not integers:
        return 0
    n_edges = len(edges)
    end = min(TABLE, int(edges[n_edges - 1]) + 1)
    upto, below = 0, 0
    for value in range(end):
        while upto < n_edges and edges[upto] <= value:
            upto += 1
        while below < n_edges and edges[below] < value:
            below += 1
        tables[0, value] = upto
        tables[1, value] = below
    return end


@njit(cache=True, nogil=True)
def bin_values(expressions: NDArray[np.generic], keys: NDArray[np.unsignedinteger], chosen: NDArray[np.int32],
               n_chosen: int, edges: NDArray[np.float64], tables: NDArray[np.uint16], table_end: int, key: np.uint64,
               spread: bool, bins: NDArray[np.float32]) -> None:  # noqa: FBT001 compiled
    """Write the bins of the chosen values to `bins`, (n_chosen,); draw i of stream `key` decides value i's tie."""
    for t in range(n_chosen):
        i = chosen[t]
        if keys[i] < table_end:
            upto, below = int(tables[0, keys[i]]), int(tables[1, keys[i]])
        else:
            value = np.float64(expressions[i])
            upto, below = 0, 0
            for e in range(len(edges)):   # a plain count: compiles to a few vector comparisons
                upto += edges[e] <= value
                below += edges[e] < value
        if spread:
            upto -= int(uniform(key, i) * (upto - below))
        bins[t] = upto
