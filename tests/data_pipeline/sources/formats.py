"""The same matrix in the formats of others, written as their tools write them."""
import contextlib
import gzip
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from scipy import sparse

from tests.data_pipeline.atlases import GENES


@contextlib.contextmanager
def on_memory(path: Path) -> Iterator[str]:
    """A copy of a file or a folder behind a URL."""
    import fsspec

    system = fsspec.filesystem("memory")
    try:
        for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
            system.pipe(f"/formats/{file.relative_to(path.parent).as_posix()}", file.read_bytes())
        yield f"memory://formats/{path.name}"
    finally:
        system.rm("/formats", recursive=True)


def gene_names(n_genes: int) -> list[str]:
    """Symbols of the vocabulary, as `write_h5ad` takes them where none are given."""
    return GENES[::len(GENES) // n_genes][:n_genes][::-1]


def write_tenx_h5(path: Path, counts: Any, *, types: Sequence[str] | None = None,
                  genomes: Sequence[str] | None = None, ids: Sequence[str] | None = None,
                  symbols: Sequence[str] | None = None) -> Path:
    """A Cell Ranger 3 file of a cells x features matrix."""
    matrix = sparse.csr_matrix(counts)
    n_features = matrix.shape[1]
    symbols = gene_names(n_features) if symbols is None else symbols
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        _arrays(group, matrix)
        features = group.create_group("features")
        for key, values in (("id", ids or [f"id{i}" for i in range(n_features)]), ("name", symbols),
                            ("feature_type", types or ["Gene Expression"] * n_features),
                            ("genome", genomes or ["GRCh38"] * n_features), ("_all_tag_keys", ["genome"])):
            features[key] = np.array(values, "S")
    return path


def write_tenx_v2(path: Path, counts_of: dict[str, Any], symbols_of: dict[str, Sequence[str]] | None = None) -> Path:
    """A Cell Ranger 2 file: genome -> a cells x genes matrix."""
    with h5py.File(path, "w") as file:
        for genome, counts in counts_of.items():
            matrix = sparse.csr_matrix(counts)
            group = file.create_group(genome)
            _arrays(group, matrix)
            symbols = (symbols_of or {}).get(genome, gene_names(matrix.shape[1]))
            group["gene_names"], group["genes"] = np.array(symbols, "S"), np.array(symbols, "S")
            group["stray"] = 2
    return path


def _arrays(group: h5py.Group, matrix: sparse.csr_matrix) -> None:
    group["barcodes"] = np.array([f"AAAC{i}-1" for i in range(matrix.shape[0])], "S")
    group["data"] = matrix.data.astype(np.int32) if (matrix.data == np.floor(matrix.data)).all() else matrix.data
    group["indices"], group["indptr"] = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    group["shape"] = np.array(matrix.shape[::-1], np.int32)


def write_tenx_folder(folder: Path, counts: Any, *, v2: bool = False, compressed: bool = True, prefix: str = "",
                      types: Sequence[str] | None = None, order: np.ndarray | None = None) -> Path:
    """The three files of a cells x features matrix; `order` of the lines: by cell unless given."""
    folder.mkdir(exist_ok=True)
    matrix = sparse.coo_matrix(sparse.csr_matrix(counts))
    symbols = gene_names(matrix.shape[1])
    lines = [f"{feature + 1} {cell + 1} {value:.10g}" for cell, feature, value in
             zip(matrix.row, matrix.col, matrix.data, strict=True)]
    if order is not None:
        lines = [lines[place] for place in order]
    integer = (matrix.data == np.floor(matrix.data)).all()
    banner = f"%%MatrixMarket matrix coordinate {'integer' if integer else 'real'} general"
    sizes = f"{matrix.shape[1]} {matrix.shape[0]} {matrix.nnz}"
    features = [[f"id{i}", symbol] + ([] if v2 else [(types or ["Gene Expression"] * len(symbols))[i]])
                for i, symbol in enumerate(symbols)]
    for name, text in (("matrix.mtx", [banner, '%metadata_json: {"format_version": 2}', sizes, *lines]),
                       ("barcodes.tsv", [f"AAAC{i}-1" for i in range(matrix.shape[0])]),
                       ("genes.tsv" if v2 else "features.tsv", ["\t".join(words) for words in features])):
        content = "".join(f"{line}\n" for line in text).encode()
        path = folder / f"{prefix}{name}{'.gz' if compressed else ''}"
        path.write_bytes(gzip.compress(content) if compressed else content)
    return folder


FIRST_ID = 3   # of the genes in tables of lists; below: special tokens, as Tahoe-100M and scGPT number them


def vocab_of(symbols: Sequence[str]) -> dict[str, int]:
    """name -> id: special tokens first, and a gap in the middle."""
    half = len(symbols) // 2
    return {"<pad>": 0, "<cls>": 1, "<eoc>": 2} | {
        name: FIRST_ID + place + (place >= half) for place, name in enumerate(symbols)}


def lists_of(counts: Any, *, marker: bool = False, absent: bool = False) -> dict[str, list[Any]]:
    """The columns `genes` and `expressions` of a cells x genes matrix, ids by `vocab_of`.

    marker: each list begins with `<cls>` and -2, as scGPT's and Tahoe-100M's tables; absent: without an expression.
    """
    matrix = sparse.csr_matrix(counts)
    ids = np.array(list(vocab_of(gene_names(matrix.shape[1])).values())[3:])
    lists: dict[str, list[Any]] = {"genes": [], "expressions": []}
    for first, last in pairwise(matrix.indptr):
        before = [1] if marker else []
        lists["genes"].append(before + ids[matrix.indices[first:last]].tolist())
        lists["expressions"].append([None if absent else -2.0] * len(before) + matrix.data[first:last].tolist())
    return lists


def write_vocab(path: Path, n_genes: int) -> Path:
    """A vocab.json for `lists_of`."""
    path.write_text(json.dumps(vocab_of(gene_names(n_genes))))
    return path
