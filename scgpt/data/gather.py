"""Copy cells out of record batches and chunks: compiled loops over raw addresses, loaded on the first read.

A batch is known by the addresses of its buffers, so one loop serves all batches of all shards; it releases the GIL, and
costs one memory copy a cell. The addresses must stay mapped while a call runs: `ArrowShards` owns the mappings.
"""
import numpy as np
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic


@intrinsic
def _pointer(typing_context, address, like):  # type: ignore[no-untyped-def]
    """Read an address (uint64) as a pointer to the element type of the array `like`."""
    signature = types.CPointer(like.dtype)(types.uint64, like)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@njit(cache=True, nogil=True)
def lengths(offset_addresses, n_values, batches, rows, out):  # type: ignore[no-untyped-def]
    """out[i] = number of values of cell rows[i] of record batch batches[i] (int32 list offsets at the address).

    -1 for a cell whose boundaries do not lie within the n_values of its batch: it must not be read.
    """
    like = np.empty(0, np.int32)
    for i in range(len(rows)):
        offsets = carray(_pointer(offset_addresses[batches[i]], like), rows[i] + 2)  # type: ignore[call-arg]
        first, last = offsets[rows[i]], offsets[rows[i] + 1]
        out[i] = last - first if 0 <= first <= last <= n_values[batches[i]] else -1


@njit(cache=True, nogil=True)
def items(addresses, batches, rows, out):  # type: ignore[no-untyped-def]
    """out[i] = item rows[i] of the flat column of record batch batches[i]."""
    for i in range(len(rows)):
        out[i] = carray(_pointer(addresses[batches[i]], out), rows[i] + 1)[rows[i]]  # type: ignore[call-arg]


@njit(cache=True, nogil=True)
def lists(addresses, offset_addresses, batches, rows, out_offsets, out):  # type: ignore[no-untyped-def]
    """out[out_offsets[i]:out_offsets[i + 1]] = the values of cell rows[i] of record batch batches[i]."""
    like = np.empty(0, np.int32)
    width = np.uint64(out.itemsize)
    for i in range(len(rows)):
        first = carray(_pointer(offset_addresses[batches[i]], like), rows[i] + 1)[rows[i]]  # type: ignore[call-arg]
        start, stop = out_offsets[i], out_offsets[i + 1]
        address = addresses[batches[i]] + np.uint64(first) * width
        out[start:stop] = carray(_pointer(address, out), stop - start)


@njit(cache=True, nogil=True)
def lists_at(addresses, offset_addresses, batches, rows, starts, stops, out):  # type: ignore[no-untyped-def]
    """out[starts[i]:stops[i]] = the values of cell rows[i] of record batch batches[i]."""
    like = np.empty(0, np.int32)
    width = np.uint64(out.itemsize)
    for i in range(len(rows)):
        first = carray(_pointer(offset_addresses[batches[i]], like), rows[i] + 1)[rows[i]]  # type: ignore[call-arg]
        start, stop = starts[i], stops[i]
        address = addresses[batches[i]] + np.uint64(first) * width
        out[start:stop] = carray(_pointer(address, out), stop - start)


@njit(cache=True, nogil=True)
def scatter(values, offsets, places, out):  # type: ignore[no-untyped-def]
    """From out[places[i]] on: the values [offsets[i], offsets[i + 1])."""
    for i in range(len(places)):
        out[places[i]:places[i] + offsets[i + 1] - offsets[i]] = values[offsets[i]:offsets[i + 1]]


@njit(cache=True, nogil=True)
def segments(addresses, chunks, firsts, counts, places, out):  # type: ignore[no-untyped-def]
    """From out[places[i]] on: counts[i] items, from item firsts[i] on, of the chunk at addresses[chunks[i]]."""
    width = np.uint64(out.itemsize)
    for i in range(len(places)):
        address = addresses[chunks[i]] + np.uint64(firsts[i]) * width
        out[places[i]:places[i] + counts[i]] = carray(_pointer(address, out), counts[i])  # type: ignore[call-arg]


@njit(cache=True, nogil=True)
def sum_deltas(values, offsets):  # type: ignore[no-untyped-def]
    """Within each cell, replace the values by their running sums."""
    for i in range(len(offsets) - 1):
        for place in range(offsets[i] + 1, offsets[i + 1]):
            values[place] += values[place - 1]
