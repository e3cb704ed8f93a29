"""Tables of cells in one or many files, Parquet, Arrow IPC or lines of JSON, read by row ranges.

A piece is a row group, a record batch or some lines: rows are found by it, and it is what memory is bounded by. Where
pieces lie is read once a process and kept as long as the files stay as they are: a table may have thousands of files.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from data_pipeline.sources.arrow_stream import ArrowFile
from data_pipeline.sources.json_lines import JsonLines
from data_pipeline.sources.location import Location

PARQUET, ARROW, JSON = (".parquet",), (".arrow", ".feather", ".ipc"), (".json",)
GENES, EXPRESSIONS = "genes", "expressions"   # the list columns of a cell
_LISTS = {GENES: pa.list_(pa.int64()), EXPRESSIONS: pa.list_(pa.float64())}   # where the file itself does not say it
_BATCH_ROWS = 1024          # rows of a Parquet row group decoded at once
_BUFFER_BYTES = 1 << 20     # read ahead of a column of a row group


@dataclass(frozen=True)
class Table:
    """A table whose rows are those of its files, one after the other."""

    files: tuple[Location, ...]
    schema: pa.Schema
    pieces: NDArray[np.int64]         # (pieces, 2)  file and number in it
    rows_before: NDArray[np.int64]    # (pieces + 1,)
    values_before: NDArray[np.int64]  # (pieces + 1,)  entries of the list column
    layouts: dict[int, ArrowFile | JsonLines] = field(repr=False)   # file -> where its pieces lie; not of Parquet
    piece_bytes: int                  # held at once beside the rows that are asked for

    @property
    def n_rows(self) -> int:
        """Rows of all files."""
        return int(self.rows_before[-1])

    def value_offsets(self, first: int, last: int) -> NDArray[np.int64]:
        """Entries before the rows first .. last: exact where a piece begins, its average within."""
        rows = np.arange(first, last + 1)
        return np.floor(np.interp(rows, self.rows_before, self.values_before)).astype(np.int64)

    def read_table(self, columns: Sequence[str], first: int, last: int) -> pa.Table:
        """Columns of the rows [first, last) together, categories by one dictionary."""
        schema = pa.schema([self.schema.field(name) for name in columns])
        batches = [batch.cast(schema) for batch in self.read(columns, first, last)]
        return pa.Table.from_batches(batches, schema).unify_dictionaries()

    def read(self, columns: Sequence[str], first: int, last: int) -> Iterator[pa.RecordBatch]:
        """Columns of the rows [first, last), in order, a bounded number of rows at a time."""
        if first >= last:
            return
        begin = int(np.searchsorted(self.rows_before, first, side="right")) - 1
        end = int(np.searchsorted(self.rows_before, last, side="left"))
        place = int(self.rows_before[begin])
        for number in np.unique(self.pieces[begin:end, 0]):
            wanted = [int(piece) for file, piece in self.pieces[begin:end] if file == number]
            for batch in self._batches(int(number), wanted, columns):
                start, stop = max(first - place, 0), min(last - place, batch.num_rows)
                if start < stop:
                    yield batch.slice(start, stop - start)
                place += batch.num_rows
        if place < last:
            raise ValueError(f"the rows end at {place}")

    def _batches(self, number: int, pieces: Sequence[int], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        if number in self.layouts:
            yield from self.layouts[number].read_batches(pieces, columns)
            return
        with self.files[number].open() as stream, _parquet(stream) as file:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=pieces, columns=list(columns), use_threads=False):
                batch.validate(full=True)
                yield batch


@lru_cache(maxsize=4)
def open_table(files: tuple[Location, ...], column: str | None, state: str) -> Table:
    """Read where the pieces of files lie, and their schema.

    Args:
        files: all Parquet, all Arrow IPC or all JSON.
        column: the list column whose entries are counted; None, for Parquet alone: none is.
        state: of all of them together; another state is another table.

    Raises ValueError (pyarrow's are) where a file is not what its name says, not whole, or has other columns.
    """
    pieces, rows, values = [], [0], [0]
    largest = 2 * _BUFFER_BYTES
    schema: pa.Schema | None = None
    layouts: dict[int, ArrowFile | JsonLines] = {}
    for number, place in enumerate(files):
        if place.name.endswith(PARQUET):
            with place.open() as stream, _parquet(stream) as file:
                found, layout = file.schema_arrow, list(_row_groups(file, column))
        elif column is None:
            raise ValueError(f"{place.name} is not named as a Parquet file")
        else:
            held = (JsonLines.read(place, column, _LISTS) if place.name.endswith(JSON) else
                    ArrowFile.read(place, column))
            layouts[number], found = held, held.schema
            layout = [(batch.rows, batch.values) for batch in held.batches]
            largest = max([largest, *(2 * batch.bytes for batch in held.batches)])   # compressed (as text), and not
        schema = found if schema is None else _common(schema, found, place)
        pieces += [(number, piece) for piece in range(len(layout))]
        rows += [count for count, _ in layout]
        values += [count for _, count in layout]
    return Table(files, schema, np.array(pieces, np.int64).reshape(-1, 2), np.cumsum(rows), np.cumsum(values), layouts,
                 largest)


def _common(schema: pa.Schema, other: pa.Schema, place: Location) -> pa.Schema:
    """The schema that both can be cast to: a part without any value of a column has another type than the others."""
    if sorted(schema.names) != sorted(other.names):
        different = sorted(set(schema.names) ^ set(other.names))
        raise ValueError(f"{place.name} has other columns than the files before it: {', '.join(different[:8])}")
    return pa.unify_schemas([schema, other], promote_options="permissive")


def _parquet(stream) -> parquet.ParquetFile:  # type: ignore[no-untyped-def]
    return parquet.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def _row_groups(file: parquet.ParquetFile, column: str | None) -> Iterator[tuple[int, int]]:
    """(rows, entries of the list column) of each row group."""
    about = file.metadata
    if column is None:
        yield from ((about.row_group(number).num_rows, 0) for number in range(about.num_row_groups))
        return
    paths = [about.schema.column(place).path for place in range(about.num_columns)]
    place = next((place for place, path in enumerate(paths) if path.startswith(f"{column}.")), None)
    if place is None:
        raise ValueError(f"there is no list column '{column}' in {', '.join(file.schema_arrow.names[:20])}")
    for number in range(about.num_row_groups):
        group = about.row_group(number)
        yield group.num_rows, group.column(place).num_values
