"""Small atlases for the tests of the pipeline, and a build of theirs without Ray."""
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from scipy import sparse

from data_pipeline.build_dir import Record, claim
from data_pipeline.commit import commit
from data_pipeline.config import CorpusConfig
from data_pipeline.passes import carry_out
from data_pipeline.plan import make_plan
from data_pipeline.progress import Progress
from data_pipeline.tasks import Layout
from data_pipeline.workers import Job, find_or_do
from scgpt.config import validate
from scgpt.data import Manifest, TokenDataset
from scgpt.vocab import SPECIAL_TOKENS, GeneVocab

ROOT = Path(__file__).parents[2]
ATLAS = ROOT / "examples" / "atlas"
PANCREAS, BLOOD, CHR21 = (ATLAS / f"{name}.h5ad" for name in ("pancreas-baron2016", "blood-pbmc68k",
                                                             "blood-pbmc10k-chr21"))
VOCAB = GeneVocab.named("scgpt-human")
GENES = [token for token in VOCAB.get_itos() if token not in SPECIAL_TOKENS]


def random_counts(seed: int, n_cells: int, n_genes: int, density: float = 0.2) -> sparse.csr_matrix:
    """A float32 CSR matrix of counts from 1 to 40."""
    draw = np.random.default_rng(seed)
    return sparse.random(n_cells, n_genes, density, "csr", np.float32, draw,
                         lambda size: draw.integers(1, 40, size).astype(np.float32))


def atlas_of(matrix: Any, genes: Sequence[str] | None = None, *, obs: dict[str, Any] | None = None,
             var: dict[str, Any] | None = None, raw: Any = None,
             layers: dict[str, Any] | None = None) -> anndata.AnnData:
    """An atlas in memory; genes: of the vocabulary, from every part of it, where none are given."""
    n_cells, n_genes = matrix.shape
    names = list(genes) if genes is not None else GENES[::len(GENES) // n_genes][:n_genes][::-1]
    atlas = anndata.AnnData(matrix, obs=pd.DataFrame(obs or {}, index=[f"cell{i}" for i in range(n_cells)]),
                            var=pd.DataFrame(var or {}, index=pd.Index(names)), layers=layers or {})
    if raw is not None:
        atlas.raw = anndata.AnnData(raw, obs=atlas.obs, var=atlas.var)
    return atlas


def write_h5ad(path: Path, matrix: Any, genes: Sequence[str] | None = None, **parts: Any) -> Path:
    """An h5ad file as anndata writes it; see atlas_of."""
    atlas_of(matrix, genes, **parts).write_h5ad(path, compression="gzip")
    return path


def write_zarr(path: Path, matrix: Any, genes: Sequence[str] | None = None, *, version: int = 3,
               chunk: int | None = None, shard: int | None = None, **parts: Any) -> Path:
    """A Zarr store as anndata writes it; chunk, shard: values of the 1-D arrays of X, else as anndata chooses."""
    with anndata.settings.override(zarr_write_format=version), warnings.catch_warnings():
        warnings.simplefilter("ignore")   # of text types that version 3 does not settle yet
        atlas_of(matrix, genes, **parts).write_zarr(path)
    if chunk is not None:
        group = zarr.open_group(path, mode="r+", use_consolidated=False)["X"]
        for name in ("data", "indices", "indptr"):
            values = group[name][:]
            del group[name]
            group.create_array(name, data=values, chunks=(chunk,), shards=None if shard is None else (shard,))
    return path


def zip_folder(folder: Path, *, within: str = "") -> Path:
    """The folder as `FOLDER.zip`, its files below `within` in it."""
    path = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, within + file.relative_to(folder).as_posix())
    return path


def spoil(path: Path, key: str, change: Any) -> Path:
    """Replace a data set of a file by what `change` makes of it."""
    with h5py.File(path, "r+") as file:
        values = change(file[key][()])
        del file[key]
        file[key] = values
    return path


def config_of(*sources: Any, **settings: Any) -> CorpusConfig:
    """A corpus configuration from plain values; `min_genes` is 1 unless given."""
    plain = [str(source) if isinstance(source, Path) else source for source in sources]
    settings["cells"] = {"min_genes": 1, **settings.get("cells", {})}
    return validate(CorpusConfig, {"sources": plain, **settings})


class Here:
    """The tasks of a build one after the other, in a given order: what the order of other workers must not change."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed, self.calls = seed, list[str]()

    def share(self, value: object) -> object:
        return value

    def run(self, stage: str, layout: Layout, jobs: Sequence[Job], unit: str, progress: Progress) -> list[Record]:
        order = range(len(jobs)) if self.seed is None else np.random.default_rng(self.seed).permutation(len(jobs))
        results: dict[int, Record] = {}
        for number in order:
            self.calls.append(jobs[number].task)
            results[number] = find_or_do(jobs[number].function, layout, jobs[number].task, *jobs[number].arguments)
        return [results[number] for number in range(len(jobs))]


def build_here(config: CorpusConfig, out: Path, *, workers: Here | None = None, fresh: bool = False) -> Manifest:
    """A build as `execute.build` does it, with `Here` as its workers."""
    plan = make_plan(config)
    with claim(out, plan, fresh=fresh) as directory:
        return commit(directory, plan, carry_out(directory, plan, workers or Here(), Progress(), {}), timing={})


def cells_of(corpus: Path) -> dict[tuple[str, int], dict[int, float]]:
    """Everything in a corpus: (source, source_row) -> token -> value."""
    found: dict[tuple[str, int], dict[int, float]] = {}
    for split in Manifest.read(corpus).splits:
        dataset = TokenDataset.open(corpus, split)
        obs = dataset.obs(["source", "source_row"]).to_pylist()
        cells = dataset.fetch(np.arange(len(dataset)))
        for i, row in enumerate(obs):
            part = slice(cells.offsets[i], cells.offsets[i + 1])
            key = (row["source"], row["source_row"])
            assert key not in found
            found[key] = dict(zip(cells.genes[part].tolist(), cells.expressions[part].tolist(), strict=True))
    return found


def bytes_of(corpus: Path) -> dict[str, bytes]:
    """Name -> content of every file of a corpus but run.json, which tells times."""
    return {path.relative_to(corpus).as_posix(): path.read_bytes() for path in sorted(corpus.rglob("*"))
            if path.is_file() and path.name != "run.json"}


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Names of files that are missing, superfluous or different: pytest would spend minutes on telling where."""
    return [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
