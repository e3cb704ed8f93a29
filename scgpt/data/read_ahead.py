"""Cells of a mapping that memory does not hold: the kernel is told which pages are needed, and reads those together.

Left alone, each page fault waits for storage by itself and reads around the page: 128 KiB and more, MiB on some
machines, for a cell of 8 KiB. Told that reads are random it reads one page a fault; told beforehand of all cells of a
fetch it reads their pages at once. Where all is in memory that would only cost time, so it is told while pages are
missing.
"""
import ctypes
import mmap
import resource
import threading

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_TOLD_CELLS = 2_048   # after a fetch that found pages missing; then one goes without, to see whether they still are
_CELLS_A_PAGE = 8    # as few missing pages as one in so many cells are not worth asking for all


def map_for_random_reads(path: str) -> pa.NativeFile:
    """Map a file whose pages are read as they are asked for, and nothing around them. Raises OSError."""
    mapped = pa.memory_map(path)
    whole = mapped.read_buffer()
    mapped.seek(0)
    if whole.size:   # a hint: where it is refused, more is read than needed
        ctypes.CDLL(None).madvise(ctypes.c_void_p(whole.address), ctypes.c_size_t(whole.size), mmap.MADV_RANDOM)
    return mapped


class ReadAhead:
    """Tells the kernel of the cells that are read next while reading finds pages missing; of the first ones always."""

    def __init__(self) -> None:
        self._left = _TOLD_CELLS   # threads share it: a lost count costs nothing
        self._thread = threading.local()   # `last`: its missing pages before it read its last cells, and their number

    def ask(self, columns: list[tuple[NDArray[np.uint64], int]], offsets: NDArray[np.uint64],
            batches: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Ask for the values of cells rows[i] of record batches batches[i], which this thread is about to read.

        `columns`: for each, the addresses of its values in every batch and the bytes of a value; `offsets`: the
        addresses of the list boundaries.
        """
        before, n_cells = getattr(self._thread, "last", (0, None))
        if n_cells is not None and _missing_pages() - before > n_cells // _CELLS_A_PAGE:
            self._left = _TOLD_CELLS   # the last cells had many pages that were missing and not asked for
        if self._left > 0:
            from scgpt.data import gather

            self._left -= len(rows)
            stored = np.lexsort((rows, batches))   # neighbours, whatever order they are wanted in, are one range
            for addresses, width in columns:
                gather.will_need(addresses, offsets, batches[stored], rows[stored], width)
        self._thread.last = _missing_pages(), len(rows)


def _missing_pages() -> int:
    """Faults of this thread so far that had to begin a read from storage."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
