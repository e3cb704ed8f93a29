"""The Zarr form of a split: one Zarr v3 group of four flat arrays; written shard by shard, read by inner chunk.

    train.zarr/  indptr (cells + 1,) int64   genes, expressions (values,)   cell_id (cells,) uint64

Cell i owns values [indptr[i], indptr[i + 1]). A shard of an array is one file, made whole by one writer and always
with zarr-python's own codecs (the `zarrs` pipeline orders the chunks of a shard differently each time; it only reads).
The cold form stores `genes` as differences within each cell, and everything through Blosc with bitshuffle: LZ4 alone
gains nothing on ids. Reading is by whole inner chunks, for windows of cells; Arrow is the form for random access.
"""
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scgpt.data.corpus_files import RESTORE, CorpusFiles
from scgpt.data.ipc_message import Codec
from scgpt.data.manifest import FileEntry, SplitEntry, check_sizes
from scgpt.data.schema import CELL_ID, EXPRESSIONS, FORMAT, GENES, CellViews, RaggedBatch, check_types, offsets_of
from scgpt.data.shards import Shards, windows
from scgpt.data.zarr_chunks import ChunkedArray, unreadable
from scgpt.errors import DataError, ScgptError
from scgpt.files import sha256, write_bytes

INDPTR = "indptr"
CHUNK_ITEMS = 1 << 16       # values of an inner chunk: what is read at once
_CELLS_SHARE = 8            # chunks of `indptr` and `cell_id` have so many times fewer items: a cell needs one or two
_REMOTE_READS = 16          # at once
_ENCODING = "gene_encoding"   # attribute of the group:
_IDS, _DELTAS = "ids", "deltas within a cell"
# Settings of zarr and of Blosc are the process's, and threads may open and write stores at the same time: one that
# put back what it found in between would leave behind what another had set.
_settings = Lock()
_blosc_before: list[Any] = []   # for each thread that writes now: `use_threads` as it was before the first of them


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """What the store of a split looks like, before anything is written."""

    cells: int
    values: int
    gene_type: np.dtype[Any]
    expression_type: np.dtype[Any]
    compression: Codec | None
    max_bytes: int                # of the genes and expressions that one shard holds, uncompressed
    max_chunk_items: int = field(default_factory=lambda: CHUNK_ITEMS)   # of genes and expressions

    @property
    def arrays(self) -> dict[str, tuple[int, np.dtype[Any]]]:
        """Name -> items, type."""
        return {INDPTR: (self.cells + 1, np.dtype(np.int64)), GENES: (self.values, self.gene_type),
                EXPRESSIONS: (self.values, self.expression_type), CELL_ID: (self.cells, np.dtype(np.uint64))}

    def chunk_items(self, array: str) -> int:
        """Items of an inner chunk."""
        most = self.max_chunk_items if array in (GENES, EXPRESSIONS) else self.max_chunk_items // _CELLS_SHARE
        return max(min(most, self.arrays[array][0]), 1)

    def shard_items(self, array: str) -> int:
        """Items of a shard: whole chunks, at least one, no more than the array needs."""
        item_bytes = (self.gene_type.itemsize + self.expression_type.itemsize if array in (GENES, EXPRESSIONS) else 8)
        chunk = self.chunk_items(array)
        needed = max(-(-self.arrays[array][0] // chunk), 1)
        return min(max(self.max_bytes // item_bytes // chunk, 1), needed) * chunk

    def n_shards(self, array: str) -> int:
        """Shards of an array: numbers 0 to n - 1."""
        return -(-self.arrays[array][0] // self.shard_items(array))

    def bounds(self, array: str, number: int) -> tuple[int, int]:
        """First and last + 1 item of a shard."""
        size = self.shard_items(array)
        return number * size, min((number + 1) * size, self.arrays[array][0])

    def parts(self, array: str, number: int, cells: Sequence[int], values: Sequence[int]) -> range:
        """Which parts of the split, given the cells and values of each, hold the items of a shard; at least one."""
        bounds = offsets_of(np.array(values if array in (GENES, EXPRESSIONS) else cells, np.int64))
        first, last = self.bounds(array, number)
        begin = min(int(np.searchsorted(bounds, first, side="right")) - 1, len(cells) - 1)
        return range(begin, max(int(np.searchsorted(bounds[:-1], last, side="left")), begin + 1))


@dataclass(frozen=True, slots=True)
class Span:
    """Some neighbouring cells of a split, opened, and what comes before them."""

    shards: Shards
    cells: int
    first_cell: int       # cells of the split before them
    first_value: int      # values of the split before them


def shard_file(array: str, number: int) -> str:
    """Name of a shard's file within the store."""
    return f"{array}/c/{number}"


def write_metadata(store: Path, layout: StoreLayout) -> list[Path]:
    """Write what describes the store and its arrays; the files written."""
    zarr = _zarr()
    held: dict[str, Any] = {}
    attributes = {"format": FORMAT, _ENCODING: _IDS if layout.compression is None else _DELTAS}
    zarr.create_group(zarr.storage.MemoryStore(held), zarr_format=3, attributes=attributes)
    for array in layout.arrays:
        _create(held, layout, array)
    written = []
    for name, content in sorted(held.items()):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(store / name, content.to_bytes())
        written.append(store / name)
    return written


def write_shard(store: Path, layout: StoreLayout, array: str, number: int, span: Span) -> Path:
    """Write one shard of an array from the cells of `span`, which must hold all its items; the file written.

    Equal cells and layouts give equal bytes, whichever span they come in. Memory: some three times the shard.
    """
    first, last = layout.bounds(array, number)
    items = _items(layout, array, first, last, span)
    held: dict[str, Any] = {}
    with _single_threaded_blosc():
        _create(held, layout, array)[first:last] = items
    path = store / shard_file(array, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, held[shard_file(array, number)].to_bytes())
    return path


def store_files(corpus: Path, store: str) -> list[FileEntry]:
    """What the manifest says of the files of the finished store in folder `store` of a corpus."""
    found = sorted(path.relative_to(corpus).as_posix() for path in (corpus / store).rglob("*") if path.is_file())
    return [file_entry(corpus, corpus / name) for name in found]


def file_entry(corpus: Path, path: Path) -> FileEntry:
    """What the manifest says of a finished file below `corpus`."""
    return FileEntry(file=path.relative_to(corpus).as_posix(), bytes=path.stat().st_size, sha256=sha256(path))


def _create(held: dict[str, Any], layout: StoreLayout, array: str) -> Any:
    """An array of the store, kept in `held`."""
    zarr = _zarr()
    items, dtype = layout.arrays[array]
    packed = [] if layout.compression is None else [zarr.codecs.BloscCodec(
        typesize=dtype.itemsize, cname=layout.compression, clevel=5, shuffle="bitshuffle")]
    return zarr.create_array(
        zarr.storage.MemoryStore(held), name=array, shape=(items,), chunks=(layout.chunk_items(array),),
        shards=(layout.shard_items(array),), dtype=dtype, compressors=packed, filters=None, fill_value=0,
        zarr_format=3, config={"write_empty_chunks": True})   # a chunk of zeros is data, not absence


def _items(layout: StoreLayout, array: str, first: int, last: int, span: Span) -> NDArray[Any]:
    """Items [first, last) of an array."""
    shards = span.shards
    if array == CELL_ID:
        return shards.cell_ids(np.arange(first - span.first_cell, last - span.first_cell))
    indptr = span.first_value + offsets_of(shards.lengths(np.arange(span.cells)))
    if array == INDPTR:
        return indptr[first - span.first_cell:last - span.first_cell]
    items = np.empty(last - first, layout.arrays[array][1])
    first_cell = int(np.searchsorted(indptr, first, side="right")) - 1
    for start, stop in windows(shards, first_cell, int(np.searchsorted(indptr, last, side="left"))):
        cells = shards.fetch(np.arange(start, stop))
        values = cells.expressions
        if array == GENES:
            values = cells.genes if layout.compression is None else _deltas(cells)
        begin, end = max(int(indptr[start]), first), min(int(indptr[stop]), last)
        items[begin - first:end - first] = values[begin - indptr[start]:end - indptr[start]]
    return items


def _deltas(cells: RaggedBatch) -> NDArray[np.unsignedinteger]:
    """(values,) each id minus the one before it in its cell; the first of a cell stays."""
    deltas = cells.genes.copy()
    deltas[1:] -= cells.genes[:-1]
    starts = cells.offsets[:-1][cells.lengths > 0]
    deltas[starts] = cells.genes[starts]
    return deltas


@contextmanager
def _single_threaded_blosc() -> Iterator[None]:
    """Blosc with threads puts the blocks of a chunk in the order in which they are finished."""
    from numcodecs import blosc

    with _settings:
        _blosc_before.append(_blosc_before[0] if _blosc_before else blosc.use_threads)
        blosc.use_threads = False
    try:
        yield
    finally:
        with _settings:
            before = _blosc_before.pop()
            if not _blosc_before:
                blosc.use_threads = before


# ---- reading ----


class ZarrShards:
    """The store of a split, read by inner chunks, a bounded number of which is kept.

    Raises DataError where a file is missing or shortened, or the store does not hold what the manifest says.
    """

    def __init__(self, files: CorpusFiles, entry: SplitEntry) -> None:
        if entry.store is None:
            raise DataError("the split has no Zarr store", where=files.where(), fix="open its shards")
        check_sizes(files, entry.store.files)
        self._where, self._values = files.where(entry.store.path), entry.tokens
        shapes = {INDPTR: entry.cells + 1, GENES: entry.tokens, EXPRESSIONS: entry.tokens, CELL_ID: entry.cells}
        try:
            arrays, attributes = _open_arrays(files, entry.store.path, shapes)
            self._has_deltas = {_IDS: False, _DELTAS: True}[attributes[_ENCODING]]
            wrong = [name for name, items in shapes.items() if arrays[name].shape != (items,)]
        except (ScgptError, ModuleNotFoundError):
            raise
        except Exception as error:   # zarr says a damaged description in many ways
            raise unreadable(self._where, error) from error
        if wrong:
            raise DataError(f"'{wrong[0]}' has shape {arrays[wrong[0]].shape}, the manifest says {shapes[wrong[0]]}",
                            where=self._where, fix=RESTORE)
        check_types(arrays[GENES].dtype, arrays[EXPRESSIONS].dtype, where=self._where, fix="build the corpus again")
        pool = None if files.folder is not None else ThreadPoolExecutor(_REMOTE_READS, "zarr")
        self._indptr, self._genes, self._expressions, self._ids = (
            ChunkedArray(arrays[name], pool, f"{self._where}/{name}") for name in (INDPTR, GENES, EXPRESSIONS, CELL_ID))

    def lengths(self, cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """Values of the given cells, (cells,), from `indptr` alone."""
        return self._bounds(cells)[1]

    def cell_ids(self, cells: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Ids of the given cells, (cells,)."""
        return self._ids.take(cells, np.ones_like(cells))

    def fetch(self, cells: NDArray[np.int64]) -> RaggedBatch:
        """Copy the given cells out, in the given order."""
        from scgpt.data import gather

        starts, lengths = self._bounds(cells)
        found = RaggedBatch(self._genes.take(starts, lengths), self._expressions.take(starts, lengths),
                            offsets_of(lengths), {CELL_ID: self.cell_ids(cells)})
        if self._has_deltas:
            gather.sum_deltas(found.genes, found.offsets)
        return found

    def views(self, cells: NDArray[np.int64]) -> CellViews:
        """The given cells, in the given order, from a copy."""
        return self.fetch(cells).views()

    def _bounds(self, cells: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First value and number of values of each cell."""
        bounds = self._indptr.take(np.concatenate([cells, cells + 1]), np.ones(2 * len(cells), np.int64))
        starts, stops = bounds[:len(cells)], bounds[len(cells):]
        wrong = np.flatnonzero((starts < 0) | (stops < starts) | (stops > self._values))
        if len(wrong):
            raise DataError(f"the boundaries of cell {cells[wrong[0]]} are damaged", where=self._where,
                            fix="find the damaged file with: scgpt data verify")
        return starts, stops - starts


def _open_arrays(files: CorpusFiles, store: str, names: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of a store and the attributes of its group; through `zarrs` where it is installed and can."""
    zarr = _zarr()
    options = {}
    if files.folder is None:
        opened = zarr.storage.FsspecStore.from_url(files.url(store), read_only=True)
    else:
        opened = zarr.storage.LocalStore(files.folder / store, read_only=True)
        if find_spec("zarrs") is not None and _process_of_zarrs() == os.getpid():
            options = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
    with _settings, zarr.config.set(options):   # an array keeps the pipeline that it was opened with
        group = zarr.open_group(opened, mode="r")
        return {name: group[name] for name in names}, dict(group.attrs)


@functools.cache
def _process_of_zarrs() -> int:
    """The process that loaded zarrs. In one that is forked from it, zarrs would wait for threads that are not there."""
    import zarrs  # noqa: F401 makes its pipeline known

    return os.getpid()


def _zarr() -> Any:
    import zarr
    import zarr.codecs
    import zarr.storage

    return zarr
