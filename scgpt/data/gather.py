"""Find cells in record batches and chunks, and copy them out: compiled loops over raw addresses.

A batch is known by the addresses of its buffers, so one loop serves all batches of all shards; it releases the GIL, and
costs one memory copy a cell. Cells lie at random, so a processor that reads one after the other mostly waits for the
first lines of the next: they are asked for two cells ahead, which with memcpy instead of a loop over values made reads
three times as fast. The addresses must stay mapped while a call runs: `ArrowShards` owns the mappings. Loaded on the
first read.
"""
import mmap

import llvmlite.ir as ir
import numpy as np
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic

_AHEAD = 2         # cells
_LINES = 4         # cache lines of each column; the processor itself goes on from there
_LINE_BYTES = 64
_PAGE_BYTES = np.uint64(mmap.PAGESIZE)
_WILL_NEED = np.int32(mmap.MADV_WILLNEED)
_madvise = types.ExternalFunction("madvise", types.int32(types.uint64, types.uint64, types.int32))   # libc's


@intrinsic
def _pointer(typing_context, address, like):  # type: ignore[no-untyped-def]
    """Read an address (uint64) as a pointer to the element type of the array `like`."""
    signature = types.CPointer(like.dtype)(types.uint64, like)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


@intrinsic
def _copy(typing_context, out, place, address, n_bytes):  # type: ignore[no-untyped-def]
    """Copy bytes from an address (uint64) to out[place] and on; neither bound is checked."""
    signature = types.void(out, types.int64, types.uint64, types.int64)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        source = builder.inttoptr(arguments[2], target.type)
        cgutils.raw_memcpy(builder, builder.gep(target, [arguments[1]]), source, arguments[3], 1)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _prefetch(typing_context, address):  # type: ignore[no-untyped-def]
    """Have the line at an address (uint64) come to the cache; no address is wrong."""
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        builder.call(prefetch, [builder.inttoptr(arguments[0], pointer), word(0), word(3), word(1)])   # a read, of data
        return context.get_dummy_value()

    return types.void(types.uint64), generate


@njit(cache=True, nogil=True, inline="always")
def at(address, like, n_values):  # type: ignore[no-untyped-def]
    """The values at an address (uint64), (n_values,) in the type of the array `like`; neither is checked."""
    return carray(_pointer(address, like), n_values)  # type: ignore[call-arg]


@njit(cache=True, nogil=True, inline="always")
def ask_for(address, n_lines):  # type: ignore[no-untyped-def]
    """Have the cache lines at an address (uint64) and behind it come to the cache; no address is wrong."""
    for line in range(n_lines):
        _prefetch(address + np.uint64(line * _LINE_BYTES))  # type: ignore[call-arg]


@njit(cache=True, nogil=True)
def lengths(offset_addresses, n_values, batches, rows, out):  # type: ignore[no-untyped-def]
    """out[i] = number of values of cell rows[i] of record batch batches[i] (int32 list offsets at the address).

    -1 for a cell whose boundaries do not lie within the n_values of its batch: it must not be read.
    """
    like = np.empty(0, np.int32)
    for i in range(len(rows)):
        offsets = at(offset_addresses[batches[i]], like, rows[i] + 2)
        first, last = offsets[rows[i]], offsets[rows[i] + 1]
        out[i] = last - first if 0 <= first <= last <= n_values[batches[i]] else -1


@njit(cache=True, nogil=True)
def items(addresses, batches, rows, out):  # type: ignore[no-untyped-def]
    """out[i] = item rows[i] of the flat column of record batch batches[i]."""
    for i in range(len(rows)):
        out[i] = at(addresses[batches[i]], out, rows[i] + 1)[rows[i]]


@njit(cache=True, nogil=True)
def locate(genes, expressions, ids, offsets, batches, rows, widths,  # type: ignore[no-untyped-def]
           out_genes, out_expressions, out_ids):
    """Write where the values of cell rows[i] of record batch batches[i] begin, and its id, to the last three arrays.

    `genes`, `expressions`, `ids` and `offsets` are the addresses of each batch's buffers; `widths`: the bytes of a gene
    and of an expression.
    """
    like = np.empty(0, np.int32)
    for i in range(len(rows)):
        batch = batches[i]
        first = np.uint64(at(offsets[batch], like, rows[i] + 1)[rows[i]])
        out_genes[i] = genes[batch] + first * np.uint64(widths[0])
        out_expressions[i] = expressions[batch] + first * np.uint64(widths[1])
        out_ids[i] = at(ids[batch], out_ids, rows[i] + 1)[rows[i]]


@njit(cache=True, nogil=True)
def cells(genes, expressions, ids, offsets, batches, rows, places,  # type: ignore[no-untyped-def]
          out_genes, out_expressions, out_offsets, out_ids):
    """Copy cell rows[i] of record batch batches[i] to cell places[i] of the RaggedBatch of the last four arrays.

    See `locate`; `out_offsets` is filled.
    """
    n_cells = len(rows)
    gene_starts, expression_starts = np.empty(n_cells, np.uint64), np.empty(n_cells, np.uint64)
    cell_ids = np.empty(n_cells, np.uint64)
    locate(genes, expressions, ids, offsets, batches, rows, (out_genes.itemsize, out_expressions.itemsize),
           gene_starts, expression_starts, cell_ids)
    for i in range(n_cells):
        out_ids[places[i]] = cell_ids[i]
        if i + _AHEAD < n_cells:
            ask_for(gene_starts[i + _AHEAD], _LINES)
            ask_for(expression_starts[i + _AHEAD], _LINES)
        start = out_offsets[places[i]]
        n_values = out_offsets[places[i] + 1] - start
        _copy(out_genes, start, gene_starts[i], n_values * out_genes.itemsize)  # type: ignore[call-arg]
        _copy(out_expressions, start, expression_starts[i],
              n_values * out_expressions.itemsize)


@njit(cache=True, nogil=True)
def will_need(addresses, offsets, batches, rows, width):  # type: ignore[no-untyped-def]
    """Have the kernel begin to read the values, `width` bytes each, of the given cells; neighbours as one range."""
    like = np.empty(0, np.int32)
    start = stop = np.uint64(0)
    for i in range(len(rows)):
        bounds = at(offsets[batches[i]], like, rows[i] + 2)
        begin = addresses[batches[i]] + np.uint64(bounds[rows[i]]) * np.uint64(width)
        if not stop <= begin <= stop + _PAGE_BYTES:
            _begin_to_read(start, stop)
            start = begin
        stop = addresses[batches[i]] + np.uint64(bounds[rows[i] + 1]) * np.uint64(width)
    _begin_to_read(start, stop)


@njit(cache=True, nogil=True)
def _begin_to_read(start, stop):  # type: ignore[no-untyped-def]
    """Begin to read the pages of [start, stop); a hint, so a refusal is none of our business."""
    if stop > start:
        page = start - start % _PAGE_BYTES
        _madvise(page, stop - page, _WILL_NEED)  # type: ignore[call-overload]


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
        _copy(out, places[i], addresses[chunks[i]] + np.uint64(firsts[i]) * width,  # type: ignore[call-arg]
              counts[i] * out.itemsize)


@njit(cache=True, nogil=True)
def sum_deltas(values, offsets):  # type: ignore[no-untyped-def]
    """Within each cell, replace the values by their running sums."""
    for i in range(len(offsets) - 1):
        for place in range(offsets[i] + 1, offsets[i + 1]):
            values[place] += values[place - 1]
