"""A flat Zarr array, read by inner chunks: neighbours together, a bounded number of decoded ones kept."""
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scgpt.data.recently_used import RecentlyUsed
from scgpt.data.schema import offsets_of
from scgpt.errors import DataError, ScgptError

CACHE_BYTES = 64 << 20      # of decoded chunks, for each array of an opened split
_GROUP_BYTES = 32 << 20     # of chunks worked on at once
_RUN_CHUNKS = 64            # neighbouring chunks that are read as one


class ChunkedArray:
    """An open Zarr array of one dimension; of its decoded chunks CACHE_BYTES are kept."""

    def __init__(self, array: Any, pool: ThreadPoolExecutor | None, where: str) -> None:
        self._array, self._pool, self._where = array, pool, where
        self._items = int(array.chunks[0])
        self._kept: RecentlyUsed[NDArray[Any]] = RecentlyUsed(CACHE_BYTES)

    def take(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[Any]:
        """The items [starts[i], starts[i] + lengths[i]), one after the other; memory: they and _GROUP_BYTES."""
        from scgpt.data import gather

        out = np.empty(int(lengths.sum()), self._array.dtype)
        chunks, firsts, counts, places = self._segments(starts, lengths)
        numbers, which = np.unique(chunks, return_inverse=True)
        step = max(_GROUP_BYTES // (self._items * out.itemsize), 1)
        for begin in range(0, len(numbers), step):
            held = self._load(numbers[begin:begin + step])
            chosen = np.flatnonzero((which >= begin) & (which < begin + step))
            addresses = np.array([chunk.ctypes.data for chunk in held], np.uint64)
            gather.segments(addresses, which[chosen] - begin, firsts[chosen], counts[chosen], places[chosen], out)
        return out

    def _segments(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Cut ranges at the borders of chunks: (segments,) chunk, first item in it, items, place in the result."""
        places = offsets_of(lengths)[:-1][lengths > 0]
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        first = starts // self._items
        n_chunks = (starts + lengths - 1) // self._items - first + 1
        owner = np.repeat(np.arange(len(starts)), n_chunks)
        chunks = first[owner] + np.arange(len(owner)) - offsets_of(n_chunks)[:-1][owner]
        begin = np.maximum(starts[owner], chunks * self._items)
        end = np.minimum(starts[owner] + lengths[owner], (chunks + 1) * self._items)
        return chunks, begin - chunks * self._items, end - begin, places[owner] + begin - starts[owner]

    def _load(self, numbers: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Decoded chunks: kept ones, or read now, neighbours together."""
        held = self._kept.find(numbers.tolist())
        missing = np.array([number for number in numbers.tolist() if number not in held], np.int64)
        if len(missing):
            runs = [run for whole in np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1)
                    for run in np.split(whole, range(_RUN_CHUNKS, len(whole), _RUN_CHUNKS))]
            for run, items in zip(runs, map(self._read, runs) if self._pool is None else
                                  self._pool.map(self._read, runs), strict=True):
                for place, number in enumerate(run.tolist()):
                    chunk = items[place * self._items:(place + 1) * self._items].copy()
                    held[number] = chunk
                    self._kept.keep(number, chunk, chunk.nbytes)
        return [held[number] for number in numbers.tolist()]

    def _read(self, run: NDArray[np.int64]) -> NDArray[Any]:
        try:
            found: NDArray[Any] = np.asarray(self._array[int(run[0]) * self._items:(int(run[-1]) + 1) * self._items])
            return found
        except Exception as error:   # zarr, its codecs and its stores raise whatever they like
            raise unreadable(self._where, error) from error


def unreadable(where: str, error: Exception) -> ScgptError:
    """What zarr, its codecs and its stores raise, as one sentence."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(f"the Zarr store cannot be read: {reason}", where=where,
                     fix="find the damaged file with: scgpt data verify")
