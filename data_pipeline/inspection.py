"""What is in a corpus, and in an atlas before it is built: plain values, in bounded memory."""
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.cells import as_text
from data_pipeline.config import GenesConfig
from data_pipeline.genes import map_source, match_genes
from data_pipeline.sources.base import Source, are_counts, describe_values
from data_pipeline.sources.hdf5_structure import check_structure
from data_pipeline.sources.identity import fingerprint
from data_pipeline.sources.kinds import is_kind, open_source
from data_pipeline.sources.location import Location
from scgpt.data.corpus_files import CorpusFiles
from scgpt.data.manifest import MANIFEST, Manifest
from scgpt.errors import ScgptError
from scgpt.vocab import GeneVocab

COMMONEST = 5                # values of a column that are named
_MAX_VALUES = 100_000        # different values of a column that are counted: above, it names single cells
_OBS_CELLS = 1 << 18         # cells of a source whose obs are looked at

Facts = dict[str, Any]


def inspect(place: Path | str, vocab: GeneVocab, *, gene_table: str | None = None) -> Facts:
    """What is in a corpus, where there is a manifest (scBank has one of its own), else in an atlas; see below."""
    location = Location.of(place)
    if (location / MANIFEST).exists() and not is_kind("scbank", location):
        return inspect_corpus(place)
    return inspect_source(place, vocab, gene_table=gene_table)


def inspect_corpus(corpus: Path | str) -> Facts:
    """Sources with their ledgers, splits, vocabulary, metadata columns with their commonest values.

    Reads the manifest and the metadata files, no tokens. Raises DataError: not a corpus, a damaged file.
    """
    files = CorpusFiles(corpus)
    manifest = Manifest.read(files)
    return {
        "kind": "corpus", "created_by": manifest.created_by, "format_version": manifest.format_version,
        "expression_kind": manifest.expression_kind, "sha256": manifest.sha256,
        "vocab": manifest.vocab.model_dump(),
        "splits": {name: {"cells": split.cells, "tokens": split.tokens, "parts": len(split.parts),
                          "bytes": sum(file.bytes for file in split.files()), "form": split.form,
                          "groups": None if split.groups is None else len(split.groups)}
                   for name, split in manifest.splits.items()},
        "sources": [{"name": source.name, "file": source.file, "cells_in": source.cells_in,
                     "cells_written": source.cells_written, "filtered": source.filtered,
                     "genes": source.genes.n_genes, "genes_mapped": source.genes.n_mapped,
                     "columns": source.columns} for source in manifest.sources],
        "duplicates": None if manifest.duplicates is None else manifest.duplicates.model_dump(),
        "quarantined": [source.model_dump() for source in manifest.quarantined or []],
        "columns": {column: _corpus_column(files, manifest, column) for column in manifest.columns},
    }


def _corpus_column(files: CorpusFiles, manifest: Manifest, column: str) -> Facts:
    counts: Counter[str | None] = Counter()
    for split in manifest.splits.values():
        for part in split.parts:
            if len(counts) > _MAX_VALUES:
                return {"values": None, "missing": None, "commonest": {}}
            with files.opened(part.obs.file) as stream:
                _count(counts, pq.read_table(stream, columns=[column]).column(0))
    return _of_counts(counts)


def _count(counts: "Counter[str | None]", values: pa.ChunkedArray | pa.Array) -> None:
    for item in pc.value_counts(values.cast(pa.string())).to_pylist():
        counts[item["values"]] += item["counts"]


def _of_counts(counts: "Counter[str | None]") -> Facts:
    named = sorted(((cells, value) for value, cells in counts.items() if value is not None),
                   key=lambda item: (-item[0], item[1]))
    return {"values": len(named), "missing": counts[None],
            "commonest": {value: cells for cells, value in named[:COMMONEST]}}


def inspect_source(place: Path | str, vocab: GeneVocab, *, gene_table: str | None = None) -> Facts:
    """Kind, matrices and what their values look like, genes and how they meet a vocabulary, obs columns.

    Reads headers, the first values of each matrix, and the obs of at most _OBS_CELLS cells. Raises SourceError where
    the file is no atlas; a matrix or a column that cannot be read is told in its place.
    """
    location = Location.of(place)
    known = fingerprint(location)
    check_structure(location)
    with open_source(location, gene_table=gene_table) as source:
        matrices = {source.layer: _matrix(source)}
        for layer in source.other_matrices():
            try:
                with open_source(location, kind=source.kind, layer=layer, gene_table=gene_table) as other:
                    matrices[layer] = _matrix(other)
            except ScgptError as error:
                matrices[layer] = {"unreadable": str(error)}
        return {"kind": source.kind, "name": source.name, "bytes": known.bytes,
                "cells": source.n_cells, "genes": source.n_genes, "layer": source.layer, "matrices": matrices,
                "gene_columns": _gene_columns(source, vocab), "obs": _obs_columns(source),
                "obs_cells": min(source.n_cells, _OBS_CELLS), "remarks": source.remarks(),
                "refused": _refusal(source, vocab)}


def _matrix(source: Source) -> Facts:
    try:
        values = source.probe()
        return {"cells": source.n_cells, "genes": source.n_genes, "values": source.n_values(),
                "looks_like": "counts" if are_counts(values) else describe_values(values),
                "largest": float(np.max(values[np.isfinite(values)], initial=0)) if len(values) else 0.0}
    except ScgptError as error:
        return {"unreadable": str(error)}


def _gene_columns(source: Source, vocab: GeneVocab) -> Facts:
    found = {}
    for column in source.gene_columns():
        names = source.gene_names(column)
        genes = match_genes(names, vocab, column=column)
        found[column] = {"style": genes.style, "mapped": genes.n_mapped, "overlap": genes.overlap,
                         "renamed": genes.renamed, "merged": genes.n_merged, "examples": names[:3]}
    return found


def _obs_columns(source: Source) -> Facts:
    found: Facts = {}
    for column in source.obs_columns():
        try:
            values = source.obs([column], 0, min(source.n_cells, _OBS_CELLS))[column]
        except ScgptError as error:
            found[column] = {"unreadable": str(error)}
            continue
        counts: Counter[str | None] = Counter()
        _count(counts, as_text(values))
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        found[column] = {"type": "text" if pa.types.is_string(kind) else str(kind), **_of_counts(counts)}
        if pa.types.is_floating(kind) or (pa.types.is_integer(kind) and len(counts) > 4 * COMMONEST):
            numbers = pc.cast(values, pa.float64())   # a measure, not a name
            held = pc.min_max(numbers.filter(pc.is_finite(numbers)))
            if held["min"].is_valid:
                found[column]["range"] = [held["min"].as_py(), held["max"].as_py()]
    return found


def _refusal(source: Source, vocab: GeneVocab) -> str | None:
    """Why a build with the defaults would refuse the source; None: it would not."""
    if not source.n_cells:
        return "it holds no cells"
    try:
        map_source(source, vocab, min_gene_overlap=GenesConfig().min_gene_overlap)
        values = source.probe()
    except ScgptError as error:
        return str(error)
    return None if are_counts(values) else f"{source.layer} holds {describe_values(values)} where counts are expected"
