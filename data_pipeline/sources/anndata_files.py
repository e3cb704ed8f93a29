"""AnnData on disk, HDF5 or Zarr: read straight through h5py or zarr by row blocks, never as a whole.

CSR rows are two contiguous slices. Dense rows are a slice whose zeros are dropped. CSC keeps the values of a row all
over the file: they are cut into row blocks once (rechunk.py), or, for one block, gathered in one scan of the matrix.
"""
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array
from typing_extensions import override

from data_pipeline.sources import base, elements
from data_pipeline.sources.base import AUTO, INDEX, RAW, Source, X, are_counts
from data_pipeline.sources.compressed import StoredMatrix
from data_pipeline.sources.elements import Element
from data_pipeline.sources.faults import reading
from data_pipeline.sources.location import Location
from data_pipeline.sources.rechunk import cut_by_rows, read_block, select_rows
from scgpt.counted import counted
from scgpt.errors import ConfigError, SourceError

SCAN_VALUES = 1 << 20   # stored values of a CSC matrix in memory at once while it is cut: some 70 bytes each
MAX_CHUNK_BYTES = 1 << 30   # of a decoded chunk of a matrix: a worker holds it whole, however few rows it wants


class AnnDataFile(Source):
    """An open AnnData file or store with one of its matrices (X, raw/X or a layer) in use."""

    container = "a file"      # in words, for errors
    _dense: Element           # the matrix in use, where it is dense
    _sparse: StoredMatrix     # where it is CSR or CSC

    def __init__(self, root: Element, path: Location, name: str, layer: str, close: Callable[[], None]) -> None:
        self.root, self.path, self.name, self.layer, self._close = root, path, name, layer, close
        self._row_blocks: Path | None = None
        with self._reading("header"):
            if layer == RAW:
                key = "raw.X" if "raw.X" in root else "raw/X"
                self._var = root["raw.var" if "raw.X" in root else "raw/var"]
            else:
                key = X if layer == X else f"layers/{layer}"
                self._var = root["var"]
            self._obs = root["obs"]
            matrix = root[key]
            self.format = elements.sparse_format(matrix)
            self.n_cells, self.n_genes = elements.matrix_shape(matrix)
            if self.format == "dense":
                self._dense = matrix
            else:
                n_major, n_minor, minor = ((self.n_cells, self.n_genes, "column") if self.format == "csr" else
                                           (self.n_genes, self.n_cells, "row"))
                self._sparse = StoredMatrix(matrix["data"], matrix["indices"], matrix["indptr"], n_major, n_minor,
                                            minor)
            self._check_shape()
        self._check_chunks()

    @classmethod
    def of_root(cls, root: Element, location: Location, *, name: str, layer: str,
                close: Callable[[], None]) -> "AnnDataFile":
        """The source in an open file or store, one of its matrices chosen (see `open_source`); closes it on errors."""
        try:
            with reading(location, "header"):
                return cls._choose(root, location, name, layer, close)
        except BaseException:
            close()
            raise

    @classmethod
    def _choose(cls, root: Element, path: Location, name: str, layer: str,
                close: Callable[[], None]) -> "AnnDataFile":
        if "obs" not in root or "var" not in root or not (X in root or "layers" in root):
            parts = any(name.startswith("dataset_") for name in root)   # an annbatch collection
            raise SourceError(f"{cls.container}, but not AnnData: it holds {', '.join(sorted(root)[:8]) or 'nothing'}",
                              where=str(path), fix=f"give its parts: {path}/dataset_*" if parts else
                                                   "give a file that anndata has written (X, obs, var)")
        present = _matrices(root)
        if layer != AUTO and layer not in present:
            raise ConfigError(f"there is no layer '{layer}'", where=str(path),
                              fix=f"choose one of: {', '.join(present)}")
        if layer != AUTO:
            return cls(root, path, name, layer, close)
        if not present:
            raise SourceError("it holds no matrix: no X, raw or layer", where=str(path),
                              fix="give a file with the expression matrix in X")
        if not {X, RAW} & set(present):
            raise ConfigError("there is neither X nor raw", where=str(path),
                              fix=f"choose layer: {' or '.join(present)}")
        candidates = [cls(root, path, name, key, close) for key in (X, RAW) if key in present]
        return next((source for source in candidates if are_counts(source.probe())), candidates[0])

    @override
    def close(self) -> None:
        self._close()

    @override
    def other_matrices(self) -> list[str]:
        return [key for key in _matrices(self.root) if key != self.layer]

    @override
    def gene_columns(self) -> list[str]:
        with self._reading("var"):
            return [INDEX, *(name for name in elements.column_names(self._var) if elements.is_text(self._var, name))]

    @override
    def _names_in(self, column: str) -> list[str]:
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
                    raise ValueError(f"{counted(length, 'value')} for {counted(self.n_cells, 'cell')}")
                found[name] = elements.read_column(self._obs, name, first, last)
        return found

    @override
    def value_offsets(self, first: int, last: int) -> NDArray[np.int64]:
        if self.format == "csr":
            with self._reading(f"{self.layer}, rows {first} to {last}"):
                return self._sparse.offsets(first, last)
        rows = np.arange(first, last + 1, dtype=np.int64)
        if self.format == "dense":
            return rows * self.n_genes
        return (rows * int(self._sparse.data.shape[0])) // max(self.n_cells, 1)

    @override
    def bytes_per_value(self) -> int:
        return int(self._dense.dtype.itemsize) + 8 if self.format == "dense" else self._sparse.bytes_per_value

    @property
    @override
    def chunk_bytes(self) -> int:
        return sum(elements.chunk_bytes(array) for array in self._arrays()[:2])

    @override
    def stored_share(self) -> float:
        if self.format != "dense" or not self.n_cells or not self.n_genes:
            return 1.0
        rows = min(self.n_cells, max(base.PROBE_VALUES // self.n_genes, 1))
        return float(self.read_rows(0, rows).nnz / (rows * self.n_genes))

    @override
    def read_rows(self, first: int, last: int) -> csr_array:
        with self._reading(f"{self.layer}, rows {first} to {last}"):
            if self.format == "csr":
                return self._sparse.rows(first, last)
            if self.format == "dense":
                return csr_array(self._dense[first:last])
            if self._row_blocks is not None:
                return read_block(self._row_blocks, first, last, self.n_genes, self._sparse.data.dtype)
            return select_rows(self._sparse.slabs(SCAN_VALUES), first, (last - first, self.n_genes),
                               self._sparse.data.dtype)

    @override
    def probe(self) -> NDArray[np.generic]:
        if self.format != "csc":
            return super().probe()
        with self._reading(f"{self.layer}, first values"):   # of the first columns: rows lie all over the file
            return next((values for _, _, values in self._sparse.slabs(base.PROBE_VALUES)), np.zeros(0))

    @property
    @override
    def piece_values(self) -> int | None:
        return self._sparse.piece_values if self.format == "csr" else None

    @property
    @override
    def by_columns(self) -> bool:
        return self.format == "csc"

    @override
    def cut_row_blocks(self, firsts: Sequence[int], folder: Path) -> list[Path]:
        with self._reading(self.layer):
            return cut_by_rows(self._sparse.slabs(SCAN_VALUES), firsts, folder)

    @override
    def use_row_blocks(self, folder: Path) -> None:
        self._row_blocks = folder

    def _arrays(self) -> tuple[Element, ...]:
        return (self._dense,) if self.format == "dense" else (self._sparse.data, self._sparse.indices,
                                                              self._sparse.indptr)

    def _check_chunks(self) -> None:
        largest = max(map(elements.chunk_bytes, self._arrays()))
        if largest > MAX_CHUNK_BYTES:
            raise SourceError(f"its matrix is stored in chunks of {largest / 2**30:.1f} GiB, each read as a whole",
                              where=f"{self.path}, {self.layer}", fix="write it again with chunks of some MiB")

    def _check_shape(self) -> None:
        n_obs, n_var = elements.n_rows(self._obs), elements.n_rows(self._var)
        if (n_obs, n_var) != (self.n_cells, self.n_genes):
            raise ValueError(f"a matrix of {self.n_cells} x {self.n_genes} with {counted(n_obs, 'row')} in obs and "
                             f"{n_var} in var")
        if self.format == "dense":
            elements.check_numbers(self._dense)
        else:
            self._sparse.check()

    def _reading(self, what: str) -> contextlib.AbstractContextManager[None]:
        return reading(self.path, what)


def _matrices(root: Element) -> list[str]:
    raw = [RAW] if "raw.X" in root or "raw/X" in root else []
    layers = root.get("layers")
    return [*([X] if X in root else []), *raw, *(sorted(layers) if layers is not None else [])]
