"""The numbers of a corpus: what came in, what was kept and why the rest was not, what the cells are.

Read from the manifest, the metadata files and the shards, in pieces of bounded memory. Everything is exact but the
counts of a cell, which need every value: above SAMPLE_CELLS cells they are those of every k-th cell, and say so.
"""
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.ledger import cell_sums
from data_pipeline.report_page import Report, page
from scgpt.data import Manifest, TokenDataset
from scgpt.data.corpus_files import CorpusFiles
from scgpt.data.manifest import SourceEntry, SplitEntry
from scgpt.errors import ConfigError
from scgpt.files import json_bytes, write_bytes

SAMPLE_CELLS = 200_000         # cells whose values are read
CONTEXT_GENES = 1_199          # genes that a context of 1,200 tokens holds beside `<cls>`
TOP_VALUES = 12                # commonest values of a column that are named
MAX_VALUES = 1_000_000         # different values of a column that are counted: barcodes, say, are not
TOP_UNMAPPED = 24              # commonest genes without a token that are named
_LENGTH_CELLS = 1 << 20        # cells whose lengths are read at once: 8 MB
_FETCH_VALUES = 1 << 24        # values fetched at once: some 70 MB
_BINS = 44                     # of a histogram
_QUANTILES = {"p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}
HTML_NAME = "report.html"
FORMAT = "scgpt-corpus-report"


def write_report(corpus: Path | str, out: Path | None = None) -> tuple[Path, Report]:
    """Draw the page of a corpus; its numbers go beside it as JSON.

    Args:
        corpus: its folder, or URL.
        out: the page; None: `report.html` in the folder, which no checksum covers.

    Returns the page's path and the numbers. Raises DataError when the folder is no corpus, ConfigError when `out` is
    not called *.html, when its folder cannot be written, when the place of its numbers is taken by another file, or
    without `out` for a URL.
    """
    files = CorpusFiles(corpus)
    Manifest.read(files)   # first: beside what is no corpus there is no place for a page
    folder = files.folder
    if out is None and folder is None:
        raise ConfigError("a page is not written behind a URL", where=files.where(),
                          fix="say where it shall lie: --out FILE.html")
    out = out or (folder or Path()) / HTML_NAME
    if out.suffix != ".html":
        raise ConfigError("a page must be called *.html: its numbers go beside it as .json", where=str(out),
                          fix=f"give --out {out.with_suffix('.html')}")
    if not os.access(out.parent, os.W_OK):
        raise ConfigError("the page cannot be written there", where=str(out.parent),
                          fix="say where it shall lie: --out FILE.html in a folder that can be written")
    if not _is_ours(out.with_suffix(".json")):
        raise ConfigError("the numbers of the page go to a file that is there and is none of a report",
                          where=str(out.with_suffix(".json")), fix="give another --out")
    report = measure(corpus)
    content = page(report).encode()
    write_bytes(out.with_suffix(".json"), json_bytes(report))
    write_bytes(out, content)
    return out, report


def _is_ours(path: Path) -> bool:
    """Whether a file may be replaced: it is not there, or it holds the numbers of a report."""
    return not path.exists() or f'"format": "{FORMAT}"'.encode() in path.read_bytes()[:100]


def measure(corpus: Path | str) -> Report:
    """All numbers of the page of a corpus in a folder or behind a URL; the same corpus gives the same numbers."""
    files = CorpusFiles(corpus)
    manifest = Manifest.read(files)
    splits = [TokenDataset.open(corpus, name) for name, split in manifest.splits.items() if split.cells]
    found = {name: _column_counts(files, manifest, name) for name in manifest.columns}
    columns = {name: counts for name, counts in found.items() if counts is not None}
    name = (files.where() if files.folder is None else str(files.folder.resolve())).rpartition("/")[2]
    return {
        "format": FORMAT,
        "corpus": {"name": name, "manifest_sha256": manifest.sha256, "plan_sha256": manifest.plan_sha256,
                   "created_by": manifest.created_by, "format_version": manifest.format_version,
                   "expression_kind": manifest.expression_kind, "seed": manifest.seed},
        "vocab": manifest.vocab.model_dump(),
        "totals": _totals(manifest),
        "filtered": _filtered(manifest.sources),
        "duplicates": manifest.duplicates.model_dump() if manifest.duplicates is not None else None,
        "quarantined": [{"name": entry.name, "file": entry.file, "reason": entry.reason}
                        for entry in manifest.quarantined or []],
        "sources": [_source(source) for source in manifest.sources],
        "genes_per_cell": _genes_per_cell(splits),
        "counts_per_cell": _counts_per_cell(splits),
        "unmapped": _unmapped(manifest.sources),
        "columns": {name: _composition(counts) for name, counts in columns.items()},
        "columns_of_many_values": [name for name in manifest.columns if name not in columns],
        "splits": {name: _split(split) for name, split in manifest.splits.items()},
        "groups": {name: _groups(counts) for name, counts in columns.items() if name in ("donor", "dataset")},
        "files": _files(manifest),
        "config": manifest.config,
    }


def _totals(manifest: Manifest) -> Report:
    cells_in = sum(source.cells_in for source in manifest.sources)
    kept = sum(source.cells_written for source in manifest.sources)
    return {"cells_in": cells_in, "cells_kept": kept, "cells_filtered": cells_in - kept,
            "kept_share": kept / max(cells_in, 1), "sources": len(manifest.sources),
            "gene_values": sum(split.tokens for split in manifest.splits.values()),
            "files": len(_files(manifest)), "bytes": sum(entry["bytes"] for entry in _files(manifest))}


def _filtered(sources: Sequence[SourceEntry]) -> list[Report]:
    cells: Counter[str] = Counter()
    for source in sources:
        cells.update(source.filtered)
    return [{"reason": reason, "cells": count} for reason, count in _commonest(cells)]


def _source(source: SourceEntry) -> Report:
    kept = source.cells_written
    genes = source.genes.model_dump(exclude={"unmapped"})
    return {"name": source.name, "file": source.file, "bytes": source.bytes, "sha256": source.sha256,
            "etag": source.etag, "cells_in": source.cells_in, "cells_kept": kept,
            "cells_filtered": source.cells_in - kept,
            "kept_share": kept / max(source.cells_in, 1), "filtered": source.filtered,
            "mean_genes": source.values / kept if kept else None,
            "mean_counts": source.expression_sum / kept if kept else None,
            "genes": {**genes, "n_unmapped": source.genes.n_genes - source.genes.n_mapped}}


def _split(split: SplitEntry) -> Report:
    return {"cells": split.cells, "gene_values": split.tokens, "files": sum(1 for _ in split.files()),
            "bytes": sum(entry.bytes for entry in split.files()), "form": split.form,
            "compression": split.compression or "none"}


def _files(manifest: Manifest) -> list[Report]:
    return [entry.model_dump() for split in manifest.splits.values() for entry in split.files()]


# ---- genes ----


def _unmapped(sources: Sequence[SourceEntry]) -> Report:
    """Genes without a token: those that most sources have, then those of most cells."""
    found: Counter[str] = Counter()
    cells: Counter[str] = Counter()
    for source in sources:
        found.update(source.genes.unmapped)
        cells.update(dict.fromkeys(source.genes.unmapped, source.cells_in))
    names = sorted(found, key=lambda name: (-found[name], -cells[name], name))[:TOP_UNMAPPED]
    return {"names": len(found),
            "top": [{"gene": name, "sources": found[name], "cells": cells[name]} for name in names]}


# ---- cells ----


def _genes_per_cell(splits: Sequence[TokenDataset]) -> Report:
    """Exact, from the boundaries of the cells alone: how many cells have each number of genes."""
    cells_of = np.zeros(1, np.int64)   # [n] = cells with n genes
    for lengths in _lengths(splits):
        counts = np.bincount(lengths, minlength=len(cells_of))
        counts[:len(cells_of)] += cells_of
        cells_of = counts
    values = np.flatnonzero(cells_of)
    above = int(cells_of[CONTEXT_GENES + 1:].sum())
    n_cells = int(cells_of.sum())
    return {"cells": n_cells, **spread(values.astype(np.float64), cells_of[values]), "context_genes": CONTEXT_GENES,
            "above_context": above, "above_context_share": above / max(n_cells, 1)}


def _counts_per_cell(splits: Sequence[TokenDataset]) -> Report:
    """The sum of a cell's values, of every k-th cell."""
    n_cells = sum(len(split) for split in splits)
    every = max(-(-n_cells // SAMPLE_CELLS), 1)
    sums, before = [np.zeros(0)], 0
    for split in splits:
        chosen = np.arange(-before % every, len(split), every)
        sums.extend(cell_sums(split.fetch(cells)) for cells in _fetchable(split, chosen))
        before += len(split)
    values, cells_of = np.unique(np.concatenate(sums), return_counts=True)
    return {"cells": int(cells_of.sum()), "of_cells": n_cells, "every": every, **spread(values, cells_of)}


def _lengths(splits: Sequence[TokenDataset]) -> Iterator[NDArray[np.int64]]:
    for split in splits:
        for first in range(0, len(split), _LENGTH_CELLS):
            yield split.lengths_of(np.arange(first, min(first + _LENGTH_CELLS, len(split))))


def _fetchable(split: TokenDataset, cells: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The same cells in pieces of at most _FETCH_VALUES values; at least one cell each."""
    ends = np.cumsum(split.lengths_of(cells))
    start = 0
    while start < len(cells):
        before = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, before + _FETCH_VALUES, side="right")), start + 1)
        yield cells[start:stop]
        start = stop


def spread(values: NDArray[np.float64], cells: NDArray[np.int64]) -> Report:
    """Mean, quantiles and histogram of a quantity that `cells[i]` cells have the value `values[i]` of, ascending.

    A quantile is the smallest value that at least this share of the cells does not exceed. The bins are even in the
    logarithm; their edges are whole numbers where the values are, so that none is empty for want of one.
    """
    if not len(values):
        return {**dict.fromkeys(("mean", "min", *_QUANTILES, "max")), "histogram": {"edges": [], "cells": []}}
    total, ends = int(cells.sum()), np.cumsum(cells)
    at = {name: float(values[np.searchsorted(ends, share * total)]) for name, share in _QUANTILES.items()}
    edges = np.geomspace(max(values[0], 1e-9), max(values[-1], 1e-9), _BINS + 1)
    if (values == np.floor(values)).all():
        edges = np.unique(np.append(np.floor(edges[:-1]), values[-1] + 1))
    else:
        edges = np.unique(np.append(edges[:-1], np.nextafter(values[-1], np.inf)))
        edges[0] = min(edges[0], values[0])
    in_bins = np.histogram(values, edges, weights=cells)[0]
    return {"mean": float(values @ cells / total), "min": float(values[0]), **at, "max": float(values[-1]),
            "histogram": {"edges": edges.tolist(), "cells": in_bins.astype(int).tolist()}}


# ---- what is known of the cells ----


def _column_counts(files: CorpusFiles, manifest: Manifest, column: str) -> dict[str, Counter[str | None]] | None:
    """Split -> value -> cells; None stands for cells without one, and for a column of more than MAX_VALUES values."""
    found: dict[str, Counter[str | None]] = {}
    for name, split in manifest.splits.items():
        counts: Counter[str | None] = Counter()
        for part in split.parts:
            with files.opened(part.obs.file) as stream:
                values = pq.read_table(stream, columns=[column]).column(0)
            for item in pc.value_counts(values.cast(pa.string())).to_pylist():
                counts[item["values"]] += item["counts"]
            if len(counts) > MAX_VALUES:
                return None
        found[name] = counts
    return found


def _composition(splits: dict[str, Counter[str | None]]) -> Report:
    total: Counter[str] = Counter()
    missing = 0
    for counts in splits.values():
        missing += counts[None]
        total.update({value: cells for value, cells in counts.items() if value is not None})
    top = _commonest(total)[:TOP_VALUES]
    return {"values": len(total), "missing": missing, "other_values": len(total) - len(top),
            "other_cells": sum(total.values()) - sum(cells for _, cells in top),
            "top": [{"value": value, "cells": cells} for value, cells in top]}


def _groups(splits: dict[str, Counter[str | None]]) -> Report:
    """How many groups each split holds, and how many several splits share."""
    names = {split: {value for value in counts if value is not None} for split, counts in splits.items()}
    seen = Counter(value for values in names.values() for value in values)
    return {"splits": {split: len(values) for split, values in names.items()},
            "shared": sum(times > 1 for times in seen.values())}


def _commonest(counts: "Counter[str]") -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
