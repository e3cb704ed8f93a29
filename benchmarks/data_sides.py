"""The sides of benchmarks/data.py, and the files that they read; one side runs as `data_sides.py SIDE FILE OUT CORES`.

A side is a function of an h5ad file, a folder that it makes and fills, and the cores it may use. Each imports what it
needs: a side of another tool runs in a Python that has that tool and none of our dependencies.
"""
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

    from data_pipeline.config import CorpusConfig

ROOT = Path(__file__).resolve().parents[1]
SMALL_SHARD = "64MiB"   # where memory is measured: else all a worker may take is for merging large shards
SLICE = 4 << 20         # values of a piece that is read at once
MODULES = {"scdl": "bionemo.scdl", "annbatch": "annbatch"}   # what a side needs that we do not

Side = Callable[[Path, Path, int], str | None]   # what it returns is printed


# ---- files


def write_cells(path: Path, n_cells: int, *, compression: str | None = "gzip") -> None:
    """Real cells over and over, drawn with replacement (seeded), as one h5ad."""
    import anndata
    import pandas as pd

    real = anndata.read_h5ad(ROOT / "examples" / "atlas" / "pancreas-baron2016.h5ad")
    rows = np.random.default_rng(0).integers(0, real.n_obs, n_cells)
    cells = anndata.AnnData(real.X[rows], obs=pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)]),
                            var=pd.DataFrame(index=real.var_names))
    cells.write_h5ad(path, compression=compression)


def write_synthetic(path: Path, n_cells: int, form: str, *, n_genes: int = 2_000, n_values: int = 300) -> None:
    """Seeded counts of some `n_values` genes a cell, as CSR, CSC or dense, gzip at its fastest."""
    import anndata
    import pandas as pd
    from scipy import sparse

    from scgpt.vocab import SPECIAL_TOKENS, GeneVocab

    draw = np.random.default_rng(0)
    pool = sparse.random(2_000, n_genes, n_values / n_genes, "csr", np.float32, draw,
                         lambda size: draw.geometric(0.4, size).astype(np.float32))
    matrix = pool[draw.integers(0, pool.shape[0], n_cells)]
    genes = [token for token in GeneVocab.named("scgpt-human").get_itos() if token not in SPECIAL_TOKENS][:n_genes]
    stored = {"csr": matrix.tocsr, "csc": matrix.tocsc, "dense": matrix.toarray}[form]()
    del matrix
    anndata.AnnData(stored, obs=pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)]),
                    var=pd.DataFrame(index=genes)).write_h5ad(path, compression="gzip", compression_opts=1)


# ---- ours


def decompress(file: Path, out: Path, cores: int) -> None:
    """Only read: h5py takes all values and indices from the file, in one process a core."""
    from multiprocessing import get_context

    if cores == 1:
        _read_part(file, 0, 1)
        return
    with get_context("spawn").Pool(cores) as pool:
        pool.starmap(_read_part, [(file, part, cores) for part in range(cores)])


def _read_part(file: Path, part: int, parts: int) -> None:
    import h5py

    with h5py.File(file) as opened:
        for name in ("data", "indices"):
            array = opened["X"][name]
            for first in range(part * SLICE, array.shape[0], parts * SLICE):
                array[first:first + SLICE]


def pipeline(file: Path, out: Path, cores: int) -> str:
    """`scgpt data build`, as it comes."""
    return _build(corpus_config(file), out)


def pipeline_ray(file: Path, out: Path, cores: int) -> str:
    """The same on a Ray that starts and ends with it."""
    return _build(corpus_config(file, workers="ray"), out)


def small_shards(file: Path, out: Path, cores: int) -> str:
    """A build on Ray whose workers promise little memory."""
    return _build(corpus_config(file, workers="ray", max_bytes=SMALL_SHARD), out)


def _build(config: "CorpusConfig", out: Path) -> str:
    from data_pipeline.execute import build

    result = build(config, out)
    return json.dumps({name: round(seconds, 2) for name, seconds in result.seconds.items()} | {"by": result.workers})


def corpus_config(file: Path, *, workers: str = "auto", max_bytes: str = "512MiB") -> "CorpusConfig":
    """A corpus of one file."""
    from data_pipeline.config import CorpusConfig
    from scgpt.config import validate

    return validate(CorpusConfig, {"sources": [str(file)], "cells": {"min_genes": 1}, "splits": {"valid": 0.03},
                                   "shards": {"max_bytes": max_bytes}, "workers": workers})


# ---- others


def scbank(file: Path, out: Path, cores: int) -> None:
    """The public scgpt package's way (scbank.DataBank 0.2.4): a Python loop over rows, from_dict, Parquet."""
    from datasets import Dataset

    rows, ids = _rows_and_ids(file)
    table: dict[str, list[object]] = {"id": list(range(rows.shape[0])), "genes": [], "expressions": []}
    for i in range(rows.shape[0]):
        part = slice(rows.indptr[i], rows.indptr[i + 1])
        genes, values = ids[rows.indices[part]], rows.data[part]
        known = genes != -100
        table["genes"].append(genes[known])
        table["expressions"].append(values[known])
    out.mkdir()
    Dataset.from_dict(table).to_parquet(out / "X.datatable.parquet")


def _rows_and_ids(file: Path) -> "tuple[csr_matrix, NDArray[np.int64]]":
    """The whole matrix in memory, and a token id, or -100, for each of its columns."""
    import anndata

    from scgpt.vocab import GeneVocab

    cells, vocab = anndata.read_h5ad(file), GeneVocab.named("scgpt-human").get_stoi()
    return cells.X, np.array([vocab.get(name, -100) for name in cells.var_names])


def from_generator(file: Path, out: Path, cores: int) -> None:
    """Tahoe-x1's way (scripts/data_prep): a generator of cells as tensors, from_generator, save_to_disk.

    Its processes are one a file, so that a second core helps little.
    """
    from datasets import Dataset

    cells = Dataset.from_generator(_generate, gen_kwargs={"files": [file]}, cache_dir=str(out.parent / ".hf"))
    cells.save_to_disk(out)


def _generate(files: list[Path]) -> Iterator[dict[str, Any]]:
    import anndata
    import torch

    from scgpt.vocab import GeneVocab

    vocab = GeneVocab.named("scgpt-human").get_stoi()
    for file in files:
        cells = anndata.read_h5ad(file, backed="r")
        ids = np.array([vocab.get(name, -1) for name in cells.var_names])
        obs = cells.obs.reset_index()
        rows, ids = cells[:, ids >= 0].X.tocsr(), ids[ids >= 0]
        for i in range(rows.shape[0]):
            row = rows[i]
            genes, values = np.insert(ids[row.indices], 0, vocab["<cls>"]), np.insert(row.data, 0, -2)
            yield {"id": i, "genes": torch.tensor(genes), "expressions": torch.tensor(values, dtype=torch.float),
                   "index": obs.iloc[i]["index"]}


def scdl(file: Path, out: Path, cores: int) -> None:
    """bionemo-scdl: memory-mapped CSR arrays, columns as they are."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    out.mkdir()
    SingleCellMemMapDataset(str(out / "scdl"), str(file), use_X_not_raw=True).save()


def annbatch(file: Path, out: Path, cores: int) -> None:
    """annbatch: shuffled, sharded Zarr, columns as they are."""
    from annbatch import DatasetCollection

    out.mkdir()
    DatasetCollection(out / "cells.zarr").add_adatas(adata_paths=[file], shuffle=True, rng=np.random.default_rng(0))


SIDES: dict[str, Side] = {
    "decompress": decompress, "pipeline": pipeline, "pipeline-ray": pipeline_ray, "scbank": scbank,
    "from-generator": from_generator, "scdl": scdl, "annbatch": annbatch}
_ALL = {**SIDES, "small-shards": small_shards}


def main() -> None:
    """Run one side, print what it says."""
    side, file, out, cores = sys.argv[1:]
    told = _ALL[side](Path(file), Path(out), int(cores))
    if told is not None:
        print(told)


if __name__ == "__main__":
    main()
