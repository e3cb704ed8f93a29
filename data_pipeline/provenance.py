"""Was it seen: are the cells, the donor or the dataset of a file, or a group by name, in a corpus, and in which split?

Cells are compared by their content hash: equal genes and values after the same mapping. So a cell is found under any
name and in any order of rows and genes, and is not found once one count differs: other filters of genes, other
alignments. Then donor and dataset tell more. Memory: 8 bytes a cell of the file, beside one part of the corpus.
"""
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.cells import ObsReader
from data_pipeline.config import CellsConfig, SourceConfig
from data_pipeline.genes import map_source
from data_pipeline.plan import row_blocks
from data_pipeline.sources.base import Source
from data_pipeline.sources.hdf5_structure import check_structure
from data_pipeline.sources.identity import fingerprint, identity_of, sha256_of
from data_pipeline.sources.kinds import open_source
from data_pipeline.sources.location import Location
from data_pipeline.tokenization import tokenize_block
from scgpt.data.content import content_hashes
from scgpt.data.corpus_files import CorpusFiles
from scgpt.data.dataset import TokenDataset
from scgpt.data.manifest import Manifest, SourceEntry
from scgpt.data.schema import CONTENT_HASH, EXPRESSIONS, SOURCE, RaggedBatch
from scgpt.data.shards import part_bounds, windows
from scgpt.errors import ConfigError, SourceError

_WINDOW_CELLS = 256          # a sample is taken in runs of so many rows: reading single rows would cost as much
_MIN_GENES = 20              # below, a cell may equal another by chance (cells.duplicate_min_genes of older corpora)
GROUP_COLUMNS = ("dataset", "donor")

Seen = dict[str, Any]


def was_seen(corpus: Path | str, asked: str, *, sample: int | None = None, gene_table: str | None = None) -> Seen:
    """Look a file, or a group such as a donor's id, up in a corpus.

    Args:
        corpus: a folder or URL.
        asked: path or URL of an atlas; else the value of a metadata column, or `column=value`.
        sample: look at so many cells of a file only, spread over it; None: at all.
        gene_table: of a file that holds ids instead of genes: what they stand for.

    Returns plain values: `seen` (None where no cell of a file could be compared), and what was found where. Raises
    DataError and SourceError for what cannot be read, ConfigError for an empty name and for a column that the corpus
    does not keep.
    """
    files = CorpusFiles(corpus)
    manifest = Manifest.read(files)
    column, mark, value = asked.partition("=")
    if not asked.rpartition("=")[2]:   # a shell variable that is not set: "no" would be a wrong answer
        raise ConfigError(f"'{asked}' names no file and no group", fix="give a path, a name, or column=name")
    location = Location.of(asked)
    if location.exists():
        return _file_seen(files, manifest, location, sample, gene_table)
    if mark and column in (SOURCE, *GROUP_COLUMNS, *manifest.columns):
        return _group_seen(files, manifest, column, value)
    if "/" in asked or location.stem != location.name:   # a path with a slip in it is not answered with no
        raise SourceError("there is no such file", where=str(location),
                          fix="check the path; a group of such a name is asked for as column=value")
    if mark:
        raise ConfigError(f"the corpus keeps no column '{column}'", where=files.where(),
                          fix=f"choose one of: {', '.join([SOURCE, *manifest.columns])}")
    return _group_seen(files, manifest, None, asked)


# ---- a group ----


def _group_seen(files: CorpusFiles, manifest: Manifest, column: str | None, value: str) -> Seen:
    columns = [SOURCE, *manifest.columns] if column is None else [column]
    found = {name: counts for name in columns if (counts := _cells_with(files, manifest, name, [value])[value])}
    by = manifest.config.get("splits", {}).get("by")
    splits = [name for name, split in manifest.splits.items() if value in (split.groups or [])]
    if splits and by not in found and column in (None, by):
        found[by] = dict.fromkeys(splits)   # the column is not kept: known by the published groups only
    return {"asked": value, "kind": "group", "columns": columns, "cells": found, "seen": bool(found),
            "left_out": [source.reason for source in manifest.quarantined or [] if source.name == value]}


def _cells_with(files: CorpusFiles, manifest: Manifest, column: str,
                values: Sequence[str]) -> dict[str, dict[str, int | None]]:
    """value -> split -> cells of the corpus that have it in `column`, for the given values."""
    found: dict[str, dict[str, int | None]] = {value: {} for value in values}
    if column not in (SOURCE, *manifest.columns):
        return found
    wanted = pa.array(values, pa.string())
    for name, split in manifest.splits.items():
        for part in split.parts:
            with files.opened(part.obs.file) as stream:
                held = pq.read_table(stream, columns=[column]).column(0).cast(pa.string())
            for item in pc.value_counts(held.filter(pc.is_in(held, wanted))).to_pylist():
                counts = found[item["values"]]
                counts[name] = (counts.get(name) or 0) + item["counts"]
    return found


# ---- a file ----


def _file_seen(files: CorpusFiles, manifest: Manifest, location: Location, sample: int | None,
               gene_table: str | None) -> Seen:
    config = _settings_of(manifest, location)
    check_structure(location)
    with open_source(location, kind=config.kind, layer=config.layer, gene_table=gene_table) as source:
        layer, groups = source.layer, _groups_of(source, config)
        hashes = _hashes_of(source, files, manifest, config, sample)
        n_cells = source.n_cells
    unique, inverse = np.unique(hashes, return_inverse=True)
    hits = {name: _hits(files, manifest, name, unique)[inverse] for name in manifest.splits}
    anywhere = int(np.any(list(hits.values()), axis=0).sum()) if hits else 0
    found = {column: _cells_with(files, manifest, column, values) for column, values in groups.items()}
    same = _same_file(manifest, location)
    return {"asked": location.name, "kind": "file", "layer": layer, "cells_in_file": n_cells, "compared": len(hashes),
            "found": anywhere, "share": anywhere / len(hashes) if len(hashes) else 0.0,
            "splits": {name: int(hit.sum()) for name, hit in hits.items()}, "same_file": same,
            "groups": {column: {"values": len(values), "in_corpus": {value: cells for value, cells in values.items()
                                                                     if cells}} for column, values in found.items()},
            "seen": bool(anywhere or same) if same or len(hashes) else None}   # nothing compared is no "no"


def _settings_of(manifest: Manifest, location: Location) -> SourceConfig:
    """How the corpus read its source of this file name, else the defaults."""
    known_files = {source.file for source in manifest.sources}
    for source in manifest.config.get("sources", []):
        if location.name in known_files and fnmatch(location.name, source["path"]):
            known = {key: source[key] for key in ("kind", "layer", "gene_column", "columns") if key in source}
            return SourceConfig(path=str(location), **known)
    return SourceConfig(path=str(location))


def _groups_of(source: Source, config: SourceConfig) -> dict[str, list[str]]:
    """The datasets and donors that the file names, sorted."""
    reader = ObsReader.of(source, config, (), CellsConfig())
    found = {}
    for column in GROUP_COLUMNS:
        if column in reader.own_name:
            values = reader.metadata(source, [column], 0, source.n_cells)[column]
            found[column] = sorted(values.cast(pa.string()).unique().drop_null().to_pylist())
    return found


def _same_file(manifest: Manifest, location: Location) -> str | None:
    """The source of the corpus that is this very file; it is hashed only where the size agrees with one."""
    size = fingerprint(location).bytes
    alike: list[SourceEntry] = [source for source in manifest.sources if source.bytes == size]
    known = {"sha256": sha256_of(location)} if any(source.sha256 for source in alike) else {}
    known |= identity_of(location) if any(source.etag for source in alike) else {}
    return next((source.name for source in alike if {"sha256": source.sha256, "etag": source.etag}.items()
                 & known.items()), None)


def _hashes_of(source: Source, files: CorpusFiles, manifest: Manifest, config: SourceConfig,
               sample: int | None) -> NDArray[np.uint64]:
    """The content hash of each cell that has genes enough to tell, in the order of the rows, (compared,)."""
    dataset = TokenDataset(files, next(iter(manifest.splits)), manifest)
    genes = map_source(source, dataset.vocab, gene_column=config.gene_column)
    rounded = _float_values(manifest, dataset)
    least = manifest.config.get("cells", {}).get("duplicate_min_genes", _MIN_GENES)
    blocks = [(first, last) for first, last, _ in row_blocks(source)]
    found = [np.zeros(0, np.uint64)]
    with _cut(source, blocks):
        for first, last in blocks if source.by_columns else _windows(blocks, source.n_cells, sample):
            cells = tokenize_block(source, genes, first, last, counts=manifest.expression_kind == "counts")
            if rounded:
                cells = RaggedBatch(cells.genes, cells.expressions.astype(np.float32), cells.offsets, cells.columns)
            found.append(content_hashes(cells)[0][cells.lengths >= least])
    return np.concatenate(found)


def _float_values(manifest: Manifest, dataset: TokenDataset) -> bool:
    """Whether the corpus stores float32: integers that do not fit it were rounded there."""
    if manifest.expression_kind == "counts" or not len(dataset):
        return False
    kind: str = dataset[0][EXPRESSIONS].dtype.kind
    return kind == "f"


def _windows(blocks: Sequence[tuple[int, int]], n_cells: int, sample: int | None) -> Iterator[tuple[int, int]]:
    """The blocks, or runs of rows spread evenly over the file, `sample` cells together."""
    if sample is None or sample >= n_cells:
        yield from blocks
        return
    runs = -(-sample // _WINDOW_CELLS)
    for run in range(runs):
        taken, next_taken = run * sample // runs, (run + 1) * sample // runs
        first = taken + run * (n_cells - sample) // runs
        yield first, first + next_taken - taken


@contextmanager
def _cut(source: Source, blocks: Sequence[tuple[int, int]]) -> Iterator[None]:
    """A matrix that is stored by columns is cut into its blocks once, into a temporary folder."""
    if not source.by_columns or len(blocks) < 2:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="scgpt-seen-") as folder:
        source.cut_row_blocks([first for first, _ in blocks], Path(folder) / "rows")
        source.use_row_blocks(Path(folder) / "rows")
        yield


def _hits(files: CorpusFiles, manifest: Manifest, split: str, unique: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of the sorted hashes are those of cells of a split, (unique,)."""
    hits = np.zeros(len(unique), bool)
    for held in stored_hashes(files, manifest, split):
        places = np.minimum(np.searchsorted(unique, held), max(len(unique) - 1, 0))
        if len(unique):
            hits[places[unique[places] == held]] = True
    return hits


def stored_hashes(files: CorpusFiles, manifest: Manifest, split: str) -> Iterator[NDArray[np.uint64]]:
    """The content hashes of a split's cells, in their order; made from the tokens where an older corpus lacks them."""
    entry, dataset = manifest.splits[split], TokenDataset(files, split, manifest)
    for part, (first, last) in zip(entry.parts, part_bounds([part.cells for part in entry.parts]), strict=True):
        with files.opened(part.obs.file) as stream:
            table = pq.ParquetFile(stream)
            if CONTENT_HASH in table.schema_arrow.names:
                yield table.read([CONTENT_HASH]).column(0).to_numpy()
                continue
        for start, stop in windows(dataset.shards, first, last):
            yield content_hashes(dataset.fetch(np.arange(start, stop)))[0]
