"""MatrixMarket text, read once from front to back in pieces: a sparse matrix as lines of `row column value`.

pyarrow's CSV parser reads a piece at some 100 MB/s and refuses what is no number; SciPy's reader would hold the whole
matrix. https://math.nist.gov/MatrixMarket/formats.html
"""
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
from pyarrow import csv

from data_pipeline.sources.compressed import check_indices
from data_pipeline.sources.rechunk import Entries
from scgpt.counted import counted

PIECE_BYTES = 16 << 20   # text in memory at once, some 1.5 million entries
_BANNER = re.compile(r"%%MatrixMarket\s+matrix\s+(\w+)\s+(\w+)\s+(\w+)\s*", re.IGNORECASE)
_TYPES = {"integer": (np.dtype(np.int64), pa.int64()), "real": (np.dtype(np.float64), pa.float64())}
_MAX_COMMENTS = 10_000   # lines before the sizes
_MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Header:
    """What the first lines say."""

    n_rows: int
    n_columns: int
    n_entries: int
    field: str               # integer, real

    @property
    def value_type(self) -> np.dtype[np.generic]:
        """Of the entries."""
        return _TYPES[self.field][0]


def read_header(stream: IO[bytes]) -> Header:
    """Read the first lines of a file, up to its sizes; ValueError when it is not a general coordinate matrix."""
    banner = _BANNER.fullmatch(stream.readline(_MAX_LINE_BYTES).decode("latin-1"))
    if banner is None:
        raise ValueError("no MatrixMarket file: its first line does not say so")
    form, field, symmetry = (word.lower() for word in banner.groups())
    if form != "coordinate" or field not in _TYPES or symmetry != "general":
        raise ValueError(f"a matrix of the form '{form} {field} {symmetry}', not 'coordinate integer general'")
    for _ in range(_MAX_COMMENTS):
        line = stream.readline(_MAX_LINE_BYTES)
        if line and not line.isspace() and not line.startswith(b"%"):
            break
    sizes = line.split()
    if len(sizes) != 3 or not all(size.isdigit() for size in sizes):
        raise ValueError("a MatrixMarket file without its line of three sizes")
    n_rows, n_columns, n_entries = map(int, sizes)
    if n_entries > n_rows * n_columns:
        raise ValueError(f"{counted(n_entries, 'entry', 'entries')} in a matrix of {n_rows:,} x {n_columns:,}")
    return Header(n_rows, n_columns, n_entries, field)


def read_entries(stream: IO[bytes], header: Header) -> Iterator[Entries]:
    """(rows, columns, values) in pieces of PIECE_BYTES, counted from 0, in the order of the file.

    Args:
        stream: stands where `read_header` left it.
        header: of the same file.

    Raises ValueError for a line that is no entry, an index outside the matrix, and for more or fewer entries than the
    header says.
    """
    found = 0
    rest = b""
    while True:
        text = stream.read(PIECE_BYTES)
        end = text.rfind(b"\n") + 1
        if text and not end:
            rest += text
            if len(rest) > _MAX_LINE_BYTES:
                raise ValueError("a line without an end")
            continue
        lines, rest = rest + text[:end], text[end:]
        if not text:
            lines, rest = lines + rest, b""
        if lines.strip():
            entries = _parse(lines, header)
            found += len(entries[0])
            yield entries
        if not text:
            break
    if found != header.n_entries:
        raise ValueError(f"{counted(found, 'entry', 'entries')} where the header says {header.n_entries:,}")


def _parse(lines: bytes, header: Header) -> Entries:
    if b"\t" in lines or b"  " in lines:
        lines = re.sub(rb"[ \t]+", b" ", lines)
    names = ["row", "column", "value"]
    types = dict(zip(names, (pa.int64(), pa.int64(), _TYPES[header.field][1]), strict=True))
    table = csv.read_csv(
        pa.BufferReader(lines), read_options=csv.ReadOptions(column_names=names, use_threads=False),
        parse_options=csv.ParseOptions(delimiter=" ", quote_char=False),
        convert_options=csv.ConvertOptions(column_types=types, null_values=[]))
    rows, columns, values = (table.column(name).to_numpy() for name in names)
    check_indices(rows - 1, header.n_rows, "row")
    check_indices(columns - 1, header.n_columns, "column")
    return rows - 1, columns - 1, values
