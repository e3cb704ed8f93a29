"""One block of rows -> one RaggedBatch: columns become token ids, zeros go, genes are sorted, duplicates summed.

A cell is scattered into an array with one place a token, and a bit set for each token that it has; reading the bits in
order gives the cell sorted and free of duplicates: O(values + tokens / 64) a cell, where sorting would be
O(values log values). What a cell was before (all its columns) stays beside it as numbers, for filters and the ledger.
"""
import numpy as np
from numba import njit
from numpy.typing import NDArray

from data_pipeline.genes import GeneMap
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
from scgpt.data.schema import CELL_ID, SOURCE_ROW, RaggedBatch, cell_ids, gene_dtype, offsets_of
from scgpt.errors import SourceError

# Per cell, over all genes of the source: what came in. (cells,) int64 and float64
VALUES_IN, SUM_IN = "values_in", "sum_in"              # non-zero values and their sum
SUM_MITO, SUM_UNMAPPED = "sum_mito", "sum_unmapped"    # sums over mitochondrial genes and over genes without a token

_DONE, _TOO_WIDE = -1, -2   # what the loop says where no value is at fault
_WIDE = 2.0**32             # the first integer that uint32 does not hold
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)   # each 6-bit window occurs once: finds the place of a lone bit
_PLACES = np.zeros(64, np.int64)
for _place in range(64):
    _PLACES[(((1 << _place) * int(_DE_BRUIJN)) & (2**64 - 1)) >> 58] = _place


def tokenize_block(source: Source, gene_map: GeneMap, first: int, last: int, *, counts: bool = True) -> RaggedBatch:
    """Rows [first, last) of a source as stored cells, unfiltered, in their order.

    Args:
        source: an open source.
        gene_map: of the same source (`map_source`).
        first, last: the rows.
        counts: refuse values that are not integers.

    Returns a batch whose `expressions` are uint32 where all values are integers that fit, else float32, and whose
    columns are cell_id, source_row, VALUES_IN, SUM_IN, SUM_MITO and SUM_UNMAPPED.
    Raises SourceError naming the row for values that are negative, NaN, above MAX_VALUE or (`counts`) not integers.
    """
    rows = source.read_rows(first, last)
    if rows.shape[1] != len(gene_map.tokens):   # a gene table beside the source: no check of the source itself sees it
        raise SourceError(f"it has {rows.shape[1]} genes, {len(gene_map.tokens)} when the corpus was planned",
                          where=str(source.path), fix="start the build again once nothing writes to it")
    data = rows.data if rows.data.dtype in (np.float32, np.float64) else rows.data.astype(np.float64)
    indptr, columns = rows.indptr.astype(np.int64), rows.indices.astype(np.int32, copy=False)
    n_cells = last - first
    genes = np.empty(len(data), gene_dtype(gene_map.n_tokens))
    lengths, values_in = np.empty(n_cells, np.int64), np.empty(n_cells, np.int64)
    sums = np.empty((n_cells, 3))
    for kind in (np.uint32, np.float32):
        expressions = np.empty(len(data), kind)
        fault = _tokenize(data, columns, indptr, gene_map.tokens, gene_map.mitochondrial, gene_map.n_tokens, counts,
                          kind is np.uint32, genes, expressions, lengths, values_in, sums)
        if fault >= 0:
            raise _bad_value(source, first, indptr, data, int(fault), counts=counts)
        if fault == _DONE:
            break
    offsets = offsets_of(lengths)
    genes, expressions = genes[:offsets[-1]], expressions[:offsets[-1]]
    source_rows = np.arange(first, last, dtype=np.int64)
    return RaggedBatch(genes, expressions, offsets, {
        CELL_ID: cell_ids(source.name, source_rows), SOURCE_ROW: source_rows, VALUES_IN: values_in,
        SUM_IN: sums[:, 0], SUM_MITO: sums[:, 1], SUM_UNMAPPED: sums[:, 2]})


@njit(cache=True, nogil=True)
def _tokenize(data, columns, indptr, tokens, mitochondrial, n_tokens, counts, fit,  # type: ignore[no-untyped-def]
              genes, expressions, lengths, values_in, sums):
    """Fill the outputs cell by cell.

    Returns the place of the first value that is not allowed, or _DONE; with `fit`, _TOO_WIDE at the first that
    `expressions`, then of uint32, cannot hold.
    """
    held = np.zeros(n_tokens, np.float64)
    present = np.zeros((n_tokens + 63) // 64, np.uint64)
    one = np.uint64(1)
    end = 0
    for cell in range(len(indptr) - 1):
        n_values, total, mito, unmapped = 0, 0.0, 0.0, 0.0
        for place in range(indptr[cell], indptr[cell + 1]):
            value = np.float64(data[place])
            if value == 0.0:
                continue
            if not (value > 0.0 and value <= MAX_VALUE) or (counts and value != np.floor(value)):
                return place
            n_values += 1
            total += value
            column = columns[place]
            if mitochondrial[column]:
                mito += value
            token = tokens[column]
            if token < 0:
                unmapped += value
                continue
            held[token] += value
            present[token >> 6] |= one << np.uint64(token & 63)
        start = end
        for word in range(len(present)):
            bits = present[word]
            present[word] = 0
            while bits:
                lone = bits & (~bits + one)
                token = word * 64 + _PLACES[(lone * _DE_BRUIJN) >> np.uint64(58)]
                value = held[token]
                if fit and not (value < _WIDE and value == np.floor(value)):
                    return _TOO_WIDE
                genes[end], expressions[end] = token, value
                held[token] = 0.0
                end += 1
                bits ^= lone
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
