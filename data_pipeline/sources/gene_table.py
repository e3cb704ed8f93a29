"""What gene each id of a table of lists stands for: a vocab.json, or a table with a column of ids and columns of names.

Tokens in angle brackets (`<cls>`, `<pad>`) are no genes.
"""
import json
import re
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.sources.base import INDEX
from data_pipeline.sources.faults import reading
from data_pipeline.sources.location import Location
from scgpt.errors import ConfigError
from scgpt.vocab import PUBLISHED, GeneVocab

UNKNOWN, SPECIAL = -1, -2
_IDS = ("token_id", "gene_token_id", "token", "id")   # what the column of ids may be called, the likeliest first
_MAX_ID = 1 << 26
_SPECIAL = re.compile(r"<[^<>]+>")
_HELP = "give a vocab.json, or a parquet, csv or tsv with one column of integer ids and columns of names"


@dataclass(frozen=True, slots=True)
class GeneTable:
    """The genes that ids stand for, in the order of the ids."""

    columns: dict[str, list[str]]   # INDEX (the first column of names) and each by its own name -> (n_genes,)
    places: NDArray[np.int32]       # (largest id + 1,)  id -> place among the genes, UNKNOWN or SPECIAL

    @property
    def n_genes(self) -> int:
        """Genes of the table."""
        return len(self.columns[INDEX])

    @classmethod
    def read(cls, place: Location | str) -> "GeneTable":
        """Read a table; `scgpt-human` is the published vocabulary. Raises SourceError or ConfigError."""
        if place == PUBLISHED:
            return cls.of(dict(GeneVocab.named(PUBLISHED).get_stoi()))
        place = Location.of(place)
        with reading(place, "gene table", fix=_HELP), place.open() as stream:
            if place.suffix == ".json":
                return cls.of(_ids_of(json.load(stream)))
            return cls._of_table(_read_table(place, stream), place)

    @classmethod
    def of(cls, ids: dict[str, int]) -> "GeneTable":
        """From name -> id."""
        names = sorted(ids, key=lambda name: ids[name])
        return cls._make(np.array([ids[name] for name in names], np.int64), {INDEX: names})

    @classmethod
    def _of_table(cls, table: pa.Table, place: Location) -> "GeneTable":
        numbers = [field.name for field in table.schema if pa.types.is_integer(field.type)]
        chosen = next((name for name in _IDS if name in numbers), numbers[0] if len(numbers) == 1 else None)
        words = [field.name for field in table.schema if pa.types.is_string(field.type)
                 or pa.types.is_large_string(field.type)]
        if chosen is None or not words:
            raise ConfigError(f"no column of ids, or none of names, among {', '.join(table.column_names[:10])}",
                              where=f"{place}, gene table", fix=_HELP)
        ids = table.column(chosen)
        if ids.null_count:
            raise ValueError(f"missing ids in the column '{chosen}'")
        numbers_of = ids.to_numpy().astype(np.int64)
        order = np.argsort(numbers_of, kind="stable")
        columns = {name: [word or "" for word in table.column(name).take(order).to_pylist()] for name in words}
        return cls._make(numbers_of[order], {INDEX: columns[words[0]], **columns})

    @classmethod
    def _make(cls, ids: NDArray[np.int64], columns: dict[str, list[str]]) -> "GeneTable":
        """From ids in ascending order, (rows,), and what they stand for, (rows,) each."""
        if len(ids) and not (ids[0] >= 0 and ids[-1] < _MAX_ID):
            raise ValueError(f"an id outside 0 .. {_MAX_ID - 1}")
        if (np.diff(ids) == 0).any():
            raise ValueError(f"the id {ids[:-1][np.diff(ids) == 0][0]} stands for two genes")
        special = np.array([bool(_SPECIAL.fullmatch(name)) for name in columns[INDEX]], bool)
        if special.all():
            raise ValueError("it lists no genes")
        places = np.full(int(ids[-1]) + 1, UNKNOWN, np.int32)
        places[ids] = np.where(special, SPECIAL, np.cumsum(~special) - 1)
        kept = np.flatnonzero(~special)
        return cls({key: [names[place] for place in kept] for key, names in columns.items()}, places)


def _ids_of(held: object) -> dict[str, int]:
    if not isinstance(held, dict) or not all(isinstance(value, int) for value in held.values()):
        raise ValueError("not a mapping of names to ids")
    return held


def _read_table(place: Location, stream: IO[bytes]) -> pa.Table:
    if place.suffix in {".csv", ".tsv"}:
        from pyarrow import csv

        return csv.read_csv(stream, parse_options=csv.ParseOptions(delimiter="\t" if place.suffix == ".tsv" else ","))
    from pyarrow import parquet

    return parquet.read_table(stream, use_threads=False)
