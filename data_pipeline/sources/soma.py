"""SOMA experiments, such as the CELLxGENE Census: read through tiledbsoma, by ranges of `soma_joinid`.

A row is the cell of that joinid, so that `source_row` leads back to the Census. Cells that a filter on obs leaves out
are never read: a corpus of one tissue costs that tissue, not the Census. (The ledger counts these cells; of their
values it does not know.) Rejected: a query with the filter as TileDB's own, whose rows would be numbered by the filter.
"""
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array
from typing_extensions import override

from data_pipeline.sources.base import AUTO, INDEX, RAW, Source
from data_pipeline.sources.compressed import check_indices
from data_pipeline.sources.faults import reading
from data_pipeline.sources.location import Location
from data_pipeline.sources.obs_columns import is_plain, plain
from data_pipeline.sources.rechunk import to_csr
from scgpt.counted import counted
from scgpt.errors import ConfigError, SourceError

JOINID = "soma_joinid"
_MEASUREMENT = "RNA"                     # where there are several
_NNZ = "nnz"                             # obs column of the Census: stored values of a cell in `raw`
_NAMES = ("feature_id", "var_id")        # what var_names may be called, the likeliest first
_SCAN_CELLS = 1 << 20                    # cells whose obs are read at once
_BUFFER_BYTES = 32 << 20                 # of a column that is being read
_TILE_BYTES = 512 << 20                  # of tiles that TileDB may hold


class SomaExperiment(Source):
    """An experiment with one layer of one measurement in use."""

    def __init__(self, experiment: Any, path: Location, name: str, layer: str) -> None:
        self.experiment, self.path, self.name = experiment, path, name
        self._passes: Callable[[int, int], NDArray[np.bool_]] | None = None
        measurement = experiment.ms[_choose_measurement(list(experiment.ms), path)]
        self._layers = sorted(measurement.X)
        self.layer = _choose_layer(self._layers, layer, path)
        self._x = measurement.X[self.layer]
        self.n_cells = _n_rows(experiment.obs)
        self.n_genes = _n_rows(measurement.var)
        self._var = measurement.var.read().concat()
        if not np.array_equal(self._var.column(JOINID), np.arange(self.n_genes)):
            raise ValueError("genes that are not in the order of their joinids")

    @classmethod
    def open(cls, location: Location, *, name: str, layer: str = AUTO) -> "SomaExperiment":
        """Open an experiment and choose its layer: `raw`, or the only one, or the one named."""
        import tiledbsoma

        with reading(location, "header", fix="give the folder or URL of a SOMA experiment, such as "
                                             "CENSUS/census_data/homo_sapiens"):
            found = tiledbsoma.open(location.url, context=tiledbsoma.SOMATileDBContext(tiledb_config=_config(location)))
            try:
                if not isinstance(found, tiledbsoma.Experiment):
                    held = ", ".join(sorted(found)[:8]) if isinstance(found, tiledbsoma.Collection) else ""
                    raise SourceError(f"not a SOMA experiment but a {type(found).__name__}"
                                      + (f" with {held}" if held else ""), where=str(location),
                                      fix="give the experiment itself, such as CENSUS/census_data/homo_sapiens")
                return cls(found, location, name, layer)
            except BaseException:
                found.close()
                raise

    @override
    def close(self) -> None:
        self.experiment.close()

    @override
    def other_matrices(self) -> list[str]:
        return [layer for layer in self._layers if layer != self.layer]

    @override
    def gene_columns(self) -> list[str]:
        return [INDEX, *self._text()]

    @override
    def _names_in(self, column: str) -> list[str]:
        if column == INDEX:
            named = [*(name for name in _NAMES if name in self._text()), *self._text()]
            if not named:
                raise SourceError("var holds no column of text that could name its genes", where=str(self.path),
                                  fix="give an experiment whose genes have names")
            column = named[0]
        return [name or "" for name in self._var.column(column).cast(pa.string()).to_pylist()]

    @override
    def obs_columns(self) -> list[str]:
        return [field.name for field in self.experiment.obs.schema if field.name != JOINID and is_plain(field.type)]

    @override
    def obs(self, columns: Sequence[str], first: int = 0, last: int | None = None) -> dict[str, pa.Array]:
        last = self.n_cells if last is None else last
        columns = list(columns)
        if not columns:
            return {}
        with reading(self.path, f"obs, rows {first} to {last}"):
            if first == last:
                schema = self.experiment.obs.schema
                return {name: plain(pa.array([], schema.field(name).type)) for name in columns}
            found = self.experiment.obs.read((slice(first, last - 1),), column_names=[JOINID, *columns],
                                             result_order="row-major").concat()
            if not np.array_equal(found.column(JOINID), np.arange(first, last)):
                raise ValueError("cells whose joinids do not follow each other")
            found = found.unify_dictionaries()
            return {name: plain(found.column(name).combine_chunks()) for name in columns}

    @override
    def leave_out(self, passes: Callable[[int, int], NDArray[np.bool_]]) -> None:
        self._passes = passes

    @override
    def n_values(self) -> int:
        return sum(int(self.value_offsets(first, min(first + _SCAN_CELLS, self.n_cells))[-1])
                   for first in range(0, self.n_cells, _SCAN_CELLS))

    @override
    def value_offsets(self, first: int, last: int) -> NDArray[np.int64]:
        if _NNZ in self.obs_columns() and self.layer == RAW:
            counts = self.obs([_NNZ], first, last)[_NNZ].to_numpy(zero_copy_only=False).astype(np.int64)
        else:
            with reading(self.path, self.layer):
                stored = int(self._x.nnz)
            counts = np.diff(np.arange(first, last + 1, dtype=np.int64) * stored // max(self.n_cells, 1))
        if self._passes is not None:
            counts = np.where(self._passes(first, last), counts, 0)
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @override
    def bytes_per_value(self) -> int:
        return 20   # two coordinates and a value

    @property
    @override
    def chunk_bytes(self) -> int:
        return _TILE_BYTES + 4 * _BUFFER_BYTES

    @override
    def stored_share(self) -> float:
        return 1.0

    @override
    def read_rows(self, first: int, last: int) -> csr_array:
        shape = (last - first, self.n_genes)
        kept = np.arange(first, last)
        if self._passes is not None:
            kept = kept[self._passes(first, last)]
        if not len(kept):
            return csr_array(shape, dtype=np.float32)
        with reading(self.path, f"{self.layer}, rows {first} to {last}"):
            rows = slice(first, last - 1) if len(kept) == last - first else pa.array(kept)
            found = self._x.read((rows,)).tables().concat()
            cells, genes = (found.column(f"soma_dim_{place}").to_numpy() for place in range(2))
            check_indices(cells - first, shape[0], "row")
            check_indices(genes, self.n_genes, "column")
            return to_csr((cells - first, genes.astype(np.int32), found.column("soma_data").to_numpy()), shape)

    def _text(self) -> list[str]:
        kinds = {field.name: field.type for field in self._var.schema}
        texts = {name: kind.value_type if pa.types.is_dictionary(kind) else kind for name, kind in kinds.items()}
        return [name for name, kind in texts.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]


def _config(location: Location) -> dict[str, str | float]:
    """Settings of TileDB: what it may hold, and how it reaches an S3 server, which it does without fsspec.

    Its own client reads the environment and ~/.aws for credentials, but for neither the endpoint nor what fsspec was
    configured with: s3fs is asked for these.
    """
    settings: dict[str, str | float] = {
        "soma.init_buffer_bytes": _BUFFER_BYTES, "sm.mem.total_budget": _TILE_BYTES,
        "sm.enable_signal_handlers": "false"}   # they would call what was there before: SIG_IGN, in a job begun by `&`
    if location.scheme != "s3":
        return settings
    system = location.file_system()
    about = system.s3.meta
    scheme, _, host = about.endpoint_url.partition("://")
    settings["vfs.s3.region"] = about.region_name
    if not host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        settings |= {"vfs.s3.endpoint_override": host.rstrip("/"), "vfs.s3.scheme": scheme,
                     "vfs.s3.use_virtual_addressing": "false"}
    if system.anon:
        settings["vfs.s3.no_sign_request"] = "true"
    given = {"aws_access_key_id": system.key, "aws_secret_access_key": system.secret, "aws_session_token": system.token}
    return settings | {f"vfs.s3.{name}": value for name, value in given.items() if value}


def _choose_measurement(present: list[str], path: Location) -> str:
    if _MEASUREMENT in present:
        return _MEASUREMENT
    if len(present) != 1:
        raise SourceError(f"it has no measurement '{_MEASUREMENT}' but {', '.join(present) or 'none'}", where=str(path),
                          fix="give an experiment that measured RNA")
    return present[0]


def _choose_layer(present: list[str], layer: str, path: Location) -> str:
    if layer == AUTO:
        layer = RAW if RAW in present else present[0] if len(present) == 1 else AUTO
    if layer not in present:
        what = "it has no layer 'raw'" if layer == AUTO else f"there is no layer '{layer}'"
        raise ConfigError(what, where=str(path), fix=f"choose layer: {' or '.join(present) or 'none is there'}")
    return layer


def _n_rows(frame: Any) -> int:
    """Rows of a data frame whose joinids are 0, 1, ...; ValueError for others."""
    if tuple(frame.index_column_names) != (JOINID,):
        raise ValueError(f"a data frame that is ordered by {', '.join(frame.index_column_names)}, not by {JOINID}")
    n_rows = int(frame.count)
    if n_rows and tuple(frame.non_empty_domain()[0]) != (0, n_rows - 1):
        raise ValueError(f"{counted(n_rows, 'row')} whose joinids are {frame.non_empty_domain()[0]}")
    return n_rows
