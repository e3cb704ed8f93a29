"""Tables as JSON, a line a row, such as scBank's `on_disk_format: json`: cut once into pieces of whole lines.

Text says nowhere how many rows it has: the whole file is parsed, a piece at a time, when the table is opened.
"""
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json

from data_pipeline.sources.arrow_stream import Batch
from data_pipeline.sources.location import Location
from scgpt.counted import counted

_PIECE_BYTES = 1 << 20
_MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class JsonLines:
    """The layout of one file."""

    place: Location
    schema: pa.Schema
    batches: tuple[Batch, ...]

    @classmethod
    def read(cls, place: Location, column: str, lists: Mapping[str, pa.DataType]) -> "JsonLines":
        """Parse a file; `column` is the list column whose lengths are told, `lists` the types of list columns.

        Raises ValueError (pyarrow's are) when it is not such a table.
        """
        schema: pa.Schema | None = None
        wanted = pa.schema([])
        batches = []
        for offset, text in _pieces(place):
            if schema is None:
                names = _parse(text, wanted).schema.names
                if column not in names:
                    raise ValueError(f"there is no list column '{column}' in {', '.join(names[:20])}")
                wanted = pa.schema([(name, kind) for name, kind in lists.items() if name in names])
            table = _parse(text, wanted)
            found = pa.schema([pa.field(field.name, pa.string() if pa.types.is_timestamp(field.type) else field.type)
                               for field in table.schema])   # what looks like a time is the text that it is
            schema = found if schema is None else pa.unify_schemas([schema, found], promote_options="permissive")
            values = pc.sum(pc.list_value_length(table.column(column))).as_py() or 0
            batches.append(Batch(offset, len(text), table.num_rows, values))
        if schema is None:
            raise ValueError(f"{place.name} is empty")
        return cls(place, schema, tuple(batches))

    def read_batches(self, numbers: Sequence[int], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Pieces by their numbers, with these columns."""
        with self.place.open() as stream:
            for number in numbers:
                stream.seek(self.batches[number].offset)
                table = _parse(stream.read(self.batches[number].bytes), self.schema)
                if table.num_rows != self.batches[number].rows:
                    raise ValueError(f"{counted(table.num_rows, 'row')} where there were {self.batches[number].rows}")
                yield from table.select(list(columns)).combine_chunks().to_batches()


def _pieces(place: Location) -> Iterator[tuple[int, bytes]]:
    """(offset, text) of pieces of whole lines, blank ones left out."""
    offset, held = 0, b""
    with place.open() as stream:
        while piece := stream.read(_PIECE_BYTES):
            held += piece
            end = held.rfind(b"\n") + 1
            if not end and len(held) > _MAX_LINE_BYTES:
                raise ValueError(f"a line of more than {_MAX_LINE_BYTES >> 20} MiB")
            if held[:end].strip():
                yield offset, held[:end]
            offset, held = offset + end, held[end:]
    if held.strip():
        yield offset, held


def _parse(text: bytes, schema: pa.Schema) -> pa.Table:
    return json.read_json(pa.BufferReader(text), json.ReadOptions(use_threads=False, block_size=len(text) + 1),
                          json.ParseOptions(explicit_schema=schema))
