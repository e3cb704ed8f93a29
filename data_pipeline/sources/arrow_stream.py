"""Arrow IPC files and streams by record batch: where each batch lies and how long it is, told by its header alone.

pyarrow reads the batches of a stream only one after the other, bodies included, which over a network means all of it
for each block of rows. A batch's header says its rows and its lengths: this module walks from header to header
(a few hundred bytes each) and reads the batches that are asked for. Both forms hold the same messages, and a whole one
ends with a marker, which a truncated one lacks. https://arrow.apache.org/docs/format/Columnar.html
"""
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from data_pipeline.sources.location import Location
from scgpt.counted import counted
from scgpt.data.ipc_message import field, follow

_FILE_MAGIC, _FILE_END = b"ARROW1\0\0", b"ARROW1"
_CONTINUATION = 0xFFFFFFFF
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3    # MessageHeader, Schema.fbs
_MAX_HEADER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Batch:
    """A record batch of a file."""

    offset: int    # bytes from the start of the file to its message
    bytes: int     # of the message, body included
    rows: int
    values: int    # entries of the list column that was asked about; of a slice perhaps more than its rows hold


@dataclass(frozen=True, slots=True)
class ArrowFile:
    """The layout of one file."""

    place: Location
    schema: pa.Schema
    head: tuple[tuple[int, int], ...]   # (offset, bytes) of the schema's message and of the dictionaries'
    batches: tuple[Batch, ...]

    @classmethod
    def read(cls, place: Location, column: str) -> "ArrowFile":
        """Walk over the headers of a file; `column` is the list column whose lengths are told.

        Raises ValueError when it is not Arrow IPC, or is not whole.
        """
        with place.open() as stream:
            start = len(_FILE_MAGIC) if stream.read(len(_FILE_MAGIC)) == _FILE_MAGIC else 0
            if start:
                stream.seek(-len(_FILE_END), os.SEEK_END)
                if stream.read(len(_FILE_END)) != _FILE_END:
                    raise ValueError("an Arrow file without its end: cut, or still being written")
            head, batches = [], []
            schema, node = None, -1
            for offset, header, size in _messages(stream, start):
                kind, table = _message(header)
                if kind == _SCHEMA:
                    schema = pa.ipc.read_schema(pa.py_buffer(_prefixed(header)))
                    node = _node_of(schema, column)
                if kind in {_SCHEMA, _DICTIONARY}:
                    head.append((offset, size))
                elif kind == _BATCH and schema is not None:
                    batches.append(Batch(offset, size, *_lengths(header, table, node)))
            if schema is None:
                raise ValueError("an Arrow file without a schema")
        return cls(place, schema, tuple(head), tuple(batches))

    def read_batches(self, numbers: Sequence[int], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Batches by their numbers, with these columns; of a local file not copied where no column is categorical."""
        categorical = any(pa.types.is_dictionary(field.type) for field in self.schema)
        stream = pa.PythonFile(self.place.open(), mode="r") if self.place.is_remote else pa.memory_map(self.place.url)
        with stream:
            for number in numbers:
                batch = self.batches[number]
                if categorical:   # a stream of its own: the schema, the dictionaries up to here, the batch
                    parts = [part for part in self.head if part[0] < batch.offset] + [(batch.offset, batch.bytes)]
                    whole = pa.py_buffer(b"".join(_bytes(stream, *part) for part in parts))
                    found = pa.ipc.open_stream(whole).read_next_batch()
                else:
                    stream.seek(batch.offset)
                    found = pa.ipc.read_record_batch(pa.ipc.read_message(stream), self.schema)
                found.validate(full=True)
                if found.num_rows != batch.rows:
                    raise ValueError(f"a record batch of {counted(found.num_rows, 'row')} where its "
                                     f"header says {batch.rows}")
                yield found.select(list(columns))


def _messages(stream, start: int) -> Iterator[tuple[int, bytes, int]]:  # type: ignore[no-untyped-def]
    """(offset, header, bytes with body) of each message; ValueError when the last is not followed by the end marker."""
    offset = start
    stream.seek(0, os.SEEK_END)
    end = stream.tell()
    while True:
        stream.seek(offset)
        prefix = stream.read(8)
        if len(prefix) < 8 or prefix[:4] != _CONTINUATION.to_bytes(4, "little"):
            raise ValueError("not Arrow IPC" if offset == start else "an Arrow stream without its end: cut, or still "
                             "being written")
        size = int.from_bytes(prefix[4:], "little", signed=True)
        if size == 0:
            return
        header = stream.read(size) if 0 < size <= _MAX_HEADER_BYTES else b""
        if len(header) != size:
            raise ValueError("a header of an Arrow message that is cut or damaged")
        body = _number(header, field(header, follow(header, 0), 3), "q")
        if body < 0 or offset + 8 + size + body > end:
            raise ValueError("an Arrow message that is longer than its file")
        yield offset, header, 8 + size + body
        offset += 8 + size + body


def _number(header: bytes, place: int, kind: str) -> int:
    """The number of a field at a place; 0, its default, where it is not there."""
    return int(struct.unpack_from(f"<{kind}", header, place)[0]) if place else 0


def _message(header: bytes) -> tuple[int, int]:
    """The kind of a message, and the place of the table that tells the rest."""
    message = follow(header, 0)
    kind, place = field(header, message, 1), field(header, message, 2)
    if not kind or not place:
        raise ValueError("an Arrow message without a header")
    return header[kind], follow(header, place)


def _lengths(header: bytes, table: int, node: int) -> tuple[int, int]:
    """Rows of a record batch, and entries of its node (a column, or a list's values) of this number."""
    rows = _number(header, field(header, table, 0), "q")
    nodes = follow(header, field(header, table, 1))
    if not 0 <= node < _number(header, nodes, "I") or rows < 0:
        raise ValueError("a record batch that does not fit its schema")
    return rows, max(_number(header, nodes + 4 + 16 * node, "q"), 0)


def _node_of(schema: pa.Schema, column: str) -> int:
    """The number of the values of a list column, in the order in which a batch tells of its columns."""
    place = schema.get_field_index(column)
    if place < 0:
        raise ValueError(f"there is no column '{column}' in {', '.join(schema.names[:20])}")
    return sum(_n_nodes(schema.field(number).type) for number in range(place)) + 1


def _n_nodes(kind: pa.DataType) -> int:
    if isinstance(kind, pa.BaseExtensionType):
        return _n_nodes(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return 1
    return 1 + sum(_n_nodes(kind.field(number).type) for number in range(kind.num_fields))


def _prefixed(header: bytes) -> bytes:
    return struct.pack("<Ii", _CONTINUATION, len(header)) + header


def _bytes(stream: pa.NativeFile, offset: int, size: int) -> bytes:
    stream.seek(offset)
    found: bytes = stream.read(size)
    if len(found) != size:
        raise ValueError("a file that became shorter")
    return found
