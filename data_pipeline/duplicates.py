"""Cells of equal content, over all sources: found by hash, a part of all hashes a task.

A block leaves its kept cells in a small file, sorted by their content hash (scgpt/data/content.py). Part k of n looks
at the hashes in [k / n, (k + 1) / n): equal cells always meet in one part, and a part is bounded in memory whatever the
corpus. 64 bits a cell are read first; the rest, the second 64 bits included, only of cells that agree in those.
Price: 41 bytes a cell on disk while the build runs (12 GB for 300 M cells, in 72 parts), 160 MB in a worker.
Of equal cells the first in the order of the sources, then of the rows, is the one that stays.
"""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.cells import SPLITS, TRAIN, VALID
from scgpt.data.schema import CELL_ID, RaggedBatch, offsets_of

PART_CELLS = 1 << 22   # cells of a part, more where very many cells are equal
EQUAL_BYTES = 150      # of memory a cell of a part where all of them equal another (measured: 136); 37 where none does
DUPLICATE = "duplicate"   # the reason under which the ledger counts those that are left out
_HIGH, _LOW, _SPLIT, _SHARD, _VALUES, _SUM = "high", "low", "split", "shard", "values", "sum"
_TYPES = {_HIGH: np.uint64, _LOW: np.uint64, CELL_ID: np.uint64, _SPLIT: np.int8, _SHARD: np.uint32,
          _VALUES: np.uint32, _SUM: np.float64}   # what a block tells of each cell


@dataclass(frozen=True, slots=True)
class HashFile:
    """The hashes of a block."""

    path: Path
    source: int    # its place in the plan


def write_hashes(path: Path, cells: RaggedBatch, chosen: NDArray[np.intp], *, splits: NDArray[np.int8],
                 shards: NDArray[np.int64], sums: NDArray[np.float64],
                 hashes: tuple[NDArray[np.uint64], NDArray[np.uint64]]) -> None:
    """Write what finds equal cells, sorted by hash. The caller publishes the file.

    Args:
        path: an Arrow IPC file of one record batch.
        cells: of a block, with the column cell_id.
        chosen: which of them may be duplicates, (chosen,).
        splits, shards, sums: (cells,) where each goes, and the sum of its values.
        hashes: (cells,) each, see content_hashes.
    """
    high, low = hashes
    order = chosen[np.lexsort((low[chosen], high[chosen]))]
    columns = {_HIGH: high, _LOW: low, CELL_ID: cells.columns[CELL_ID], _SPLIT: splits, _SHARD: shards,
               _VALUES: cells.lengths, _SUM: sums}
    batch = pa.record_batch({name: pa.array(columns[name][order].astype(kind)) for name, kind in _TYPES.items()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def n_parts(n_cells: int) -> int:
    """How many parts the hashes of a corpus are looked at in."""
    return max(-(-n_cells // PART_CELLS), 1)


@dataclass(frozen=True, slots=True)
class Equals:
    """The cells of one part that equal an earlier cell, (equal,) each, sorted by split, shard and cell id."""

    n_cells: int                      # that were looked at
    n_across: int                     # of `valid` whose content is also in `train`
    cell_ids: NDArray[np.uint64]
    sources: NDArray[np.int64]        # places in the plan
    splits: NDArray[np.int8]
    shards: NDArray[np.uint32]
    values: NDArray[np.uint32]
    sums: NDArray[np.float64]


def find_equals(files: Sequence[HashFile], part: int, parts: int) -> Equals:
    """The cells of a part that equal an earlier cell; the order of `files` does not matter."""
    found = [_part_of(file.path, part, parts) for file in files]
    bounds = offsets_of(np.array([len(high) for _, high in found], np.int64))
    high = np.concatenate([high for _, high in found])
    order = np.argsort(high, kind="stable")
    same, is_alike = high[order[1:]] == high[order[:-1]], np.zeros(len(order), bool)
    is_alike[1:] |= same
    is_alike[:-1] |= same
    alike = np.sort(order[is_alike])
    table = _candidates(files, [first for first, _ in found], bounds, alike)
    rows = table[CELL_ID] & np.uint64(0xFFFFFFFF)
    order = np.lexsort((rows, table["source"], table[_LOW], table[_HIGH]))
    table = {name: column[order] for name, column in table.items()}
    starts = np.ones(len(order), bool)
    starts[1:] = (np.diff(table[_HIGH]) != 0) | (np.diff(table[_LOW]) != 0)
    group = np.cumsum(starts) - 1
    in_train = np.bincount(group[table[_SPLIT] == SPLITS.index(TRAIN)], minlength=len(order)) > 0
    n_across = int(in_train[group[table[_SPLIT] == SPLITS.index(VALID)]].sum())
    equal = np.flatnonzero(~starts)
    equal = equal[np.lexsort(tuple(table[name][equal] for name in (CELL_ID, _SHARD, _SPLIT)))]
    return Equals(int(bounds[-1]), n_across, *(table[name][equal] for name in (CELL_ID, "source", _SPLIT, _SHARD,
                                                                               _VALUES, _SUM)))


def _part_of(path: Path, part: int, parts: int) -> tuple[int, NDArray[np.uint64]]:
    """The row where a part begins in a file that is sorted by hash, and the first 64 bits of its hashes."""
    edges = [-(-(number << 64) // parts) for number in (part, part + 1)]
    with _opened(path) as batch:
        high = batch.column(_HIGH).to_numpy()
        first, last = (len(high) if edge >> 64 else int(np.searchsorted(high, np.uint64(edge))) for edge in edges)
        return first, high[first:last].copy()


def _candidates(files: Sequence[HashFile], firsts: Sequence[int], bounds: NDArray[np.int64],
                alike: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """All columns of the chosen cells, (alike,) each, and the place of their source."""
    edges = np.searchsorted(alike, bounds)
    tables = [{name: np.zeros(0, kind) for name, kind in (*_TYPES.items(), ("source", np.int64))}]
    for place, (file, first) in enumerate(zip(files, firsts, strict=True)):
        mine = alike[edges[place]:edges[place + 1]] - bounds[place] + first
        if len(mine):
            with _opened(file.path) as batch:
                found = {name: batch.column(name).to_numpy()[mine] for name in _TYPES}
            tables.append(found | {"source": np.full(len(mine), file.source, np.int64)})
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


@contextmanager
def _opened(path: Path) -> Iterator[pa.RecordBatch]:
    """The one batch of a file, mapped while the block runs: no file stays open, there may be very many of them."""
    with pa.memory_map(str(path)) as source:
        yield pa.ipc.open_file(source).get_batch(0)


def write_equals(path: Path, equals: Equals) -> None:
    """Write where the equal cells of a part lie, for those who leave them out. The caller publishes the file."""
    batch = pa.record_batch({CELL_ID: pa.array(equals.cell_ids), _SPLIT: pa.array(equals.splits),
                             _SHARD: pa.array(equals.shards)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_equals(paths: Sequence[Path], split: int, shard: int) -> NDArray[np.uint64]:
    """The ids of the cells of one shard of the plan that equal an earlier cell, from the files of all parts."""
    found = [np.zeros(0, np.uint64)]
    for path in paths:
        with _opened(path) as batch:
            place = (batch.column(_SPLIT).to_numpy().astype(np.int64) << 32) | batch.column(_SHARD).to_numpy()
            first, last = np.searchsorted(place, [(split << 32) | shard, ((split << 32) | shard) + 1])
            found.append(batch.column(CELL_ID).to_numpy()[first:last].copy())
    return np.concatenate(found)


def summary(equals: Equals, names: Sequence[str]) -> dict[str, Any]:
    """The record of a part: what the ledger and the shards lose where equal cells are left out.

    Args:
        equals: of the part.
        names: of the sources of the plan.

    Returns cells, equal, across, sources {name: {cells {split: n}, values, sum}} and shards [[split, shard, cells]].
    """
    sources = {}
    for place in np.unique(equals.sources).tolist():
        mine = equals.sources == place
        sources[names[place]] = {
            "cells": {split: int((equals.splits[mine] == number).sum()) for number, split in enumerate(SPLITS)},
            "values": int(equals.values[mine].sum()), "sum": float(equals.sums[mine].sum())}
    places = np.stack([equals.splits.astype(np.int64), equals.shards.astype(np.int64)], axis=1)
    shards, counts = np.unique(places, axis=0, return_counts=True)
    return {"cells": equals.n_cells, "equal": len(equals.cell_ids), "across": equals.n_across, "sources": sources,
            "shards": [[*place, cells] for place, cells in zip(shards.tolist(), counts.tolist(), strict=True)]}
