"""Where a cell goes, and how cells get there: runs sorted by shard, then one merge a shard.

All cells have a place in one global order that is cut into shards. Shuffled, the order is that of 64 random bits a
cell, keyed by (seed, cell_id): no table, no memory, the same whichever worker asks. Shard k of n holds the cells whose
bits lie in [k / n, (k + 1) / n), so that reading shards in order is reading one shuffled corpus. Unshuffled, the order
is that of the sources, cut by the stored values that come before. Cells filtered later only make shards smaller: a
place is never given to another cell.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit
from numpy.typing import NDArray

from scgpt import rng
from scgpt.counted import counted
from scgpt.data.content import content_hashes
from scgpt.data.schema import (
    CELL_ID,
    CONTENT_HASH,
    EXPRESSIONS,
    GENES,
    SOURCE,
    SOURCE_ROW,
    RaggedBatch,
    expression_dtype,
    offsets_of,
)
from scgpt.errors import DataError

KEY = "key"   # uint64: the place of a cell in the global order
_KNOWN = (CELL_ID, SOURCE_ROW, CONTENT_HASH, KEY)   # what a run tells of each cell beside its metadata
_NONE = np.zeros(0, np.uint64)


@dataclass(frozen=True, slots=True)
class RunPart:
    """The cells of one run that go to one shard: record batch `batch` of the run's file."""

    batch: int
    split: int     # place in cells.SPLITS
    bucket: int    # shard of the plan within the split
    cells: int
    values: int


@njit(cache=True, nogil=True)
def shuffle_keys(seed: int, cell_ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 random bits a cell, (cells,): its place in the shuffled order."""
    keys = np.empty(len(cell_ids), np.uint64)
    for cell in range(len(cell_ids)):
        keys[cell] = rng.bits(rng.stream(seed, 0, cell_ids[cell], rng.PURPOSE_SHUFFLE), 0)
    return keys


def shuffled_buckets(keys: NDArray[np.uint64], n_shards: NDArray[np.int64]) -> NDArray[np.int64]:
    """The shard of each cell, (cells,): its key's place in [0, 2**64), cut into `n_shards`, (cells,), equal parts."""
    unit = (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (unit * n_shards).astype(np.int64)


def ordered_buckets(values_before: NDArray[np.int64], n_values: int, n_shards: NDArray[np.int64]) -> NDArray[np.int64]:
    """The shard of each cell, (cells,), in the order of the sources: equal parts of all `n_values` stored values."""
    unit = values_before / max(n_values, 1)
    return np.minimum((unit * n_shards).astype(np.int64), n_shards - 1)


def write_run(path: Path, cells: RaggedBatch, metadata: Mapping[str, pa.Array], *, kept: NDArray[np.bool_],
              splits: NDArray[np.int8], buckets: NDArray[np.int64]) -> list[RunPart]:
    """Write cells of one block, sorted by split, shard and key, as an Arrow IPC file: a record batch a shard.

    Args:
        path: a temporary name; the caller publishes the file.
        cells: with the columns of _KNOWN.
        metadata: column -> dictionary<string> array, (cells,).
        kept: (cells,) which of them are written.
        splits, buckets: (cells,) where each goes.
    """
    chosen = np.flatnonzero(kept)
    order = chosen[np.lexsort((cells.columns[KEY][chosen], buckets[chosen], splits[chosen]))]
    narrow = expression_dtype(integer=cells.expressions.dtype.kind == "u", largest=cells.expressions.max(initial=0))
    cells, splits, buckets = _ordered([cells], order, narrow), splits[order], buckets[order]
    moved = {name: column.take(pa.array(order)) for name, column in metadata.items()}
    edges = np.flatnonzero((np.diff(splits) != 0) | (np.diff(buckets) != 0)) + 1
    bounds = [0, *edges.tolist(), len(cells)] if len(cells) else [0]
    offsets = pa.array(cells.offsets)
    table = pa.table({
        GENES: pa.LargeListArray.from_arrays(offsets, pa.array(cells.genes)),
        EXPRESSIONS: pa.LargeListArray.from_arrays(offsets, pa.array(cells.expressions)),
        **{name: pa.array(cells.columns[name]) for name in _KNOWN}, **moved})
    parts: list[RunPart] = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for first, last in pairwise(bounds):
            writer.write_batch(table.slice(first, last - first).to_batches()[0])
            parts.append(RunPart(len(parts), int(splits[first]), int(buckets[first]), last - first,
                                 int(cells.offsets[last] - cells.offsets[first])))
    return parts


def merge_runs(runs: Sequence[tuple[Path, int, str]], expression_type: np.dtype[np.generic],
               columns: Sequence[str], left_out: NDArray[np.uint64] = _NONE) -> tuple[RaggedBatch, pa.Table]:
    """Gather one shard from the runs that hold a part of it, in the global order.

    Args:
        runs: (file, record batch, name of the source) of each part; at least one.
        expression_type: of the corpus.
        columns: metadata to keep.
        left_out: ids of cells of these parts that are not written.

    Returns the cells, and what is known of them: cell_id, source, source_row, content_hash and `columns` as
    dictionary<string> with sorted dictionaries. Memory: the shard, beside the mapped runs.
    Raises DataError when a cell comes twice, or one that is to be left out never.
    """
    batches = [pa.ipc.open_file(pa.memory_map(str(path))).get_batch(number) for path, number, _ in runs]
    found = [_ragged(batch) for batch in batches]
    keys, cell_ids = (np.concatenate([part.columns[name] for part in found]) for name in (KEY, CELL_ID))
    order = np.lexsort((cell_ids, keys))
    ids = cell_ids[order]
    same = np.flatnonzero(ids[1:] == ids[:-1])
    if len(same):
        raise DataError(f"cell {ids[same[0]]} was written twice", where=str(runs[0][0]), fix="build with --fresh")
    if len(left_out):
        stays = ~np.isin(ids, left_out)
        order, ids = order[stays], ids[stays]
        if len(ids) + len(left_out) != len(stays):
            raise DataError(f"{counted(len(left_out), 'cell')} to be left out, of which are there: {(~stays).sum()}",
                            where=str(runs[0][0]), fix="build with --fresh")
    sources = pa.DictionaryArray.from_arrays(
        np.repeat(np.arange(len(runs), dtype=np.int32), [batch.num_rows for batch in batches]),
        pa.array([source for *_, source in runs], pa.string()))
    cells = _ordered(found, order, expression_type)
    known = {CELL_ID: pa.array(ids), SOURCE: sorted_dictionary(sources.take(pa.array(order))),
             SOURCE_ROW: pa.array(cells.columns[SOURCE_ROW]),
             CONTENT_HASH: pa.array(_hashes_as_stored(cells, [part.expressions.dtype for part in found]))}
    for name in columns:
        values = pa.concat_arrays([batch.column(name).cast(pa.string()) for batch in batches])
        known[name] = sorted_dictionary(values.take(pa.array(order)))
    return cells, pa.table(known)


def _hashes_as_stored(cells: RaggedBatch, types_found: Sequence[np.dtype[np.generic]]) -> NDArray[np.uint64]:
    """The content hash of each cell: that of its run, but where integers became float32 and may have been rounded."""
    if cells.expressions.dtype.kind == "f" and any(kind.kind == "u" for kind in types_found):
        return content_hashes(cells)[0]
    return cells.columns[CONTENT_HASH].astype(np.uint64, copy=False)


def sorted_dictionary(values: pa.Array) -> pa.DictionaryArray:
    """Text as dictionary<int32, string>: the values that occur, sorted, so that equal columns have equal bytes."""
    words = values.cast(pa.string())
    categories = pa.array(sorted(words.unique().drop_null().to_pylist()), pa.string())
    return pa.DictionaryArray.from_arrays(pc.index_in(words, categories), categories)


def _ragged(batch: pa.RecordBatch) -> RaggedBatch:
    """The cells of a mapped record batch, not copied."""
    offsets = batch.column(GENES).offsets.to_numpy()
    values = slice(offsets[0], offsets[-1])
    genes, expressions = (batch.column(name).values.to_numpy()[values] for name in (GENES, EXPRESSIONS))
    return RaggedBatch(genes, expressions, offsets - offsets[0],
                       {name: batch.column(name).to_numpy() for name in _KNOWN})


def _ordered(parts: Sequence[RaggedBatch], order: NDArray[np.int64],
             expression_type: np.dtype[np.generic]) -> RaggedBatch:
    """Cells `order` of the joined parts, in that order: each value is copied once, from its part to its place."""
    bounds = offsets_of(np.array([len(part) for part in parts]))
    lengths = np.concatenate([part.lengths for part in parts])
    offsets = offsets_of(lengths[order])
    places = np.full(len(lengths), -1, np.int64)
    places[order] = offsets[:-1]
    genes = np.empty(offsets[-1], parts[0].genes.dtype)
    expressions = np.empty(offsets[-1], expression_type)
    for part, first in zip(parts, bounds[:-1], strict=True):
        mine = places[first:first + len(part)]
        _scatter(part.genes, part.offsets, mine, genes)
        _scatter(part.expressions, part.offsets, mine, expressions)
    columns = {name: np.concatenate([part.columns[name] for part in parts])[order] for name in parts[0].columns}
    return RaggedBatch(genes, expressions, offsets, columns)


@njit(cache=True, nogil=True)
def _scatter(values, offsets, places, out):  # type: ignore[no-untyped-def]
    """Copy the values of each cell to its place in `out`; a place below 0 leaves the cell out."""
    for cell in range(len(places)):
        place, first, last = places[cell], offsets[cell], offsets[cell + 1]
        if place >= 0:
            out[place:place + last - first] = values[first:last]
