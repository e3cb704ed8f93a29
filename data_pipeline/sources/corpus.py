"""A corpus of this package as a source, in either form: to join corpora, filter one, or move it to another vocabulary.

Rows are the cells of train, then those of valid. A cell gets a new id, of this source; `source` and what else is known
of it stay columns of obs. Genes that the corpus's vocabulary did not hold are gone: only the atlases have them.
"""
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array
from typing_extensions import override

from data_pipeline.sources.base import AUTO, INDEX, Source, X
from data_pipeline.sources.faults import RESTORE, reading
from data_pipeline.sources.gene_table import GeneTable
from data_pipeline.sources.identity import state_of
from data_pipeline.sources.location import Location
from data_pipeline.sources.obs_columns import plain
from data_pipeline.sources.tables import Table, open_table
from scgpt.counted import counted
from scgpt.data import Manifest, TokenDataset, verify_corpus
from scgpt.data.schema import CELL_ID
from scgpt.errors import ConfigError, DataError, SourceError

_READ_CELLS = 4096   # fetched at once: the copies that this takes stay small beside a block of rows


class Corpus(Source):
    """An open corpus."""

    def __init__(self, path: Location, name: str) -> None:
        self.path, self.name, self.layer = path, name, X
        manifest = Manifest.read(path.url)
        with reading(path, "splits"):
            if not manifest.splits:
                raise ValueError("it has no split")
            self._splits = [TokenDataset.open(path.url, split) for split in manifest.splits]
            self._before = np.cumsum([0, *map(len, self._splits)])   # (splits + 1,) rows
            self.genes = GeneTable.of(dict(self._splits[0].vocab.get_stoi()))
        self.n_cells, self.n_genes = int(self._before[-1]), self.genes.n_genes
        with reading(path, "what is known of the cells"):
            files = tuple(path / part.obs.file for split in manifest.splits.values() for part in split.parts)
            self._obs: Table = open_table(files, None, state_of(path))
            if self._obs.n_rows != self.n_cells:
                raise ValueError(f"{counted(self._obs.n_rows, 'row')} for {counted(self.n_cells, 'cell')}")

    @classmethod
    def open(cls, location: Location, *, name: str, layer: str = AUTO) -> "Corpus":
        """Open every split; DataError where it is no whole corpus."""
        if layer not in {AUTO, X}:
            raise ConfigError(f"there is no layer '{layer}'", where=str(location), fix="choose one of: X")
        return cls(location, name)

    @override
    def close(self) -> None:
        """Nothing is held that is not given back with the object."""

    @override
    def check_content(self) -> None:
        try:
            verify_corpus(self.path.url)
        except DataError as error:
            raise SourceError(error.what, where=error.where, fix=RESTORE) from error

    @override
    def other_matrices(self) -> list[str]:
        return []

    @override
    def gene_columns(self) -> list[str]:
        return [INDEX]

    @override
    def _names_in(self, column: str) -> list[str]:
        return self.genes.columns[column]

    @override
    def obs_columns(self) -> list[str]:
        return [name for name in self._obs.schema.names if name != CELL_ID]

    @override
    def obs(self, columns: Sequence[str], first: int = 0, last: int | None = None) -> dict[str, pa.Array]:
        last = self.n_cells if last is None else last
        if not columns:
            return {}
        with reading(self.path, f"{', '.join(columns)}, rows {first} to {last}"):
            found = self._obs.read_table(columns, first, last)
            return {name: plain(found.column(name).combine_chunks()) for name in columns}

    @override
    def value_offsets(self, first: int, last: int) -> NDArray[np.int64]:
        with reading(self.path, f"rows {first} to {last}"):
            lengths = [split.lengths_of(rows) for split, rows in self._parts(first, last, last - first)]
        return np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]))]).astype(np.int64)

    @override
    def n_values(self) -> int:
        return sum(split.entry.tokens for split in self._splits)

    @override
    def bytes_per_value(self) -> int:
        return 8   # int32 column, float32 or uint32 value

    @override
    def stored_share(self) -> float:
        return 1.0

    @override
    def read_rows(self, first: int, last: int) -> csr_array:
        columns, values, lengths = [np.zeros(0, np.int32)], [], [np.zeros(1, np.int64)]
        with reading(self.path, f"rows {first} to {last}"):
            for split, rows in self._parts(first, last, _READ_CELLS):
                cells = split.fetch(rows)
                columns.append(self.genes.places[cells.genes])
                values.append(cells.expressions)
                lengths.append(cells.lengths)
            if any((places < 0).any() for places in columns):
                raise ValueError("a special token among the genes of a cell")
            data = np.concatenate(values) if values else np.zeros(0, np.float32)
            return csr_array((data, np.concatenate(columns), np.cumsum(np.concatenate(lengths))),
                             shape=(last - first, self.n_genes))

    def _parts(self, first: int, last: int, n_rows: int) -> list[tuple[TokenDataset, NDArray[np.int64]]]:
        """(split, its rows) that make up the rows [first, last), at most `n_rows` each."""
        bounds = zip(self._splits, self._before[:-1].tolist(), self._before[1:].tolist(), strict=True)
        return [(split, np.arange(begin, min(begin + n_rows, last, stop)) - start) for split, start, stop in bounds
                for begin in range(max(first, start), min(last, stop), max(n_rows, 1))]
