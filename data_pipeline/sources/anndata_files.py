"""AnnData files: `.h5ad` read straight through h5py by row blocks, never as a whole.

CSR rows are two contiguous slices. Dense rows are a slice whose zeros are dropped. CSC keeps the values of a row all
over the file: they are cut into row blocks once (rechunk.py), or, for one block, gathered in one scan of the matrix.
"""
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array
from typing_extensions import override

from data_pipeline.sources import elements
from data_pipeline.sources.base import AUTO, INDEX, PROBE_VALUES, RAW, Source, X, are_counts
from data_pipeline.sources.location import Location
from data_pipeline.sources.rechunk import Entries, cut_by_rows, read_block, to_csr
from scgpt.errors import ConfigError, SourceError

SCAN_VALUES = 1 << 22   # stored values of a CSC matrix in memory at once while a block is gathered
_RESTORE = "restore or replace the file, or take it out of `sources`"
# what h5py raises, by the depth at which a damaged file is noticed
_H5_ERRORS = (OSError, LookupError, ValueError, TypeError, RuntimeError, AttributeError, ArithmeticError, MemoryError)


class AnnDataFile(Source):
    """An h5ad file with one of its matrices (X, raw/X or a layer) in use."""

    def __init__(self, file: h5py.File, path: Location, name: str, layer: str) -> None:
        self.file, self.path, self.name, self.layer = file, path, name, layer
        self._row_blocks: Path | None = None
        with self._reading("header"):
            if layer == RAW:
                key = "raw.X" if "raw.X" in file else "raw/X"
                self._var = file["raw.var" if "raw.X" in file else "raw/var"]
            else:
                key = X if layer == X else f"layers/{layer}"
                self._var = file["var"]
            self._obs = file["obs"]
            self.matrix = file[key]
            self.format = elements.sparse_format(self.matrix)
            self.n_cells, self.n_genes = elements.matrix_shape(self.matrix)
            self._check_shape()

    @classmethod
    def open(cls, path: Location, *, name: str, layer: str = AUTO) -> "AnnDataFile":
        """Open a file and choose its matrix; see `open_source`."""
        import hdf5plugin  # noqa: F401  registers the filters (zstd, blosc, ...) that files may use

        try:
            file = h5py.File(path.path, "r")
        except OSError as error:
            what = f"a damaged HDF5 file: {_cause(error)}" if h5py.is_hdf5(path.path) else "not an HDF5 file"
            raise SourceError(what, where=str(path), fix=f"give an .h5ad file; {_RESTORE}") from error
        try:
            with _reading(path, "header"):
                return cls._choose(file, path, name, layer)
        except BaseException:
            file.close()
            raise

    @classmethod
    def _choose(cls, file: h5py.File, path: Location, name: str, layer: str) -> "AnnDataFile":
        if not {"obs", "var"} <= set(file) or not (X in file or "layers" in file):
            raise SourceError(f"HDF5, but not AnnData: it holds {', '.join(sorted(file)[:8]) or 'nothing'}",
                              where=str(path), fix="give a file that anndata has written (X, obs, var)")
        present = _matrices(file)
        if layer != AUTO and layer not in present:
            raise ConfigError(f"there is no layer '{layer}'", where=str(path),
                              fix=f"choose one of: {', '.join(present)}")
        if layer != AUTO:
            return cls(file, path, name, layer)
        if not present:
            raise SourceError("it holds no matrix: no X, raw or layer", where=str(path),
                              fix="give a file with the expression matrix in X")
        if not {X, RAW} & set(present):
            raise ConfigError("there is neither X nor raw", where=str(path),
                              fix=f"choose layer: {' or '.join(present)}")
        candidates = [cls(file, path, name, key) for key in (X, RAW) if key in present]
        return next((source for source in candidates if are_counts(source.probe())), candidates[0])

    @override
    def close(self) -> None:
        self.file.close()

    @override
    def other_matrices(self) -> list[str]:
        return [key for key in _matrices(self.file) if key != self.layer]

    @override
    def gene_columns(self) -> list[str]:
        with self._reading("var"):
            return [INDEX, *(name for name in elements.column_names(self._var) if elements.is_text(self._var, name))]

    @override
    def gene_names(self, column: str = INDEX) -> list[str]:
        if column not in (columns := self.gene_columns()):
            raise ConfigError(f"there is no gene column '{column}'", where=str(self.path),
                              fix=f"choose one of: {', '.join(columns)}")
        with self._reading(f"var, {column}"):
            key = elements.index_name(self._var) if column == INDEX else column
            names = elements.read_column(self._var, key, 0, self.n_genes).cast(pa.string()).to_pylist()
        return [name or "" for name in names]

    @override
    def obs_columns(self) -> list[str]:
        with self._reading("obs"):
            return elements.column_names(self._obs)

    @override
    def obs(self, columns: Sequence[str], first: int = 0, last: int | None = None) -> dict[str, pa.Array]:
        last = self.n_cells if last is None else last
        found = {}
        for name in columns:
            with self._reading(f"obs, {name}"):
                length = elements.column_length(self._obs, name)
                if length != self.n_cells:
                    raise ValueError(f"{length} values for {self.n_cells} cells")
                found[name] = elements.read_column(self._obs, name, first, last)
        return found

    @override
    def value_offsets(self, first: int, last: int) -> NDArray[np.int64]:
        if self.format == "csr":
            return self._indptr(first, last)
        rows = np.arange(first, last + 1, dtype=np.int64)
        if self.format == "dense":
            return rows * self.n_genes
        n_values = int(self.matrix["data"].shape[0])
        return (rows * n_values) // max(self.n_cells, 1)

    @override
    def bytes_per_value(self) -> int:
        if self.format == "dense":
            return int(self.matrix.dtype.itemsize) + 8
        return int(self.matrix["data"].dtype.itemsize + self.matrix["indices"].dtype.itemsize)

    @override
    def stored_share(self) -> float:
        if self.format != "dense" or not self.n_cells or not self.n_genes:
            return 1.0
        rows = min(self.n_cells, max(PROBE_VALUES // self.n_genes, 1))
        return float(self.read_rows(0, rows).nnz / (rows * self.n_genes))

    @override
    def read_rows(self, first: int, last: int) -> csr_array:
        with self._reading(f"{self.layer}, rows {first} to {last}"):
            if self.format == "csr":
                return self._csr_rows(first, last)
            if self.format == "csc":
                return self._csc_rows(first, last)
            rows = self.matrix[first:last]
            return csr_array(rows)

    @property
    @override
    def by_columns(self) -> bool:
        return self.format == "csc"

    @override
    def cut_row_blocks(self, firsts: Sequence[int], folder: Path) -> list[Path]:
        with self._reading(self.layer):
            return cut_by_rows(self._slabs(), firsts, folder)

    @override
    def use_row_blocks(self, folder: Path) -> None:
        self._row_blocks = folder

    def _indptr(self, first: int, last: int) -> NDArray[np.int64]:
        where = f"{self.layer}, rows {first} to {last}"
        with self._reading(where):
            offsets: NDArray[np.int64] = self.matrix["indptr"][first:last + 1].astype(np.int64)
            stored = int(self.matrix["data"].shape[0])
            ascending = len(offsets) == last - first + 1 and not (np.diff(offsets) < 0).any()
            if not ascending or offsets[0] < 0 or offsets[-1] > stored:
                raise ValueError(f"row boundaries that do not fit the {stored} stored values")
        return offsets

    def _csr_rows(self, first: int, last: int) -> csr_array:
        offsets = self._indptr(first, last)
        data = self.matrix["data"][offsets[0]:offsets[-1]]
        columns = self.matrix["indices"][offsets[0]:offsets[-1]]
        self._check_indices(columns, self.n_genes, "column")
        return csr_array((data, columns, offsets - offsets[0]), shape=(last - first, self.n_genes))

    def _csc_rows(self, first: int, last: int) -> csr_array:
        if self._row_blocks is not None:
            return read_block(self._row_blocks, first, last, self.n_genes, self.matrix["data"].dtype)
        parts = []
        for rows, columns, values in self._slabs():
            inside = np.flatnonzero((rows >= first) & (rows < last))
            parts.append((rows[inside] - first, columns[inside], values[inside]))
        if not parts:
            return csr_array((last - first, self.n_genes), dtype=self.matrix["data"].dtype)
        rows, columns, values = (np.concatenate([part[i] for part in parts]) for i in range(3))
        return to_csr((rows, columns, values), (last - first, self.n_genes))

    def _slabs(self) -> Iterator[Entries]:
        """All entries of a CSC matrix in pieces of SCAN_VALUES, by column."""
        offsets = self.matrix["indptr"][:].astype(np.int64)
        stored = int(self.matrix["data"].shape[0])
        if (np.diff(offsets) < 0).any() or offsets[0] != 0 or offsets[-1] != stored:
            raise ValueError(f"column boundaries that do not fit the {stored} stored values")
        for start in range(0, stored, SCAN_VALUES):
            stop = min(start + SCAN_VALUES, stored)
            rows = self.matrix["indices"][start:stop]
            self._check_indices(rows, self.n_cells, "row")
            columns = np.searchsorted(offsets, np.arange(start, stop), side="right") - 1
            yield rows, columns, self.matrix["data"][start:stop]

    @staticmethod
    def _check_indices(indices: NDArray[np.integer], size: int, what: str) -> None:
        if len(indices) and (indices.min() < 0 or indices.max() >= size):
            raise ValueError(f"a {what} index outside the {size} {what}s")

    def _check_shape(self) -> None:
        n_obs, n_var = elements.n_rows(self._obs), elements.n_rows(self._var)
        if (n_obs, n_var) != (self.n_cells, self.n_genes):
            raise ValueError(f"a matrix of {self.n_cells} x {self.n_genes} with {n_obs} rows in obs and {n_var} in var")
        if self.format == "dense":
            return
        lengths = {key: int(self.matrix[key].shape[0]) for key in ("data", "indices", "indptr")}
        major = self.n_cells if self.format == "csr" else self.n_genes
        if lengths["data"] != lengths["indices"] or lengths["indptr"] != major + 1:
            raise ValueError(f"a sparse matrix of {major} rows with {lengths['data']} values, {lengths['indices']} "
                             f"indices and {lengths['indptr']} boundaries")
        if major and int(self.matrix["indptr"][-1]) != lengths["data"]:
            raise ValueError(f"{lengths['data']} values where the boundaries say {int(self.matrix['indptr'][-1])}")

    def _reading(self, what: str) -> contextlib.AbstractContextManager[None]:
        return _reading(self.path, what)


@contextlib.contextmanager
def _reading(path: Location, what: str) -> Iterator[None]:
    """Turn what h5py raises about a damaged or odd file into one sentence with the place."""
    try:
        yield
    except _H5_ERRORS as error:
        raise SourceError(f"cannot be read: {_cause(error)}", where=f"{path}, {what}", fix=_RESTORE) from error


def _matrices(file: h5py.File) -> list[str]:
    raw = [RAW] if "raw.X" in file or "raw/X" in file else []
    layers = sorted(file["layers"]) if isinstance(file.get("layers"), h5py.Group) else []
    return [*([X] if X in file else []), *raw, *layers]


def _cause(error: BaseException) -> str:
    text = " ".join(str(error).split()).strip("'\"")
    return text[:200] or type(error).__name__
