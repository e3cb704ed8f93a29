"""A sparse matrix as three arrays of an HDF5 or Zarr group, CSR or CSC: read by slices, and held against itself.

What h5py and zarr read of chunks that nobody has written are zeros: such a file must not become a corpus of zeros.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import h5py
import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.sparse import csr_array

from data_pipeline.sources import elements
from data_pipeline.sources.elements import Element
from data_pipeline.sources.hdf5_chunks import Reader
from data_pipeline.sources.rechunk import Entries
from scgpt.counted import counted

_PIECE_VALUES = 1 << 18   # 2 MiB with their indices: the cache of a core
_PIECE_CHUNKS = 8         # at least, so that few are decoded twice


@dataclass(frozen=True)
class StoredMatrix:
    """CSR: major is rows (cells), minor is columns; CSC: the other way. All methods raise ValueError on misfits."""

    data: Element      # (values,)
    indices: Element   # (values,)     minor of each value
    indptr: Element    # (major + 1,)  where each row (CSC: column) begins
    n_major: int
    n_minor: int
    minor: str         # "column" or "row", for messages

    def check(self) -> None:
        """Look at the types of the arrays, their lengths, and where the first row begins and the last ends."""
        arrays = {"data": self.data, "indices": self.indices, "indptr": self.indptr}
        for key, array in arrays.items():
            if not elements.is_array(array) or len(array.shape) != 1:
                raise ValueError(f"'{key}' is no list of numbers")
            elements.check_numbers(array, kinds="buif" if key == "data" else "ui")
        lengths = {key: int(array.shape[0]) for key, array in arrays.items()}
        if lengths["data"] != lengths["indices"] or lengths["indptr"] != self.n_major + 1:
            raise ValueError(f"a sparse matrix of {counted(self.n_major, 'row')} with {lengths['data']} values, "
                             f"{lengths['indices']} indices and {lengths['indptr']} boundaries")
        if self.n_major and (end := int(self.indptr[-1])) != lengths["data"]:
            raise ValueError(f"{counted(lengths['data'], 'value')} where the boundaries say {end}")
        if self.n_major and (begin := int(self.indptr[0])):
            raise ValueError(f"boundaries that begin at {begin}, not at 0")

    @property
    def bytes_per_value(self) -> int:
        """Bytes of a value and its index in memory; those of CSC are cut into entries of int64 rows, int32 columns."""
        index = 12 if self.minor == "row" else self.indices.dtype.itemsize
        return int(self.data.dtype.itemsize + index)

    @property
    def piece_values(self) -> int | None:
        """See Source, for CSR: in HDF5 few of the chunks are decoded twice; Zarr has too much to do for each read."""
        if not isinstance(self.data, h5py.Dataset):
            return None
        return max(_PIECE_VALUES, *(_PIECE_CHUNKS * int(array.chunks[0]) for array in (self.data, self.indices)
                                    if array.chunks))

    def offsets(self, first: int, last: int) -> NDArray[np.int64]:
        """Where the rows (CSC: columns) first .. last begin, (last - first + 1,)."""
        offsets: NDArray[np.int64] = self.indptr[first:last + 1].astype(np.int64)
        stored = int(self.data.shape[0])
        ascending = len(offsets) == last - first + 1 and not (np.diff(offsets) < 0).any()
        if not ascending or offsets[0] < 0 or offsets[-1] > stored:
            raise ValueError(f"{'row' if self.minor == 'column' else 'column'} boundaries that do not fit the {stored} "
                             "stored values")
        return offsets

    def rows(self, first: int, last: int) -> csr_array:
        """Rows [first, last) of CSR, (last - first, n_minor)."""
        offsets = self.offsets(first, last)
        data, columns = self._entries(int(offsets[0]), int(offsets[-1]), offsets)
        indptr = offsets - offsets[0]
        if indptr[-1] <= np.iinfo(np.int32).max and columns.dtype == np.int32:
            indptr = indptr.astype(np.int32)   # else scipy widens the indices to the type of the boundaries
        return csr_array((data, columns, indptr), shape=(last - first, self.n_minor))

    def slabs(self, n_values: int) -> Iterator[Entries]:
        """(rows, columns, values) of CSC, `n_values` at a time, by column."""
        offsets = self.offsets(0, self.n_major)
        stored = int(self.data.shape[0])
        for start in range(0, stored, n_values):
            stop = min(start + n_values, stored)
            data, rows = self._entries(start, stop, offsets)
            yield rows, np.searchsorted(offsets, np.arange(start, stop), side="right") - 1, data

    @cached_property
    def _readers(self) -> tuple[Reader, Reader]:
        return Reader.of(self.data), Reader.of(self.indices)

    def _entries(self, start: int, stop: int, offsets: NDArray[np.int64],
                 ) -> tuple[NDArray[np.generic], NDArray[np.integer]]:
        """Values [start, stop) and their indices; `offsets` are boundaries that lie among them."""
        data, indices = (reader.read(start, stop) for reader in self._readers)
        bounds = np.clip(offsets - start, 0, stop - start)
        outside, twice = _look_at_indices(indices, bounds, self.n_minor)
        if outside:
            check_indices(indices, self.n_minor, self.minor)
        self._check_written(data, bounds, zero_comes_twice=twice)
        return data, indices

    def _check_written(self, data: NDArray[np.generic], offsets: NDArray[np.int64], *, zero_comes_twice: bool) -> None:
        """Raise ValueError where entries look like chunks that nobody has written, and some are missing.

        Those read as zeros. A stored 0, two entries of a row in column 0, a row longer than there are columns may be in
        a whole file too: only then the chunks are counted. `offsets`: of the rows (CSC: columns) within the entries.
        """
        if len(data) and not data.all() and (missing := elements.missing_chunks(self.data)):
            raise _unwritten(missing, "values")
        if zero_comes_twice and (missing := elements.missing_chunks(self.indices)):
            raise _unwritten(missing, "indices")
        if np.diff(offsets).max(initial=0) > self.n_minor and (missing := elements.missing_chunks(self.indptr)):
            raise _unwritten(missing, "row boundaries")


@njit(cache=True, nogil=True)
def _look_at_indices(indices, offsets, size):  # type: ignore[no-untyped-def]
    """Whether any index is outside [0, size), and whether any row [offsets[i], offsets[i + 1]) has two of 0."""
    outside = False
    for place in range(len(indices)):
        outside |= indices[place] < 0 or indices[place] >= size
    twice = False
    for row in range(len(offsets) - 1):
        zeros = 0
        for place in range(offsets[row], offsets[row + 1]):
            zeros += indices[place] == 0
        twice |= zeros > 1
    return outside, twice


def check_indices(indices: NDArray[np.integer], size: int, what: str) -> None:
    """Raise ValueError for an index of a row or a column that is not there."""
    if len(indices) and (indices.min() < 0 or indices.max() >= size):
        raise ValueError(f"a {what} index outside the {size} {what}s")


def keep_columns(rows: csr_array, places: NDArray[np.integer], n_columns: int) -> csr_array:
    """The same rows with column c moved to places[c], those of -1 left out, (rows, n_columns)."""
    moved = places[rows.indices]
    kept = moved >= 0
    before = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])
    return csr_array((rows.data[kept], moved[kept], before[rows.indptr]), shape=(rows.shape[0], n_columns))


def _unwritten(missing: int, what: str) -> ValueError:
    return ValueError(f"{counted(missing, f'chunk of its {what} is', f'chunks of its {what} are')} missing")
