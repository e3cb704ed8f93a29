"""The kinds of atlas: how each is told by its name or its content, and which reader opens it.

A new kind is one line of KINDS and one module whose reader has `open(location, *, name, layer) -> Source`.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import cast

from data_pipeline.sources.base import AUTO, Source
from data_pipeline.sources.location import Location
from scgpt.errors import ConfigError, SourceError


@dataclass(frozen=True, slots=True)
class Kind:
    """How a kind is known, and who reads it."""

    reader: str                     # module:class, imported when such a source is opened
    suffixes: tuple[str, ...] = ()  # of a file's or a folder's name
    holds: tuple[str, ...] = ()     # globs of names: a folder with one of them in it is of this kind
    ids: bool = False               # holds ids of genes: its reader's `open` takes a `gene_table`


# In the order in which `auto` tries them.
KINDS: Mapping[str, Kind] = {
    "h5ad": Kind("h5ad:H5ad", (".h5ad",)),
    "zarr": Kind("anndata_zarr:AnnDataZarr", (".zarr", ".zarr.zip"), ("zarr.json", ".zgroup")),
    "10x_h5": Kind("tenx:TenxH5", (".h5",)),
    "10x_mtx": Kind("tenx_folder:TenxFolder", holds=("*matrix.mtx", "*matrix.mtx.gz")),
    "soma": Kind("soma:SomaExperiment", (".soma",), ("__tiledb_group.tdb",)),
    "scbank": Kind("lists:ScBank", (".scb",), ("*.datatable.*", "gene_vocab.json"), ids=True),
    "corpus": Kind("corpus:Corpus", holds=("manifest.json",)),
    "lists": Kind("lists:ListTable", (".parquet", ".arrow", ".feather"),
                  ("*.parquet", "*.arrow", "*.feather", "dataset_dict.json"), ids=True),
}


def open_source(place: Location | Path | str, *, name: str | None = None, kind: str = AUTO,
                layer: str = AUTO, gene_table: str | None = None) -> Source:
    """Open an atlas; headers only.

    Args:
        place: a file or a folder, local or a URL.
        name: of the source; None: the file's or folder's name without its ending.
        kind: one of KINDS, or `auto` to go by the name, then, for a folder, by what is in it.
        layer: `X`, `raw`, the name of a layer; `auto`: X where it holds counts, else raw where that does, else X.
        gene_table: of a kind that holds ids instead of genes: what they stand for.

    Raises SourceError when there is no such source, or it is not what its kind says; ConfigError for a gene table that
    is missing, or of no use.
    """
    location = Location.of(place)
    location.check()
    kind = kind_of(location) if kind == AUTO else kind
    module, _, reader = KINDS[kind].reader.partition(":")
    if gene_table is not None and not KINDS[kind].ids:
        raise ConfigError(f"the kind {kind} names its genes itself", where=str(location), fix="leave gene_table out")
    opened = getattr(import_module(f"data_pipeline.sources.{module}"), reader).open(
        location, name=name or location.stem, layer=layer, **({"gene_table": gene_table} if KINDS[kind].ids else {}))
    opened.kind = kind
    return cast(Source, opened)


def is_kind(kind: str, location: Location) -> bool:
    """Whether a folder holds what tells this kind."""
    return _holds(kind, location.names())


def _holds(kind: str, names: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for name in names for pattern in KINDS[kind].holds)


def kind_of(location: Location) -> str:
    """The kind of a source by its name, else by what lies in the folder; SourceError when neither says it."""
    found = location.name.lower()
    for kind, known in KINDS.items():
        if found.endswith(known.suffixes or ("\0",)):
            return kind
    within = location.names()
    for kind in KINDS:
        if _holds(kind, within):
            return kind
    choice = ", ".join(KINDS)
    if location.is_folder():
        example = next((f"; for all atlases in it: {location}/*{Path(name).suffix}" for name in within
                        if Path(name).suffix in {ending for known in KINDS.values() for ending in known.suffixes}), "")
        raise SourceError("what the folder holds names no kind of atlas", where=str(location),
                          fix=f"say what it is (kind: {choice}){example}")
    raise SourceError(f"the suffix '{location.suffix}' names no kind of atlas", where=str(location),
                      fix=f"give an .h5ad file, or say what it is (kind: {choice})")
