"""10x Genomics' folders: matrix.mtx, barcodes.tsv and features.tsv (v3) or genes.tsv (v2), compressed or not.

Text can only be read from its beginning, and the order of a matrix's lines is not promised: it is cut into row blocks
once (rechunk.py), like a matrix that is stored by columns.
"""
import contextlib
import gzip
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array
from typing_extensions import override

from data_pipeline.sources.base import AUTO, INDEX, PROBE_VALUES, X
from data_pipeline.sources.faults import reading
from data_pipeline.sources.location import Location
from data_pipeline.sources.matrix_market import PIECE_BYTES, read_entries, read_header
from data_pipeline.sources.rechunk import Entries, cut_by_rows, read_block, select_rows
from data_pipeline.sources.tenx import EXPRESSION, GENE_IDS, Features, TenxSource, check_sizes
from scgpt.errors import ConfigError, SourceError


class TenxFolder(TenxSource):
    """A folder with matrix.mtx, barcodes.tsv and features.tsv (v3) or genes.tsv (v2), compressed or not."""

    def __init__(self, path: Location, name: str, layer: str) -> None:
        self.path, self.name, self.layer = path, name, X
        if layer not in {AUTO, X}:
            raise ConfigError(f"there is no layer '{layer}'", where=str(path), fix="choose one of: X")
        self._row_blocks: Path | None = None
        self._matrix, barcodes, features = _members(path)
        with reading(path, features.name):
            self.features = _text_features(features)
        self._barcodes = barcodes
        with reading(path, barcodes.name):
            n_barcodes = _count_lines(barcodes)
        with reading(path, self._matrix.name), _plain(self._matrix) as stream:
            self._header = read_header(stream)
            self.n_cells, self.n_genes = self._header.n_columns, self.features.n_genes
            check_sizes(self._header.n_rows, self.n_cells, self.features, n_barcodes)

    @classmethod
    def open(cls, location: Location, *, name: str, layer: str = AUTO) -> "TenxFolder":
        """Read the genes, the barcodes and the header of the matrix."""
        return cls(location, name, layer)

    @override
    def close(self) -> None:
        """Nothing is held open."""

    @override
    def other_matrices(self) -> list[str]:
        return []

    @override
    def obs(self, columns: Sequence[str], first: int = 0, last: int | None = None) -> dict[str, pa.Array]:
        if not columns:
            return {}
        with reading(self.path, self._barcodes.name), _plain(self._barcodes) as stream:
            lines = itertools.islice(stream, first, last)   # a raw matrix names millions: they are never held together
            words = pa.array([line.split(b"\t")[0].strip().decode(errors="replace") for line in lines], pa.string())
            return dict.fromkeys(columns, words)

    @override
    def value_offsets(self, first: int, last: int) -> NDArray[np.int64]:
        rows = np.arange(first, last + 1, dtype=np.int64)
        return rows * self._header.n_entries // max(self.n_cells, 1)

    @override
    def bytes_per_value(self) -> int:
        return 20   # of an entry in a row block: row, column, value

    @override
    def probe(self) -> NDArray[np.generic]:
        with reading(self.path, self._matrix.name), _plain(self._matrix) as stream:
            pieces = read_entries(stream, read_header(stream))
            return next((values[:PROBE_VALUES] for _, _, values in pieces), np.zeros(0))

    @property
    @override
    def chunk_bytes(self) -> int:
        return 8 * PIECE_BYTES   # of text, its numbers, and the entries that are chosen of them

    @override
    def read_rows(self, first: int, last: int) -> csr_array:
        with reading(self.path, f"{self._matrix.name}, rows {first} to {last}"):
            shape = (last - first, self._header.n_rows)
            if self._row_blocks is not None:
                rows = read_block(self._row_blocks, first, last, shape[1], self._header.value_type)
            else:
                with _plain(self._matrix) as stream:
                    rows = select_rows(_by_cell(stream), first, shape, self._header.value_type)
            return self.features.rows(rows)

    @property
    @override
    def by_columns(self) -> bool:
        return True

    @override
    def cut_row_blocks(self, firsts: Sequence[int], folder: Path) -> list[Path]:
        with reading(self.path, self._matrix.name), _plain(self._matrix) as stream:
            return cut_by_rows(_by_cell(stream), firsts, folder)

    @override
    def use_row_blocks(self, folder: Path) -> None:
        self._row_blocks = folder


def _text_features(path: Location) -> Features:
    """Lines of `id, symbol, type` (v3), `id, symbol` (v2) or `id`."""
    lines = _table(path)
    width = min(map(len, lines), default=0)
    if not width:
        raise ValueError("it lists no genes")
    ids = [line[0] for line in lines]
    names = {INDEX: [line[1] for line in lines] if width > 1 else ids, GENE_IDS: ids}
    types = [line[2] for line in lines] if width > 2 else []
    return Features.choose(names, types if EXPRESSION in types else [], [], None)   # else a column of somebody's own


def _members(folder: Location) -> tuple[Location, Location, Location]:
    """The three files of a folder: matrix, barcodes, features; their names may begin with one of the data set."""
    found = []
    for endings in (("matrix.mtx",), ("barcodes.tsv",), ("features.tsv", "genes.tsv")):
        names = [name for name in folder.names() if name.removesuffix(".gz").endswith(endings)]
        if len(names) != 1:
            stem = " or ".join(endings)
            what = f"it holds several of {stem}: {', '.join(names[:4])}" if names else f"it holds no {stem}"
            raise SourceError(what, where=str(folder), fix="give a folder with matrix.mtx, barcodes.tsv and "
                                                           "features.tsv or genes.tsv, one of each, plain or .gz")
        found.append(folder / names[0])
    return found[0], found[1], found[2]


@contextlib.contextmanager
def _plain(path: Location) -> Iterator[IO[bytes]]:
    """The content of a file, decompressed where it is compressed."""
    with contextlib.ExitStack() as stack:
        stream: IO[bytes] = stack.enter_context(path.open())
        if path.suffix == ".gz":
            stream = cast(IO[bytes], stack.enter_context(gzip.open(stream, "rb")))
        yield stream


def _count_lines(path: Location) -> int:
    """Lines of a text, the last one perhaps without an end."""
    lines, last = 0, b"\n"
    with _plain(path) as stream:
        while piece := stream.read(1 << 20):
            lines, last = lines + piece.count(b"\n"), piece[-1:]
    return lines + (last != b"\n")


def _table(path: Location) -> list[list[str]]:
    """The fields of each line of a file of tab-separated words."""
    with _plain(path) as stream, io.TextIOWrapper(stream, "utf-8", errors="replace") as text:
        return [line.rstrip("\n").split("\t") for line in text]


def _by_cell(stream: IO[bytes]) -> Iterator[Entries]:
    """Entries with cells as rows and features as columns."""
    return ((cells, features, values) for features, cells, values in read_entries(stream, read_header(stream)))
