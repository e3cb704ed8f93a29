"""One Arrow shard: write a RaggedBatch as an IPC stream, map it back and copy cells out of the mapping.

The stream form (not the file form) is what Hugging Face `datasets` maps without a copy; its price is the missing
footer, so the manifest keeps where each record batch starts. Cells are gathered by a compiled loop over the mapped
buffers of all shards at once (`gather.py`): rejected were `Table.take` (5-8 times slower) and NumPy slices batch by
batch (a Python call for nearly every cell once a corpus has many batches).
"""
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scgpt.counted import counted
from scgpt.data.corpus_files import RESTORE, CorpusFiles
from scgpt.data.ipc_message import Codec
from scgpt.data.manifest import BatchEntry, ShardEntry, check_sizes
from scgpt.data.read_ahead import ReadAhead, map_for_random_reads
from scgpt.data.schema import CELL_ID, EXPRESSIONS, GENES, CellViews, RaggedBatch, check_types, offsets_of
from scgpt.errors import DataError

MAX_BATCH_VALUES = 1 << 20   # values of a record batch: 4 MiB at 4 bytes a value; one cell may exceed it


def write_shard(path: Path, cells: RaggedBatch, *, max_batch_values: int = MAX_BATCH_VALUES,
                compression: Codec | None = None) -> list[BatchEntry]:
    """Write cells as one Arrow IPC stream; equal cells give equal bytes. The caller publishes the file.

    `compression` packs each buffer of a record batch (cold storage: such a shard is not mapped but decoded).
    Raises DataError when one record batch would need list offsets above 2**31 - 1.
    """
    schema = pa.schema([(GENES, pa.list_(pa.from_numpy_dtype(cells.genes.dtype))),
                        (EXPRESSIONS, pa.list_(pa.from_numpy_dtype(cells.expressions.dtype))),
                        (CELL_ID, pa.uint64())])
    entries, schema_bytes = [], schema.serialize().size   # the writer holds the schema back until the first batch
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema, options=options) as writer:
        for first, last in _batch_bounds(cells.offsets, max_batch_values):
            entries.append(BatchEntry(offset=max(sink.tell(), schema_bytes), first_row=first, cells=last - first))
            writer.write_batch(_record_batch(cells, first, last, schema, path))
    return entries


def _batch_bounds(offsets: NDArray[np.int64], max_values: int) -> list[tuple[int, int]]:
    bounds, first, n_cells = [], 0, len(offsets) - 1
    while first < n_cells:
        last = int(np.searchsorted(offsets, offsets[first] + max_values, side="right")) - 1
        last = min(max(last, first + 1), n_cells)
        bounds.append((first, last))
        first = last
    return bounds


def _record_batch(cells: RaggedBatch, first: int, last: int, schema: pa.Schema, path: Path) -> pa.RecordBatch:
    start, stop = cells.offsets[first], cells.offsets[last]
    if stop - start > np.iinfo(np.int32).max:
        raise DataError(f"{stop - start} values do not fit the 32-bit list offsets of one record batch",
                        where=str(path), fix="lower the number of values of a record batch")
    offsets = pa.array((cells.offsets[first:last + 1] - start).astype(np.int32))
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values[start:stop]), type=field.type)
             for values, field in zip((cells.genes, cells.expressions), schema, strict=False)]
    return pa.record_batch([*lists, pa.array(cells.columns[CELL_ID][first:last])], schema=schema)


def write_obs(path: Path, table: pa.Table) -> None:
    """Write what is known of a shard's cells as Parquet (zstd); equal tables give equal bytes. The caller publishes."""
    pq.write_table(table, path, compression="zstd", version="2.6", write_statistics=False)


@dataclass(frozen=True, slots=True)
class ArrowShards:
    """All shards of a split, mapped: the addresses of each record batch's buffers, and the mappings that own them."""

    gene_type: np.dtype[np.generic]
    expression_type: np.dtype[np.generic]
    first_cells: NDArray[np.int64]   # (batches + 1,)  cells of the split before each record batch
    genes: NDArray[np.uint64]        # (batches,)      address of the values
    expressions: NDArray[np.uint64]  # (batches,)
    offsets: NDArray[np.uint64]      # (batches,)      address of the int32 list offsets, cells + 1 of them
    n_values: NDArray[np.int64]      # (batches,)      values at either address
    ids: NDArray[np.uint64]          # (batches,)      address of the cell ids
    mappings: Sequence[pa.Table]     # keeps the memory alive
    where: str                       # the corpus
    read_ahead: ReadAhead = field(default_factory=ReadAhead)

    def lengths(self, cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """Values of the given cells, (cells,), without reading a value."""
        return self._lengths(cells, *self._locate(cells))

    def cell_ids(self, cells: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Ids of the given cells, (cells,)."""
        from scgpt.data import gather

        ids = np.empty(len(cells), np.uint64)
        gather.items(self.ids, *self._locate(cells), ids)
        return ids

    def fetch(self, cells: NDArray[np.int64]) -> RaggedBatch:
        """Copy the given cells out of the mapping, in the given order."""
        from scgpt.data import gather

        batches, rows = self._locate(cells)
        offsets = offsets_of(self._lengths(cells, batches, rows))
        found = RaggedBatch(np.empty(offsets[-1], self.gene_type), np.empty(offsets[-1], self.expression_type), offsets,
                            {CELL_ID: np.empty(len(cells), np.uint64)})
        self._read_ahead(batches, rows)
        gather.cells(self.genes, self.expressions, self.ids, self.offsets, batches, rows, np.arange(len(cells)),
                     found.genes, found.expressions, offsets, found.columns[CELL_ID])
        return found

    def views(self, cells: NDArray[np.int64]) -> CellViews:
        """The given cells, in the given order, where they are mapped; reads no value."""
        from scgpt.data import gather

        batches, rows = self._locate(cells)
        lengths = self._lengths(cells, batches, rows)
        genes, expressions, ids = np.empty((3, len(cells)), np.uint64)
        gather.locate(self.genes, self.expressions, self.ids, self.offsets, batches, rows,
                      (self.gene_type.itemsize, self.expression_type.itemsize), genes, expressions, ids)
        self._read_ahead(batches, rows)
        return CellViews(genes, expressions, lengths, ids, self.gene_type, self.expression_type, 1 << 32, self.mappings)

    def _read_ahead(self, batches: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        columns = [(self.genes, self.gene_type.itemsize), (self.expressions, self.expression_type.itemsize)]
        self.read_ahead.ask(columns, self.offsets, batches, rows)

    def _lengths(self, cells: NDArray[np.int64], batches: NDArray[np.int64], rows: NDArray[np.int64],
                 ) -> NDArray[np.int64]:
        """Values of cells that are located; DataError where a cell does not lie within its batch."""
        from scgpt.data import gather

        lengths = np.empty(len(cells), np.int64)
        gather.lengths(self.offsets, self.n_values, batches, rows, lengths)
        if lengths.min(initial=0) < 0:
            raise DataError(f"the list boundaries of cell {cells[lengths.argmin()]} are damaged", where=self.where,
                            fix="find the damaged file with: scgpt data verify")
        return lengths

    def _locate(self, cells: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        batches = np.searchsorted(self.first_cells, cells, side="right") - 1
        return batches, cells - self.first_cells[batches]


def map_shards(files: CorpusFiles, shards: Sequence[ShardEntry]) -> ArrowShards:
    """Map the token files of a split; reads headers only, copies nothing.

    Raises DataError for a missing shard, and for one that does not hold what the manifest says (a stream cut between
    two messages would otherwise read as a shorter one).
    """
    check_sizes(files, shards)
    tables = [_map_shard(files.where(shard.file), shard) for shard in shards]
    batches = [batch for table in tables for batch in table.to_batches()]
    if not batches:
        raise DataError("the split holds no cells", where=files.where(), fix="give another split")
    counts = np.array([batch.num_rows for batch in batches], np.int64)
    genes_type, expressions_type = value_types([table.schema for table in tables], files)
    genes, expressions = ([batch.column(name) for batch in batches] for name in (GENES, EXPRESSIONS))

    def addresses(arrays: Sequence[pa.Array]) -> NDArray[np.uint64]:
        return np.array([address(array) for array in arrays], np.uint64)

    n_values = [min(len(lists.values), len(values.values)) for lists, values in zip(genes, expressions, strict=True)]
    return ArrowShards(genes_type, expressions_type, offsets_of(counts),
                       addresses([array.values for array in genes]), addresses([array.values for array in expressions]),
                       addresses(genes), np.array(n_values, np.int64),
                       addresses([batch.column(CELL_ID) for batch in batches]), tables, files.where())


def value_types(schemas: Sequence[pa.Schema], files: CorpusFiles) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Types of genes and expressions, of the format and one for all shards of a split; else DataError."""
    where, fix = files.where(), "build the corpus again"
    types = {tuple(schema.field(name).type for name in (GENES, EXPRESSIONS, CELL_ID)) for schema in schemas}
    *lists, ids = types.pop()
    if types:
        raise DataError("the shards of one split store values in different types", where=where, fix=fix)
    if not all(isinstance(one, pa.ListType) for one in lists) or ids != pa.uint64():
        raise DataError(f"the shards hold cells as {lists[0]}, {lists[1]} and {ids}, not as two lists and uint64",
                        where=where, fix=fix)
    genes, expressions = (np.dtype(one.value_type.to_pandas_dtype()) for one in lists)
    check_types(genes, expressions, where=where, fix=fix)
    return genes, expressions


def _map_shard(path: str, shard: ShardEntry) -> pa.Table:
    try:
        table = pa.ipc.open_stream(map_for_random_reads(path)).read_all()
        table.validate()
        for name in (GENES, EXPRESSIONS, CELL_ID):
            table.schema.field(name)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"the shard cannot be mapped: {error}", where=path, fix=RESTORE) from error
    if table.num_rows != shard.cells:
        raise DataError(f"the shard holds {counted(table.num_rows, 'cell')}, the manifest says {shard.cells}",
                        where=path, fix=RESTORE)
    return table


def address(array: pa.Array) -> int:
    """Where the values of a flat array, or the boundaries of a list array, lie in memory."""
    found = array.buffers()[1]
    return 0 if found is None else int(found.address)   # no buffer: no values
