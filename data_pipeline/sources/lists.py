"""Tables with a list of gene ids and a list of expressions a cell: Parquet, Arrow, Hugging Face folders, scBank.

What an id stands for is told by a gene table (gene_table.py). Ids of special tokens are no genes and are left out, and
so is a first entry without an expression (negative or missing) whose id the table does not know: `<cls>` is stored
like that by scGPT's and Tahoe-100M's tables. Any other unknown id is a fault.
"""
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import csr_array
from typing_extensions import override

from data_pipeline.sources.base import AUTO, Source, X
from data_pipeline.sources.faults import reading
from data_pipeline.sources.gene_table import SPECIAL, UNKNOWN, GeneTable
from data_pipeline.sources.identity import state_of
from data_pipeline.sources.location import Location
from data_pipeline.sources.obs_columns import is_plain, plain
from data_pipeline.sources.tables import ARROW, EXPRESSIONS, GENES, JSON, PARQUET, Table, open_table
from scgpt.errors import ConfigError, SourceError

_STATE, _SPLITS = "state.json", "dataset_dict.json"            # of `datasets`' save_to_disk
_BANK, _BANK_VOCAB, _TABLE = "manifest.json", "gene_vocab.json", ".datatable"   # of scBank


class ListTable(Source):
    """A table of lists: one file, or a folder of parts."""

    def __init__(self, path: Location, files: Sequence[Location], gene_table: Location | str, *, name: str,
                 layer: str) -> None:
        self.path, self.name, self.layer = path, name, layer
        self.genes = GeneTable.read(gene_table)
        self.n_genes = self.genes.n_genes
        with reading(path, "header"):
            self.table: Table = open_table(tuple(files), GENES, state_of(path))
            self.n_cells = self.table.n_rows
            for name in self.table.schema.names:
                if self.table.schema.names.count(name) > 1:
                    raise ValueError(f"two columns are named '{name}'")
            for column in (GENES, EXPRESSIONS):
                _check_lists(self.table.schema, column)
            self._categories = _class_labels(self.table.schema)

    @classmethod
    def open(cls, location: Location, *, name: str, layer: str = AUTO, gene_table: str | None = None) -> "ListTable":
        """Find the files of a table; ConfigError without a gene table."""
        _check_layer(layer, [X], location)
        if gene_table is None:
            raise ConfigError("a table of lists holds gene ids, not what they stand for", where=str(location),
                              fix="give the file that says so (gene_table: vocab.json or gene_metadata.parquet), or "
                                  "gene_table: scgpt-human")
        return cls(location, _files(location), gene_table, name=name, layer=X)

    @override
    def close(self) -> None:
        """Nothing is held open."""

    @override
    def other_matrices(self) -> list[str]:
        return []

    @override
    def gene_columns(self) -> list[str]:
        return list(self.genes.columns)

    @override
    def _names_in(self, column: str) -> list[str]:
        return self.genes.columns[column]

    @override
    def obs_columns(self) -> list[str]:
        return [field.name for field in self.table.schema if is_plain(field.type)]

    @override
    def obs(self, columns: Sequence[str], first: int = 0, last: int | None = None) -> dict[str, pa.Array]:
        last = self.n_cells if last is None else last
        columns = list(columns)
        if not columns:
            return {}
        with reading(self.path, f"{', '.join(columns)}, rows {first} to {last}"):
            found = self.table.read_table(columns, first, last)
            return {name: self._plain(name, found.column(name)) for name in columns}

    @override
    def value_offsets(self, first: int, last: int) -> NDArray[np.int64]:
        return self.table.value_offsets(first, last)

    @override
    def bytes_per_value(self) -> int:
        types = [self.table.schema.field(column).type.value_type for column in (GENES, EXPRESSIONS)]
        return 4 + sum(int(kind.bit_width) // 8 for kind in types)   # the ids, and what they are turned into

    @override
    def stored_share(self) -> float:
        return 1.0

    @property
    @override
    def chunk_bytes(self) -> int:
        return self.table.piece_bytes

    @override
    def read_rows(self, first: int, last: int) -> csr_array:
        with reading(self.path, f"rows {first} to {last}"):
            parts = []
            row = first
            for batch in self.table.read([GENES, EXPRESSIONS], first, last):
                parts.append(_to_csr(batch, self.genes, row, self.path))
                row += batch.num_rows
            return _stack(parts, self.n_genes)

    def _plain(self, name: str, column: pa.ChunkedArray) -> pa.Array:
        """A column as the base class promises it."""
        values = column.combine_chunks()
        if name in self._categories:
            return pa.DictionaryArray.from_arrays(values.cast(pa.int32()), pa.array(self._categories[name]))
        return plain(values)


class ScBank(ListTable):
    """A folder as scGPT's scBank writes it: tables, what their ids stand for, and which table is the main one."""

    def __init__(self, path: Location, tables: Mapping[str, str], gene_table: Location | str, *, name: str,
                 layer: str) -> None:
        self._tables = tables   # layer -> its file
        super().__init__(path, [path / tables[layer]], gene_table, name=name, layer=layer)

    @classmethod
    @override
    def open(cls, location: Location, *, name: str, layer: str = AUTO, gene_table: str | None = None) -> "ScBank":
        """Choose a table: the one named by `layer`, else the main one of the manifest, else the only one."""
        names = location.names()
        tables = {file.removesuffix(f"{_TABLE}{ending}"): file for ending in (*JSON, *PARQUET)   # Parquet before JSON
                  for file in names if file.endswith(f"{_TABLE}{ending}")}
        if not tables:
            raise SourceError(f"it holds no table (NAME{_TABLE}.parquet or NAME{_TABLE}.json)", where=str(location),
                              fix="give a folder that scGPT's DataBank has written, with its tables in it")
        if gene_table is None and _BANK_VOCAB not in names:
            raise SourceError(f"it holds no {_BANK_VOCAB}", where=str(location),
                              fix="put the vocabulary beside the tables, or give it as gene_table")
        if layer == AUTO:
            with reading(location, _BANK):
                main = str(_json(location / _BANK).get("main_data")) if _BANK in names else None
            layer = main if main in tables else next(iter(tables)) if len(tables) == 1 else AUTO
        _check_layer(layer, list(tables), location)
        return cls(location, tables, gene_table or location / _BANK_VOCAB, name=name, layer=layer)

    @override
    def other_matrices(self) -> list[str]:
        return [table for table in self._tables if table != self.layer]


def _files(path: Location) -> list[Location]:
    """The files of a table in their order: itself, the shards of a Hugging Face folder, or the parts of a folder."""
    names = path.names()
    if not names and not path.is_folder():
        return [path]
    if _SPLITS in names:
        with reading(path, _SPLITS):
            splits = [str(split) for split in _json(path / _SPLITS)["splits"]]
        raise SourceError(f"a dictionary of data sets: {', '.join(splits) or 'none'}", where=str(path),
                          fix=f"give them one by one: {path / splits[0]}" if splits else "give a data set")
    if _STATE in names:
        with reading(path, _STATE):
            listed = [str(file["filename"]) for file in _json(path / _STATE)["_data_files"]]
            for name in listed:   # nor may it name a file elsewhere, which no check of the folder would see
                if name not in names:
                    raise ValueError(f"it lists the file '{name}', which the folder does not hold")
            return [path / name for name in listed]
    for endings in (PARQUET, ARROW):
        found = [name for name in names if name.endswith(endings)]
        if found:
            return [path / name for name in found]
    raise SourceError("no Parquet or Arrow file is in this folder", where=str(path),
                      fix=f"give the folder with the files: it holds {', '.join(names[:8]) or 'nothing'}")


def _json(place: Location) -> dict[str, Any]:
    with place.open() as stream:
        held = json.load(stream)
    if not isinstance(held, dict):
        raise ValueError("not a JSON object")   # noqa: TRY004 of a file, not of an argument
    return held


def _check_layer(layer: str, layers: Sequence[str], path: Location) -> None:
    if layer not in {AUTO, X} if layers == [X] else layer not in layers:
        what = "it holds several tables, and names no main one" if layer == AUTO else f"there is no layer '{layer}'"
        raise ConfigError(what, where=str(path), fix=f"choose layer: {' or '.join(layers)}")


def _check_lists(schema: pa.Schema, column: str) -> None:
    if column not in schema.names:
        raise ValueError(f"there is no column '{column}' among {', '.join(schema.names[:20])}")
    kind = schema.field(column).type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_list(kind) for is_list in lists) or not (
            pa.types.is_integer(kind.value_type) or (column == EXPRESSIONS and pa.types.is_floating(kind.value_type))):
        raise ValueError(f"the column '{column}' holds {kind}, not lists of numbers")


def _class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Columns of numbers that stand for names -> the names, as `datasets` writes them beside the schema."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {}) if isinstance(about, dict) else {}
    return {name: [str(label) for label in feature["names"]] for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and name in schema.names}


def _to_csr(batch: pa.RecordBatch, genes: GeneTable, first: int, path: Location) -> csr_array:
    """The rows of a batch, (rows, n_genes), without special tokens.

    Raises ValueError for lists that do not fit, SourceError for an id that the table does not know; both name the row,
    counted from `first`.
    """
    lists = [batch.column(column) for column in (GENES, EXPRESSIONS)]
    lengths, others = (pc.list_value_length(column) for column in lists)
    differ = pc.fill_null(pc.not_equal(lengths, others), fill_value=True).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(differ)[:1].tolist():
        raise ValueError(f"row {first + row}: {lengths[row]} in genes, {others[row]} in expressions")
    offsets = np.concatenate([[0], np.cumsum(lengths.to_numpy(), dtype=np.int64)])
    ids = pc.fill_null(pc.list_flatten(lists[0]).cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    values = pc.list_flatten(lists[1]).to_numpy(zero_copy_only=False)   # missing ones become NaN
    values = values.astype(np.float32) if values.dtype == np.float16 else values   # SciPy knows no halves
    known = (ids >= 0) & (ids < len(genes.places))
    places = np.where(known, genes.places[np.where(known, ids, 0)], UNKNOWN)
    opens = np.zeros(len(ids), bool)
    opens[offsets[:-1][lengths.to_numpy() > 0]] = True
    marker = (places == SPECIAL) | ((places == UNKNOWN) & opens & ~(values >= 0))
    for place in np.flatnonzero((places == UNKNOWN) & ~marker)[:1].tolist():
        row = first + int(np.searchsorted(offsets, place, side="right")) - 1
        if not pc.list_flatten(lists[0])[place].is_valid:
            raise ValueError(f"row {row} lacks the id of a gene")
        raise SourceError(f"row {row} holds the id {ids[place]}, which the gene table does not know", where=str(path),
                          fix="give the gene table that belongs to it (gene_table)")
    kept = ~marker
    before = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])
    return csr_array((values[kept], places[kept], before[offsets]), shape=(batch.num_rows, genes.n_genes))


def _stack(parts: Sequence[csr_array], n_genes: int) -> csr_array:
    """Rows below rows."""
    if not parts:
        return csr_array((0, n_genes), dtype=np.float32)
    indptr = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part.indptr) for part in parts]))])
    return csr_array((np.concatenate([part.data for part in parts]), np.concatenate([part.indices for part in parts]),
                      indptr.astype(np.int64)), shape=(len(indptr) - 1, n_genes))
