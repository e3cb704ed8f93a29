"""Record batches read when they are asked for: compressed shards, and shards behind a URL, which cannot be mapped.

The manifest says where each batch begins. List boundaries, which open a batch, are read alone and kept (4 bytes a
cell). Of an uncompressed batch that few cells are wanted from, only the bytes of those cells are read; any other batch
is read whole, decoded and kept for a while, in bounded memory. Reading cells in any order is therefore possible, but a
compressed batch costs its whole decoding: such a corpus is for cold storage, or for reading in order.
"""
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scgpt.data.arrow_format import address, value_types
from scgpt.data.corpus_files import RESTORE, CorpusFiles
from scgpt.data.ipc_message import Codec, read_metadata
from scgpt.data.manifest import ShardEntry, check_sizes
from scgpt.data.recently_used import RecentlyUsed
from scgpt.data.schema import CELL_ID, EXPRESSIONS, GENES, CellViews, RaggedBatch, offsets_of
from scgpt.errors import DataError

CACHE_BYTES = 256 << 20    # of decoded batches, for each opened split
_GROUP_BYTES = 64 << 20    # of batches worked on at once
_METADATA_BYTES = 1024     # at most, before the body of a batch: our schema needs some 350
_WHOLE_SHARE = 16          # an uncompressed batch is read whole when one cell of so many is wanted


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A decoded batch, with the addresses of its buffers."""

    batch: pa.RecordBatch      # keeps the memory alive
    genes: int
    expressions: int
    offsets: int
    ids: int


@dataclass(frozen=True, slots=True)
class _Head:
    """What opens a record batch: where its buffers lie in the file, and its list boundaries."""

    codec: Codec | None
    starts: tuple[int, int, int]   # byte of the file where genes, expressions and cell ids begin (or their frames)
    offsets: NDArray[np.int32]     # (cells + 1,)


class BatchShards:
    """The shards of a split, read by record batch.

    Args:
        files: of the corpus.
        shards: token files of the split, in order.

    Raises DataError for a missing or shortened shard, or one that is no token file.
    """

    def __init__(self, files: CorpusFiles, shards: Sequence[ShardEntry]) -> None:
        check_sizes(files, shards)
        shards = [shard for shard in shards if shard.batches]
        self._files = files
        self._names = [shard.file for shard in shards for _ in shard.batches]
        self._starts = np.array([batch.offset for shard in shards for batch in shard.batches], np.int64)
        self._stops = np.array([stop for shard in shards for stop in
                                (*(batch.offset for batch in shard.batches[1:]), shard.bytes)], np.int64)
        self._cells = np.array([batch.cells for shard in shards for batch in shard.batches], np.int64)
        self._first_cells = offsets_of(self._cells)
        schemas = self._read_schemas(shards)
        self._schema = schemas[0]
        self.gene_type, self.expression_type = value_types(schemas, files)
        self._offsets: dict[int, NDArray[np.int32]] = {}   # list boundaries of the batches seen so far
        self._offset_addresses = np.zeros(len(self._cells), np.uint64)
        self._n_values = np.zeros(len(self._cells), np.int64)
        self._column_starts = np.zeros((3, len(self._cells)), np.int64)   # of genes, expressions, ids in the file
        self._is_plain = np.zeros(len(self._cells), bool)
        self._cache: RecentlyUsed[_Loaded] = RecentlyUsed(CACHE_BYTES)
        self._lock = Lock()

    def lengths(self, cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """Values of the given cells, (cells,); reads the list boundaries of their batches once."""
        batches, rows = self._locate(cells)
        return self._lengths(batches, rows)

    def cell_ids(self, cells: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Ids of the given cells, (cells,); of uncompressed batches their bytes alone are read."""
        from scgpt.data import gather

        batches, rows = self._locate(cells)
        wanted = np.unique(batches)
        self._read_heads(wanted)
        ids = np.empty(len(cells), np.uint64)
        plain = np.flatnonzero(self._is_plain[batches])
        numbers = wanted[self._is_plain[wanted]]
        starts = self._column_starts[2, numbers]
        column = np.frombuffer(b"".join(self._read(numbers, starts, starts + 8 * self._cells[numbers])), np.uint64)
        first = offsets_of(self._cells[numbers])[np.searchsorted(numbers, batches[plain])]
        ids[plain] = column[first + rows[plain]]
        for group in self._groups(wanted[~self._is_plain[wanted]]):
            chosen = np.flatnonzero(np.isin(batches, group))
            loaded = self._load(group)
            some = np.empty(len(chosen), np.uint64)
            gather.items(np.array([one.ids for one in loaded], np.uint64), np.searchsorted(group, batches[chosen]),
                         rows[chosen], some)
            ids[chosen] = some
        return ids

    def fetch(self, cells: NDArray[np.int64]) -> RaggedBatch:
        """Copy the given cells out, in the given order."""
        batches, rows = self._locate(cells)
        offsets = offsets_of(self._lengths(batches, rows))
        found = RaggedBatch(np.empty(offsets[-1], self.gene_type), np.empty(offsets[-1], self.expression_type), offsets,
                            {CELL_ID: np.empty(len(cells), np.uint64)})
        wanted, counts = np.unique(batches, return_counts=True)
        alone = self._are_sparse(wanted, counts)
        self._copy_cells(found, np.flatnonzero(np.isin(batches, wanted[alone])), batches, rows)
        for group in self._groups(wanted[~alone]):
            self._copy_from(found, group, np.flatnonzero(np.isin(batches, group)), batches, rows)
        return found

    def views(self, cells: NDArray[np.int64]) -> CellViews:
        """The given cells, in the given order, from a copy."""
        return self.fetch(cells).views()

    def _locate(self, cells: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        batches = np.searchsorted(self._first_cells, cells, side="right") - 1
        return batches, cells - self._first_cells[batches]

    def _lengths(self, batches: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        from scgpt.data import gather

        self._read_heads(np.unique(batches))
        lengths = np.empty(len(rows), np.int64)
        gather.lengths(self._offset_addresses, self._n_values, batches, rows, lengths)
        return lengths

    # ---- which batches are read how ----

    def _are_sparse(self, batches: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(batches,) whether only the bytes of the wanted cells are read."""
        cached = np.array([number in self._cache for number in batches.tolist()], bool)
        few: NDArray[np.bool_] = counts * _WHOLE_SHARE < self._cells[batches]
        sparse: NDArray[np.bool_] = few & ~cached & self._is_plain[batches]
        return sparse

    def _groups(self, batches: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Cut batches so that those of a group, decoded, stay near _GROUP_BYTES."""
        sizes = np.array([self._decoded_bytes(number) for number in batches.tolist()], np.int64)
        if len(batches):
            groups = (np.cumsum(sizes) - sizes) // _GROUP_BYTES
            yield from np.split(batches, np.flatnonzero(np.diff(groups)) + 1)

    def _decoded_bytes(self, batch: int) -> int:
        values = int(self._offsets[batch][-1])
        return values * (self.gene_type.itemsize + self.expression_type.itemsize) + 16 * int(self._cells[batch])

    def _copy_from(self, found: RaggedBatch, group: NDArray[np.int64], chosen: NDArray[np.int64],
                   batches: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Copy the cells `chosen`, which lie in the batches of `group`, to their places."""
        from scgpt.data import gather

        loaded = self._load(group)
        genes, expressions, offsets, ids = (np.array([getattr(one, name) for one in loaded], np.uint64)
                                            for name in ("genes", "expressions", "offsets", "ids"))
        gather.cells(genes, expressions, ids, offsets, np.searchsorted(group, batches[chosen]), rows[chosen], chosen,
                     found.genes, found.expressions, found.offsets, found.columns[CELL_ID])

    def _copy_cells(self, found: RaggedBatch, chosen: NDArray[np.int64], batches: NDArray[np.int64],
                    rows: NDArray[np.int64]) -> None:
        """Read the bytes of the cells `chosen` alone, in the order of the files, and copy them to their places."""
        from scgpt.data import gather

        if not len(chosen):
            return
        chosen = chosen[np.lexsort((rows[chosen], batches[chosen]))]
        numbers, rows = batches[chosen], rows[chosen]
        first, lengths = np.empty(len(chosen), np.int32), found.lengths[chosen]
        gather.items(self._offset_addresses, numbers, rows, first)
        items = np.concatenate([first, first, rows])
        widths = np.repeat([self.gene_type.itemsize, self.expression_type.itemsize, 8], len(chosen))
        starts = self._column_starts[:, numbers].ravel() + items * widths
        stops = starts + np.concatenate([lengths, lengths, np.ones_like(lengths)]) * widths
        pieces = self._files.read_ranges([self._names[number] for number in numbers.tolist()] * 3, starts, stops)
        size, offsets, places = len(chosen), offsets_of(lengths), found.offsets[:-1][chosen]
        for part, out in enumerate((found.genes, found.expressions)):
            values = np.frombuffer(b"".join(pieces[part * size:(part + 1) * size]), out.dtype)
            gather.scatter(values, offsets, places, out)
        found.columns[CELL_ID][chosen] = np.frombuffer(b"".join(pieces[2 * size:]), np.uint64)

    # ---- reading ----

    def _load(self, batches: NDArray[np.int64]) -> list[_Loaded]:
        """Decoded batches: from the cache, or read now and kept in it."""
        held = self._cache.find(batches.tolist())
        missing = np.array([number for number in batches.tolist() if number not in held], np.int64)
        pieces = self._read(missing, self._starts[missing], self._stops[missing])
        for number, piece in zip(missing.tolist(), pieces, strict=True):
            held[number] = self._decode(number, piece)
            self._cache.keep(number, held[number], held[number].batch.nbytes)
        return [held[number] for number in batches.tolist()]

    def _read(self, batches: NDArray[np.int64], starts: NDArray[np.int64], stops: NDArray[np.int64],
              ) -> list[memoryview]:
        return self._files.read_ranges([self._names[number] for number in batches.tolist()], starts, stops)

    def _decode(self, number: int, content: memoryview) -> _Loaded:
        try:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(content)), self._schema)
            batch.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(number) from error
        genes, expressions, ids = (batch.column(name) for name in (GENES, EXPRESSIONS, CELL_ID))
        known = self._offsets[number]   # what was read of the batch before must still hold
        if not np.array_equal(genes.offsets.to_numpy(), known) or not genes.offsets.equals(expressions.offsets):
            raise self._damaged(number)
        return _Loaded(batch, address(genes.values), address(expressions.values), address(genes), address(ids))

    def _read_heads(self, batches: NDArray[np.int64]) -> None:
        """Read the list boundaries of the batches that are not known yet."""
        missing = np.array([number for number in batches.tolist() if number not in self._offsets], np.int64)
        starts = self._starts[missing]
        room = _METADATA_BYTES + 64 + 5 * (self._cells[missing] + 1)   # frames of what cannot be compressed are larger
        for number, piece in zip(missing.tolist(), self._read(missing, starts, np.minimum(
                starts + room, self._stops[missing])), strict=True):
            try:
                head = self._parse(number, piece)
            except (pa.ArrowException, OSError, struct.error, ValueError, IndexError) as error:
                raise self._damaged(number) from error
            with self._lock:
                if number in self._offsets:   # another thread was faster, and may be reading at its address
                    continue
                self._column_starts[:, number], self._is_plain[number] = head.starts, head.codec is None
                self._offset_addresses[number], self._n_values[number] = head.offsets.ctypes.data, head.offsets[-1]
                self._offsets[number] = head.offsets   # last: from here on it is taken as known

    def _parse(self, number: int, content: memoryview) -> _Head:
        n_metadata = struct.unpack_from("<I", content, 4)[0]
        n_cells, codec, buffers = read_metadata(content[8:8 + n_metadata])
        body, end = int(self._starts[number]) + 8 + n_metadata, int(self._stops[number])
        if n_cells != self._cells[number] or buffers.min() < 0 or body + buffers.sum(axis=1).max() > end:
            raise ValueError("the message is of another batch")
        start, size = (int(part) for part in buffers[1])
        frame = content[8 + n_metadata + start:8 + n_metadata + start + size]
        if len(frame) != size:   # another writer's batch, whose boundaries lie elsewhere
            frame = self._files.read_ranges([self._names[number]], np.array([body + start]),
                                            np.array([body + start + size]))[0]
        if codec is not None:
            n_bytes = struct.unpack_from("<q", frame)[0]
            frame = frame[8:] if n_bytes < 0 else memoryview(
                pa.decompress(frame[8:], decompressed_size=4 * (n_cells + 1), codec=codec))
        offsets = np.frombuffer(frame, np.int32, n_cells + 1).copy()
        n_values = int(offsets[-1])
        needed = [(3, n_values * self.gene_type.itemsize), (7, n_values * self.expression_type.itemsize),
                  (9, 8 * n_cells)]
        if (offsets[0] < 0 or (np.diff(offsets) < 0).any()
                or (codec is None and any(buffers[place][1] < n_bytes for place, n_bytes in needed))):
            raise ValueError("the boundaries do not ascend, or the values are too few")
        genes, expressions, ids = (body + int(buffers[place][0]) for place in (3, 7, 9))
        return _Head(codec, (genes, expressions, ids), offsets)

    def _read_schemas(self, shards: Sequence[ShardEntry]) -> list[pa.Schema]:
        stops = np.array([shard.batches[0].offset for shard in shards], np.int64)
        schemas = []
        for shard, piece in zip(shards, self._files.read_ranges([shard.file for shard in shards],
                                                                np.zeros_like(stops), stops), strict=True):
            try:
                schemas.append(pa.ipc.read_schema(pa.py_buffer(piece)))
                for name in (GENES, EXPRESSIONS, CELL_ID):
                    schemas[-1].field(name)
            except (pa.ArrowException, OSError, KeyError) as error:
                raise DataError(f"the shard is no Arrow stream of cells: {error}", where=self._files.where(shard.file),
                                fix=RESTORE) from error
        return schemas

    def _damaged(self, number: int) -> DataError:
        return DataError(f"the record batch at byte {self._starts[number]} is damaged",
                         where=self._files.where(self._names[number]), fix=RESTORE)
