"""Random cells for the tests of the format, and a corpus of them on disk."""
import hashlib
import itertools
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from scgpt.data import Manifest, RaggedBatch
from scgpt.data.arrow_format import write_obs, write_shard
from scgpt.data.ipc_message import Codec
from scgpt.data.manifest import GeneSummary, ObsEntry, ShardEntry, SourceEntry, SplitEntry, VocabEntry
from scgpt.data.schema import cell_ids, offsets_of
from scgpt.files import sha256
from scgpt.vocab import GeneVocab

N_TOKENS = 300
_NUMBERS = itertools.count()
DTYPES = (np.uint16, np.uint32, np.float32)


def random_cells(lengths: list[int], *, seed: int = 0, dtype: type = np.uint16, source: str = "a") -> RaggedBatch:
    draw = np.random.default_rng(seed)
    genes = [np.sort(draw.choice(N_TOKENS, length, replace=False)) for length in lengths]
    genes = np.concatenate([*genes, np.empty(0, int)]).astype(np.uint16)
    values = draw.integers(1, 900, len(genes)).astype(dtype)
    return RaggedBatch(genes, values, offsets_of(np.array(lengths, int)),
                       {"cell_id": cell_ids(source, np.arange(len(lengths)))})


cells_strategy = st.builds(random_cells, st.lists(st.integers(0, 40), min_size=1, max_size=30),
                           seed=st.integers(0, 1 << 30), dtype=st.sampled_from(DTYPES))


def write_corpus(folder: Path, splits: dict[str, list[RaggedBatch]], *, max_batch_values: int = 100,
                 compression: Codec | None = None, vocab: GeneVocab | None = None) -> Manifest:
    """A whole corpus in the Arrow form: one shard a RaggedBatch, metadata column `donor` with nulls."""
    tokens = [*(f"g{i}" for i in range(N_TOKENS - 3)), "<pad>", "<cls>", "<eoc>"]
    vocab = vocab or GeneVocab.from_dict({token: index for index, token in enumerate(tokens)}, default_token=None)
    folder.mkdir(parents=True, exist_ok=True)
    vocab.save_json(folder / "vocab.json")
    entries = {name: _write_split(folder, name, batches, max_batch_values, compression)
               for name, batches in splits.items()}
    cells = sum(entry.cells for entry in entries.values())
    genes = GeneSummary(style="symbol", column="index", n_genes=N_TOKENS, n_mapped=N_TOKENS, overlap=1, n_renamed=0,
                        n_merged=0, unmapped=[], unmapped_sum=0)
    source = SourceEntry(name="a", file="a.h5ad", bytes=1, sha256=hashlib.sha256(b"a").hexdigest(), cells_in=cells,
                         cells_written=cells, filtered={},
                         values=sum(entry.tokens for entry in entries.values()), expression_sum=0, genes=genes)
    manifest = Manifest(created_by="tests", expression_kind="counts", columns=["donor"], splits=entries,
                        vocab=VocabEntry(name="tests", sha256=vocab.sha256, tokens=len(vocab)), sources=[source],
                        plan_sha256="0" * 64, seed=0, config={"sources": ["a"]})
    manifest.write(folder)
    return manifest


def _write_split(folder: Path, name: str, batches: list[RaggedBatch], max_batch_values: int,
                 compression: Codec | None) -> SplitEntry:
    (folder / name).mkdir(exist_ok=True)
    shards = []
    for number, cells in enumerate(batches):
        path, obs_path = folder / name / f"part-{number:05d}.arrow", folder / name / f"part-{number:05d}.obs.parquet"
        written = write_shard(path, cells, max_batch_values=max_batch_values, compression=compression)
        donors = pa.array([None if i % 5 == 4 else f"d{i % 3}" for i in range(len(cells))]).dictionary_encode()
        write_obs(obs_path, pa.table({"cell_id": cells.columns["cell_id"],
                                      "source": pa.array(["a"] * len(cells)).dictionary_encode(),
                                      "source_row": np.arange(len(cells)), "donor": donors}))
        shards.append(ShardEntry(file=f"{name}/{path.name}", cells=len(cells), tokens=len(cells.genes),
                                 bytes=path.stat().st_size, sha256=sha256(path), batches=written,
                                 obs=ObsEntry(file=f"{name}/{obs_path.name}", bytes=obs_path.stat().st_size,
                                              sha256=sha256(obs_path))))
    return SplitEntry(cells=sum(s.cells for s in shards), tokens=sum(s.tokens for s in shards), shards=shards,
                      compression=compression)


def in_memory(folder: Path) -> str:
    """Copy a corpus to fsspec's file system in memory; its URL, one of its own for each call."""
    fs = fsspec.filesystem("memory")
    url = f"/corpora/{next(_NUMBERS)}"
    fs.put(f"{folder}/", url, recursive=True)
    return f"memory:/{url}"


def same_cells(got: RaggedBatch, want: RaggedBatch) -> None:
    """Assert equal values, boundaries, ids and types."""
    for name in ("genes", "expressions", "offsets"):
        assert np.array_equal(getattr(got, name), getattr(want, name)), name
        assert getattr(got, name).dtype == getattr(want, name).dtype
    assert np.array_equal(got.columns["cell_id"], want.columns["cell_id"])
