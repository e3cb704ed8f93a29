"""Real cells over and over: the corpus that the loaders read, written by the library, and the same cells for others.

The cells are those of the two pancreas files of examples/atlas, tokenised by the pipeline (some 1,900 genes each), and
drawn with replacement by a seed. Cell i of a smaller corpus is cell i of a larger one of the same shard size.
"""
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.config import CorpusConfig
from data_pipeline.plan import make_plan
from data_pipeline.tokenization import tokenize_block
from scgpt import __version__
from scgpt.config import validate
from scgpt.data import RaggedBatch, TokenDataset
from scgpt.data.arrow_format import write_obs, write_shard
from scgpt.data.manifest import VOCAB, Manifest, ObsEntry, ShardEntry, SplitEntry, VocabEntry
from scgpt.data.schema import CELL_ID, SOURCE, SOURCE_ROW, cell_ids, part_name
from scgpt.files import publish, sha256

ATLAS = Path(__file__).resolve().parents[1] / "examples" / "atlas"
SOURCES = (ATLAS / "pancreas-baron2016.h5ad", ATLAS / "held-out" / "pancreas-baron2016-lib1.h5ad")
NAME = "replicated"      # of the source that the manifest tells
SHARD_CELLS = 1 << 16    # some 500 MB
SEED = 0


@functools.cache
def real_cells() -> RaggedBatch:
    """The cells of SOURCES as they are stored, in their order."""
    plan = make_plan(_config())
    found = []
    for block in plan.blocks:
        source = plan.sources[block.source]
        with source.open() as opened:
            cells = tokenize_block(opened, source.genes, block.first, block.last)
        found.append(RaggedBatch(cells.genes, cells.expressions, cells.offsets, {CELL_ID: cells.columns[CELL_ID]}))
    return RaggedBatch.concatenate(found)


def _config() -> CorpusConfig:
    return validate(CorpusConfig, {"sources": [str(path) for path in SOURCES]})


def shards(n_cells: int) -> Iterator[RaggedBatch]:
    """The replicated cells, SHARD_CELLS at a time; their ids number them through."""
    real = real_cells()
    for first in range(0, n_cells, SHARD_CELLS):
        places = np.arange(first, min(first + SHARD_CELLS, n_cells))
        drawn = np.random.default_rng([SEED, first]).integers(0, len(real), SHARD_CELLS)[:len(places)]
        cells = real.take(drawn)
        yield RaggedBatch(cells.genes, cells.expressions, cells.offsets, {CELL_ID: cell_ids(NAME, places)})


def corpus_of(folder: Path, n_cells: int) -> TokenDataset:
    """The corpus of `n_cells` cells below `folder`, made where it is not there yet: it is whole or absent."""
    path = folder / f"corpus-{n_cells}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with publish(path) as temporary:
            _write(temporary, n_cells)
    return TokenDataset.open(path)


def _write(path: Path, n_cells: int) -> None:
    config = _config()
    vocab = config.load_vocab()
    (path / "train").mkdir(parents=True)
    vocab.save_json(path / VOCAB)
    entries, first = [], 0
    for number, cells in enumerate(shards(n_cells)):
        entries.append(_write_shard(path, f"train/{part_name(number)}", cells, first))
        first += len(cells)
    split = SplitEntry(cells=n_cells, tokens=sum(entry.tokens for entry in entries), shards=entries)
    Manifest(created_by=f"scgpt-pretrain {__version__}", expression_kind="counts", columns=[], splits={"train": split},
             vocab=VocabEntry(name="scgpt-human", sha256=vocab.sha256, tokens=len(vocab)), sources=[],
             plan_sha256="0" * 64, seed=SEED, config=dict(config.portable())).write(path)


def _write_shard(path: Path, name: str, cells: RaggedBatch, first_row: int) -> ShardEntry:
    tokens, obs = path / f"{name}.arrow", path / f"{name}.obs.parquet"
    batches = write_shard(tokens, cells)
    write_obs(obs, pa.table({CELL_ID: cells.columns[CELL_ID], SOURCE: pa.array([NAME] * len(cells)).dictionary_encode(),
                             SOURCE_ROW: np.arange(first_row, first_row + len(cells))}))
    return ShardEntry(file=f"{name}.arrow", cells=len(cells), tokens=len(cells.genes), bytes=tokens.stat().st_size,
                      sha256=sha256(tokens), batches=batches,
                      obs=ObsEntry(file=f"{name}.obs.parquet", bytes=obs.stat().st_size, sha256=sha256(obs)))


def arrays_of(folder: Path, n_cells: int) -> Path:
    """The same cells as genes.npy, expressions.npy and offsets.npy in a folder, for who writes forms of their own."""
    path = folder / f"arrays-{n_cells}"
    if not path.exists():
        with publish(path) as temporary:
            temporary.mkdir(parents=True)
            cells = RaggedBatch.concatenate(list(shards(n_cells)))
            for name, array in (("genes", cells.genes), ("expressions", cells.expressions), ("offsets", cells.offsets)):
                np.save(temporary / f"{name}.npy", array)
    return path


def h5ad_of(folder: Path, n_cells: int) -> Path:
    """The same cells as an uncompressed h5ad file with a column a token: CSR, float32, as most tools want it."""
    import anndata
    import pandas as pd
    from scipy import sparse

    path = folder / f"cells-{n_cells}.h5ad"
    if not path.exists():
        tokens = _config().load_vocab().get_itos()
        genes, expressions, offsets = (np.load(arrays_of(folder, n_cells) / f"{name}.npy", mmap_mode="r")
                                       for name in ("genes", "expressions", "offsets"))
        matrix = sparse.csr_matrix((expressions.astype(np.float32), genes.astype(np.int32), offsets),
                                   shape=(n_cells, len(tokens)))
        with publish(path) as temporary:
            anndata.AnnData(matrix, obs=pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)]),
                            var=pd.DataFrame(index=tokens)).write_h5ad(temporary)
    return path
