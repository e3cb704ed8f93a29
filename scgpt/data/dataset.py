"""TokenDataset: one split of a corpus, opened, indexed, fetched; and the check of a whole corpus."""
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scgpt.data.arrow_format import ArrowShards, map_shards
from scgpt.data.manifest import MANIFEST, VOCAB, Manifest, ShardEntry, SplitEntry
from scgpt.data.schema import CELL_ID, EXPRESSIONS, GENES, RaggedBatch, check_cells
from scgpt.errors import DataError
from scgpt.files import sha256
from scgpt.vocab import GeneVocab

if TYPE_CHECKING:
    import datasets

LOCK = ".lock"                            # held by a build; may stay, holds nothing
NOT_COVERED = ("run.json", "report.html", "report.json", LOCK)   # may differ between two equal corpora


class TokenDataset:
    """The cells of one split, memory-mapped: `len(ds)`, `ds[i]`, `ds.fetch(indices)`.

    Reading is true random access; nothing is copied before it is asked for, and pickling hands over the path.
    """

    def __init__(self, path: Path, split: str, manifest: Manifest) -> None:
        self.path, self.split, self.manifest = path, split, manifest
        self.entry: SplitEntry = manifest.splits[split]

    @classmethod
    def open(cls, path: Path | str, split: str = "train") -> "TokenDataset":
        """Open a split of the corpus in folder `path`.

        Raises DataError: not a corpus, newer format, no such split, a missing or shortened shard.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        if split not in manifest.splits:
            raise DataError(f"the corpus has no split '{split}'", where=str(path),
                            fix=f"choose one of: {', '.join(manifest.splits)}")
        dataset = cls(path, split, manifest)
        if len(dataset):
            dataset.shards  # noqa: B018 map now, so that a missing shard is told at once
        return dataset

    def __reduce__(self) -> tuple[object, ...]:
        return TokenDataset.open, (self.path, self.split)

    def __len__(self) -> int:
        return self.entry.cells

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One cell: `genes`, `expressions`, `cell_id`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"cell {index} of {len(self)}")
        cell = self.fetch(np.array([index % len(self)]))
        return {GENES: cell.genes, EXPRESSIONS: cell.expressions, CELL_ID: int(cell.columns[CELL_ID][0])}

    @cached_property
    def shards(self) -> ArrowShards:
        """The mapped token files."""
        return map_shards(self.path, self.entry.shards)

    @cached_property
    def vocab(self) -> GeneVocab:
        """The vocabulary of the ids; DataError when the file is not the one the corpus was built with."""
        path = self.path / VOCAB
        if not path.is_file() or sha256(path) != self.manifest.vocab.sha256:
            raise DataError(f"{VOCAB} is not the vocabulary that the corpus was built with", where=str(path),
                            fix="restore the file, or build the corpus again")
        return GeneVocab.from_file(path, default_token=None)

    def fetch(self, indices: NDArray[np.integer]) -> RaggedBatch:
        """Copy cells out, in the given order; `columns` holds `cell_id`.

        Raises IndexError for an index outside the split, DataError where a shard holds what is no gene.
        """
        cells = self.shards.fetch(self._checked(indices))
        n_tokens = self.manifest.vocab.tokens
        if cells.genes.max(initial=0) >= n_tokens:
            raise DataError(f"a shard holds gene ids beyond the vocabulary of {n_tokens} tokens", where=str(self.path),
                            fix="find the damaged file with: scgpt data verify")
        return cells

    def lengths_of(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Values of the given cells, (cells,), read from the list boundaries alone."""
        return self.shards.lengths(self._checked(indices))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Values of all cells, (len(self),): 8 bytes a cell, kept once asked for."""
        return self.lengths_of(np.arange(len(self)))

    def _checked(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        cells: NDArray[np.int64] = np.asarray(indices).astype(np.int64)
        if len(cells) and not (cells.min() >= 0 and cells.max() < len(self)):
            raise IndexError(f"cells {cells.min()} to {cells.max()} of {len(self)}")
        return cells

    def obs(self, columns: Sequence[str] | None = None) -> pa.Table:
        """What is known of the cells, in their order: `cell_id`, `source`, `source_row` and the corpus's columns."""
        tables = [pq.read_table(self.path / shard.obs.file, columns=columns) for shard in self.entry.shards]
        return pa.concat_tables(tables).unify_dictionaries()

    def codes(self, column: str) -> tuple[NDArray[np.int32], list[str]]:
        """A metadata column as codes, (cells,) int32 with -1 for null, and the sorted values that they number.

        Raises DataError when the corpus does not keep the column.
        """
        if column not in ("source", *self.manifest.columns):
            raise DataError(f"the corpus keeps no column '{column}'", where=str(self.path),
                            fix=f"choose one of: {', '.join(self.manifest.columns)}")
        values = self.obs([column]).column(0).cast(pa.string()).combine_chunks()
        categories = sorted(pc.unique(values.drop_null()).to_pylist())
        codes = pc.index_in(values, pa.array(categories, pa.string())).fill_null(-1)
        return codes.to_numpy(zero_copy_only=False).astype(np.int32), categories

    def to_hf(self, columns: Sequence[str] = ()) -> "datasets.Dataset":
        """The tokens as a memory-mapped Hugging Face dataset, without a copy; `columns` attaches metadata (copied)."""
        import datasets

        parts = [datasets.Dataset.from_file(str(self.path / shard.file)) for shard in self.entry.shards]
        joined = datasets.concatenate_datasets(parts)
        if not columns:
            return joined
        known = datasets.Dataset(datasets.table.InMemoryTable(self.obs(columns).select(list(columns)).combine_chunks()))
        return datasets.concatenate_datasets([joined, known], axis=1)

    def verify(self) -> None:
        """Check every file of the split and every cell's invariants; raises DataError at the first fault."""
        for shard in self.entry.shards:
            _verify_file(self.path, shard.file, shard.bytes, shard.sha256)
            _verify_file(self.path, shard.obs.file, shard.obs.bytes, shard.obs.sha256)
            _verify_cells(self.path, shard, self.manifest.vocab.tokens)


def verify_corpus(path: Path | str, *, deep: bool = False) -> Manifest:
    """Check a corpus: manifest, vocabulary, every shard's bytes and sha256, no file that the manifest does not name.

    `deep` holds every cell against the format's invariants too. Raises DataError at the first fault.
    """
    path = Path(path)
    manifest = Manifest.read(path)
    _verify_file(path, VOCAB, None, manifest.vocab.sha256)
    named = {MANIFEST, VOCAB, *NOT_COVERED}
    for split in manifest.splits.values():
        for shard in split.shards:
            _verify_file(path, shard.file, shard.bytes, shard.sha256)
            _verify_file(path, shard.obs.file, shard.obs.bytes, shard.obs.sha256)
            named |= {shard.file, shard.obs.file}
            if deep:
                _verify_cells(path, shard, manifest.vocab.tokens)
    for found in sorted(path.rglob("*")):
        name = found.relative_to(path).as_posix()
        if found.is_file() and name not in named:
            raise DataError(f"the file '{name}' does not belong to the corpus", where=str(path),
                            fix="move it elsewhere")
    return manifest


def _verify_file(corpus: Path, name: str, n_bytes: int | None, digest: str) -> None:
    path = corpus / name
    fix = "restore the file, or build the corpus again"
    if not path.is_file():
        raise DataError(f"the file '{name}' is missing", where=str(corpus), fix=fix)
    if n_bytes is not None and path.stat().st_size != n_bytes:
        raise DataError(f"the file has {path.stat().st_size} bytes, the manifest says {n_bytes}", where=str(path),
                        fix=fix)
    if sha256(path) != digest:
        raise DataError("the file's sha256 is not the manifest's", where=str(path), fix=fix)


def _verify_cells(corpus: Path, shard: ShardEntry, n_tokens: int) -> None:
    shards = map_shards(corpus, [shard])
    for first, cells in ((batch.first_row, batch.cells) for batch in shard.batches):
        batch = shards.fetch(np.arange(first, first + cells))
        check_cells(batch, n_tokens=n_tokens, where=f"{corpus / shard.file}, cells from {first}")
    known = pq.read_table(corpus / shard.obs.file, columns=[CELL_ID]).column(0).to_numpy()
    if not np.array_equal(known, shards.cell_ids(np.arange(shard.cells))):
        raise DataError("the metadata are of other cells than the shard's", where=str(corpus / shard.obs.file),
                        fix="build the corpus again")
