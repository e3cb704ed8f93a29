"""One block of rows -> one RaggedBatch: columns become token ids, zeros go, genes are sorted, duplicates summed.

A cell is scattered into an array with one place for each token that the source has, and a bit set for each that the
cell has; reading the bits in order gives the cell sorted and free of duplicates: O(values + tokens / 64) a cell, where
sorting would be O(values log values). What a cell was before (all its columns) stays beside it as numbers, for filters
and the ledger. Where the source allows it, rows are read a few at a time: they are used while the cache has them still.
"""
from collections.abc import Iterator

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from scipy.sparse import csr_array

from data_pipeline.genes import UNMAPPED, GeneMap
from data_pipeline.sources.base import (
    EXPRESSION_KINDS,
    MAX_VALUE,
    RAW,
    Source,
    X,
    are_counts,
    describe_values,
    value_kind,
)
from data_pipeline.sources.kinds import open_source
from scgpt.counted import counted
from scgpt.data.schema import CELL_ID, SOURCE_ROW, RaggedBatch, cell_ids, gene_dtype, offsets_of
from scgpt.errors import SourceError

# Per cell, over all genes of the source: what came in. (cells,) int64 and float64
VALUES_IN, SUM_IN = "values_in", "sum_in"              # non-zero values and their sum
SUM_MITO, SUM_UNMAPPED = "sum_mito", "sum_unmapped"    # sums over mitochondrial genes and over genes without a token

_DONE, _TOO_WIDE = -1, -2   # what the loop says where no value is at fault
# The types of expressions, the narrowest first, and what they hold: integers below a bound, or any value.
_WIDTHS = ((np.uint16, 2.0**16), (np.uint32, 2.0**32), (np.float32, np.inf))


def tokenize_block(source: Source, gene_map: GeneMap, first: int, last: int, *, counts: bool = True) -> RaggedBatch:
    """Rows [first, last) of a source as stored cells, unfiltered, in their order.

    Args:
        source: an open source.
        gene_map: of the same source (`map_source`).
        first, last: the rows.
        counts: refuse values that are not integers.

    Returns a batch whose `expressions` are uint16 or uint32 where all values are integers that fit, else float32, and
    whose columns are cell_id, source_row, VALUES_IN, SUM_IN, SUM_MITO and SUM_UNMAPPED.
    Raises SourceError naming the row for values that are negative, NaN, above MAX_VALUE or (`counts`) not integers.
    """
    n_cells, width, end = last - first, 0, 0
    genes, expressions = np.empty(0, gene_dtype(gene_map.n_tokens)), np.empty(0, _WIDTHS[0][0])
    lengths, values_in, sums = np.empty(n_cells, np.int64), np.empty(n_cells, np.int64), np.empty((n_cells, 3))
    places, tokens = _places(gene_map, genes.dtype)
    for rows, start, n_values in _read(source, first, last):
        if rows.shape[1] != len(places):   # a gene table beside the source: no check of the source itself sees it
            raise SourceError(f"it has {counted(rows.shape[1], 'gene')}, {len(places)} when the corpus was planned",
                              where=str(source.path), fix="start the build again once nothing writes to it")
        if not end:
            genes, expressions = np.empty(n_values, genes.dtype), np.empty(n_values, expressions.dtype)
        data = rows.data if rows.data.dtype in (np.float32, np.float64) else rows.data.astype(np.float64)
        indptr, columns = rows.indptr.astype(np.int64), rows.indices.astype(np.int32, copy=False)
        mine = slice(start - first, start - first + rows.shape[0])
        while (fault := _tokenize(data, columns, indptr, places, tokens, gene_map.mitochondrial, counts,
                                  _WIDTHS[width][1], genes[end:], expressions[end:], lengths[mine], values_in[mine],
                                  sums[mine])) == _TOO_WIDE:
            width += 1
            expressions = expressions.astype(_WIDTHS[width][0])
        if fault != _DONE:
            raise _bad_value(source, start, indptr, data, int(fault), counts=counts)
        end += int(lengths[mine].sum())
    source_rows = np.arange(first, last, dtype=np.int64)
    return RaggedBatch(genes[:end], expressions[:end], offsets_of(lengths), {
        CELL_ID: cell_ids(source.name, source_rows), SOURCE_ROW: source_rows, VALUES_IN: values_in,
        SUM_IN: sums[:, 0], SUM_MITO: sums[:, 1], SUM_UNMAPPED: sums[:, 2]})


def _read(source: Source, first: int, last: int) -> Iterator[tuple[csr_array, int, int]]:
    """The rows in pieces: (rows, the first of them, stored values of all that are to come, these included)."""
    piece_values = source.piece_values
    if piece_values is None:
        rows = source.read_rows(first, last)
        yield rows, first, len(rows.data)
        return
    offsets = source.value_offsets(first, last)
    start = 0
    while start < last - first:
        stop = max(int(np.searchsorted(offsets, offsets[start] + piece_values, side="right")) - 1, start + 1)
        yield source.read_rows(first + start, first + stop), first + start, int(offsets[-1] - offsets[start])
        start = stop


def _places(gene_map: GeneMap, gene_type: np.dtype[np.unsignedinteger],
            ) -> tuple[NDArray[np.int32], NDArray[np.unsignedinteger]]:
    """The place of each column among the tokens that the source has, (n_genes,), UNMAPPED: none; these, ascending."""
    mapped = gene_map.tokens != UNMAPPED
    tokens, places = np.unique(gene_map.tokens[mapped], return_inverse=True)
    found = np.full(len(mapped), UNMAPPED, np.int32)
    found[mapped] = places
    return found, tokens.astype(gene_type)


@intrinsic
def _lowest_bit(typing_context, word):  # type: ignore[no-untyped-def]
    """The place of the lowest bit that is set in a uint64 that is not 0."""
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.cttz(arguments[0], context.get_constant(types.boolean, True))   # noqa: FBT003 it is not 0

    return types.uint64(types.uint64), generate


@njit(cache=True, nogil=True)
def _tokenize(data, columns, indptr, places, tokens, mitochondrial, counts, bound,  # type: ignore[no-untyped-def]
              genes, expressions, lengths, values_in, sums):
    """Fill the outputs cell by cell.

    Returns the place of the first value that is not allowed, or _DONE; where `bound` is finite, _TOO_WIDE at the first
    cell with values that are no integers below it.
    """
    held = np.zeros(len(tokens), np.float64)
    present = np.zeros((len(tokens) + 63) // 64, np.uint64)
    one = np.uint64(1)
    end = 0
    for cell in range(len(indptr) - 1):
        n_values, total, mito, unmapped = 0, 0.0, 0.0, 0.0
        for entry in range(indptr[cell], indptr[cell + 1]):
            value = np.float64(data[entry])
            if value == 0.0:
                continue
            if not (value > 0.0 and value <= MAX_VALUE) or (counts and value != np.floor(value)):
                return entry
            n_values += 1
            total += value
            column = columns[entry]
            if mitochondrial[column]:
                mito += value
            place = places[column]
            if place < 0:
                unmapped += value
                continue
            held[place] += value
            present[place >> 6] |= one << np.uint64(place & 63)
        start, largest, whole = end, 0.0, True
        for word in range(len(present)):
            bits = present[word]
            present[word] = 0
            while bits:
                place = word * 64 + _lowest_bit(bits)  # type: ignore[call-arg]
                value = held[place]
                largest = max(largest, value)
                whole &= counts or value == np.floor(value)
                genes[end], expressions[end] = tokens[place], value
                held[place] = 0.0
                end += 1
                bits &= bits - one
        if bound < np.inf and not (whole and largest < bound):
            return _TOO_WIDE
        lengths[cell], values_in[cell] = end - start, n_values
        sums[cell, 0], sums[cell, 1], sums[cell, 2] = total, mito, unmapped
    return _DONE


def _bad_value(source: Source, first: int, indptr: NDArray[np.int64], data: NDArray[np.generic], place: int, *,
               counts: bool) -> SourceError:
    row = first + int(np.searchsorted(indptr, place, side="right")) - 1
    found = f"row {row} holds {float(data[place]):.6g}, one of {describe_values(data[place:])},"
    return refused_values(source, data[place:], found, counts=counts)


def refused_values(source: Source, values: NDArray[np.generic], found: str, *, counts: bool) -> SourceError:
    """The error for values that cannot be stored: what they look like, and which other matrix of the file does better.

    Args:
        source: where they are.
        values: the first that is at fault, and some after it.
        found: what there is, in words.
        counts: whether counts are expected, or any values of 0 or more.
    """
    kind = value_kind(values)
    better = _counts_elsewhere(source)
    if better:
        fix = f"set layer: {better[0]}, which holds counts"
    elif kind in EXPRESSION_KINDS and counts:
        fix = f"give raw counts, or say what the values are (cells.expression_kind: {kind})"
    else:
        fix = "repair the file, or take it out of `sources`"
    expected = "counts" if counts else "values of 0 or more"
    return SourceError(f"{found} where {expected} are expected", where=f"{source.path}, {source.layer}", fix=fix)


def _counts_elsewhere(source: Source) -> list[str]:
    """The other matrices of a file whose first rows hold counts, the likeliest first."""
    found = []
    for layer in sorted(source.other_matrices(), key=lambda name: (name != RAW, "count" not in name, name != X, name)):
        try:
            with open_source(source.path, layer=layer, kind=source.kind) as other:
                values = other.probe()
        except SourceError:   # a matrix that cannot be read is no better
            continue
        if len(values) and are_counts(values):
            found.append(layer)
    return found
