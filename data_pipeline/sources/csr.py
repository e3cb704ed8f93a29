"""Rows of a sparse matrix that is stored by rows: three arrays of an HDF5 or Zarr group, read by slices."""
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from data_pipeline.sources.hdf5_chunks import read_values


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A CSR matrix on disk. Every method raises ValueError where its parts do not fit together."""

    data: Any          # (values,)    h5py or zarr arrays, as all three
    indices: Any       # (values,)    column of each value
    indptr: Any        # (rows + 1,)  where each row begins
    n_rows: int
    n_columns: int

    def check(self) -> None:
        """Compare the lengths of the arrays and the end of the last row; reads one number."""
        lengths = {key: int(getattr(self, key).shape[0]) for key in ("data", "indices", "indptr")}
        if lengths["data"] != lengths["indices"] or lengths["indptr"] != self.n_rows + 1:
            raise ValueError(f"a sparse matrix of {self.n_rows} rows with {lengths['data']} values, "
                             f"{lengths['indices']} indices and {lengths['indptr']} boundaries")
        if self.n_rows and int(self.indptr[-1]) != lengths["data"]:
            raise ValueError(f"{lengths['data']} values where the boundaries say {int(self.indptr[-1])}")

    def offsets(self, first: int, last: int) -> NDArray[np.int64]:
        """Where the rows first .. last begin, (last - first + 1,)."""
        offsets: NDArray[np.int64] = self.indptr[first:last + 1].astype(np.int64)
        stored = int(self.data.shape[0])
        ascending = len(offsets) == last - first + 1 and not (np.diff(offsets) < 0).any()
        if not ascending or offsets[0] < 0 or offsets[-1] > stored:
            raise ValueError(f"row boundaries that do not fit the {stored} stored values")
        return offsets

    def rows(self, first: int, last: int) -> csr_array:
        """Rows [first, last), (last - first, n_columns)."""
        offsets = self.offsets(first, last)
        first_value, last_value = int(offsets[0]), int(offsets[-1])
        data = read_values(self.data, first_value, last_value)
        columns = read_values(self.indices, first_value, last_value)
        check_indices(columns, self.n_columns, "column")
        return csr_array((data, columns, offsets - offsets[0]), shape=(last - first, self.n_columns))


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
