"""Values of a gzip-compressed HDF5 array, inflated twice as fast as the HDF5 library does it.

zlib is the largest part of the work on an h5ad file. Here the chunks are taken from the file as they are stored, and
inflated by ISA-L (rejected: libdeflate, a fifth faster still, for its less tended binding). Arrays with any other
filter, chunks that are missing or damaged: h5py reads them, and says what is wrong with them.
"""
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numba import njit
from numpy.typing import NDArray

from data_pipeline.sources.elements import Element

_INFLATED = ([h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE])


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads an array of one dimension. What is known of it is asked for once: h5py takes as long for it as for a chunk.
    """

    array: Element
    dtype: np.dtype[Any]
    n_values: int
    chunk: int       # values of a chunk that ISA-L inflates; 0: h5py or zarr reads the array
    shuffled: bool

    @classmethod
    def of(cls, array: Element) -> "Reader":
        """The reader of an array of h5py or zarr."""
        filters = _filters(array)
        inflates = filters in _INFLATED and array.dtype.kind in "iuf" and array.dtype.isnative
        return cls(array, array.dtype, int(array.shape[0]), int(array.chunks[0]) if inflates else 0, len(filters) == 2)

    def read(self, first: int, last: int) -> NDArray[Any]:
        """`array[first:last]`, (last - first,), in its own type. Raises what h5py or zarr raises."""
        if self.chunk:
            with suppress(OSError, ValueError, RuntimeError):   # a chunk that is missing, or damaged
                return self._inflate(first, min(last, self.n_values))
        values: NDArray[Any] = self.array[first:last]
        return values.astype(values.dtype.newbyteorder("="), copy=False)   # compiled loops know no other order of bytes

    def _inflate(self, first: int, last: int) -> NDArray[Any]:
        from isal import igzip_lib

        values = np.empty(max(last - first, 0), self.dtype)
        size, n_bytes = self.chunk, self.chunk * self.dtype.itemsize
        for start in range(first // size * size, last, size):
            skipped, packed = self.array.id.read_direct_chunk((start,))
            try:
                content = igzip_lib.decompress(packed, flag=igzip_lib.DECOMP_ZLIB, bufsize=n_bytes)
            except igzip_lib.IsalError as error:   # type: ignore[misc]  # a class, whatever its stub says
                raise ValueError("a damaged chunk") from error
            if skipped or len(content) != n_bytes:
                raise ValueError("a chunk that is stored in another way")
            chunk = _unshuffle(content, self.dtype) if self.shuffled else np.frombuffer(content, self.dtype)
            begin, end = max(first - start, 0), min(last - start, size)
            values[start + begin - first:start + end - first] = chunk[begin:end]
        return values


def _filters(array: Element) -> list[int]:
    """HDF5's filters of the chunks of an array of one dimension; none for any other."""
    if not isinstance(array, h5py.Dataset) or array.chunks is None or array.ndim != 1:
        return []
    properties = array.id.get_create_plist()
    return [properties.get_filter(place)[0] for place in range(properties.get_nfilters())]


def _unshuffle(content: bytes, dtype: np.dtype[np.generic]) -> NDArray[Any]:
    """Undo HDF5's shuffle filter: first bytes of all values, then all second bytes, ..."""
    planes = np.frombuffer(content, np.uint8).reshape(dtype.itemsize, -1)
    if dtype.itemsize == 4:
        words: NDArray[np.uint32] = _join_four(planes[0], planes[1], planes[2], planes[3])
        return words.view(dtype)
    return np.ascontiguousarray(planes.T).view(dtype)[:, 0]


@njit(cache=True, nogil=True)
def _join_four(a, b, c, d):  # type: ignore[no-untyped-def]
    """Bytes, lowest first, to words, (values,): what NumPy's transpose does, ten times faster."""
    words = np.empty(len(a), np.uint32)
    for i in range(len(a)):
        words[i] = (np.uint32(a[i]) | np.uint32(b[i]) << np.uint32(8) | np.uint32(c[i]) << np.uint32(16)
                    | np.uint32(d[i]) << np.uint32(24))
    return words
