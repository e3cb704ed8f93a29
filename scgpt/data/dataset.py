"""TokenDataset: one split of a corpus, opened, indexed, fetched; in either form, in a folder or behind a URL."""
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scgpt.data.corpus_files import RESTORE, CorpusFiles
from scgpt.data.manifest import VOCAB, Manifest, SplitEntry
from scgpt.data.open_shards import open_shards
from scgpt.data.schema import CELL_ID, EXPRESSIONS, GENES, CellViews, RaggedBatch
from scgpt.data.shards import Shards
from scgpt.data.verify import verify_cells, verify_files
from scgpt.errors import DataError
from scgpt.vocab import GeneVocab

if TYPE_CHECKING:
    import datasets


class TokenDataset:
    """The cells of one split: `len(ds)`, `ds[i]`, `ds.fetch(indices)`; nothing is read before it is asked for.

    An uncompressed Arrow corpus in a folder is memory-mapped: true random access. Any other (compressed, Zarr, behind
    a URL) is read in pieces, a bounded number of which is kept. Pickling hands over the path.
    """

    def __init__(self, files: CorpusFiles, split: str, manifest: Manifest) -> None:
        self.files, self.split, self.manifest = files, split, manifest
        self.path: Path | str = files.location   # the folder, or the URL
        self.entry: SplitEntry = manifest.splits[split]
        self._opened: tuple[int, Shards] | None = None   # by which process

    @classmethod
    def open(cls, path: Path | str, split: str = "train") -> "TokenDataset":
        """Open a split of the corpus in folder `path`, or behind that URL (`s3://...`, `memory://...`).

        Raises DataError: not a corpus, newer format, no such split, a missing or shortened file; ConfigError where a
        package for that kind of URL is missing.
        """
        files = CorpusFiles(path)
        manifest = Manifest.read(files)
        if split not in manifest.splits:
            raise DataError(f"the corpus has no split '{split}'", where=files.where(),
                            fix=f"choose one of: {', '.join(manifest.splits)}")
        dataset = cls(files, split, manifest)
        if len(dataset):
            dataset.shards  # noqa: B018 open now, so that a missing shard is told at once
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

    @property
    def shards(self) -> Shards:
        """The opened tokens. A forked process opens its own: it has none of the threads that zarr waits for."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_shards(self.files, self.entry)
        return self._opened[1]

    @cached_property
    def vocab(self) -> GeneVocab:
        """The vocabulary of the ids; DataError when the file is not the one the corpus was built with."""
        content = self.files.read(VOCAB)
        if hashlib.sha256(content).hexdigest() != self.manifest.vocab.sha256:
            raise DataError(f"{VOCAB} is not the vocabulary that the corpus was built with",
                            where=self.files.where(VOCAB), fix=RESTORE)
        return GeneVocab.from_dict(json.loads(content), default_token=None)

    def fetch(self, indices: NDArray[np.integer]) -> RaggedBatch:
        """Copy cells out, in the given order; `columns` holds `cell_id`.

        Raises IndexError for an index outside the split, DataError where a shard holds what is no gene.
        """
        wanted = self._checked(indices)
        cells = self.shards.fetch(wanted)
        if cells.genes.max(initial=0) >= self.manifest.vocab.tokens:
            raise self._damaged(wanted[np.searchsorted(cells.offsets, cells.genes.argmax(), side="right") - 1])
        return cells

    def views(self, indices: NDArray[np.integer]) -> CellViews:
        """The given cells, in the given order, where they lie in memory: `fetch` for who reads them once.

        Raises IndexError for an index outside the split; who reads the views checks that their ids are genes.
        """
        wanted = self._checked(indices)
        return replace(self.shards.views(wanted), n_tokens=self.manifest.vocab.tokens,
                       damaged=lambda place: self._damaged(wanted[place]))

    def _damaged(self, cell: np.int64) -> DataError:
        return DataError(f"cell {cell} of split '{self.split}' holds a gene id beyond the vocabulary of "
                         f"{self.manifest.vocab.tokens} tokens", where=self.files.where(),
                         fix="find the damaged file with: scgpt data verify")

    def lengths_of(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Values of the given cells, (cells,), read from the list boundaries alone."""
        return self.shards.lengths(self._checked(indices))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Values of all cells, (len(self),): 8 bytes a cell, kept once asked for."""
        return self.lengths_of(np.arange(len(self)))

    def _checked(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        given = np.asarray(indices)
        if len(given) and given.dtype.kind not in "iu":
            raise IndexError(f"cells are given by their integer indices, not by values of type {given.dtype}")
        cells: NDArray[np.int64] = given.astype(np.int64)
        if len(cells) and not (cells.min() >= 0 and cells.max() < len(self)):
            raise IndexError(f"cells {cells.min()} to {cells.max()} of {len(self)}")
        return cells

    def obs(self, columns: Sequence[str] | None = None) -> pa.Table:
        """What is known of the cells, in their order: `cell_id`, `source`, `source_row` and the corpus's columns."""
        tables = []
        for part in self.entry.parts:
            with self.files.opened(part.obs.file) as stream:
                tables.append(pq.read_table(stream, columns=columns))
        return pa.concat_tables(tables).unify_dictionaries()

    def codes(self, column: str) -> tuple[NDArray[np.int32], list[str]]:
        """A metadata column as codes, (cells,) int32 with -1 for null, and the sorted values that they number.

        Raises DataError when the corpus does not keep the column.
        """
        if column not in ("source", *self.manifest.columns):
            raise DataError(f"the corpus keeps no column '{column}'", where=self.files.where(),
                            fix=f"choose one of: {', '.join(('source', *self.manifest.columns))}")
        values = self.obs([column]).column(0).cast(pa.string()).combine_chunks()
        categories = sorted(pc.unique(values.drop_null()).to_pylist())
        codes = pc.index_in(values, pa.array(categories, pa.string())).fill_null(-1)
        return codes.to_numpy(zero_copy_only=False).astype(np.int32), categories

    def to_hf(self, columns: Sequence[str] = ()) -> "datasets.Dataset":
        """The tokens as a memory-mapped Hugging Face dataset, without a copy; `columns` attaches metadata (copied)."""
        if self.files.folder is None or self.entry.form != "arrow":
            raise DataError("only an Arrow corpus in a folder can be mapped as a Hugging Face dataset",
                            where=self.files.where(),
                            fix="make one of it with: scgpt data convert CORPUS --out DIR form=arrow")
        import datasets

        parts = [datasets.Dataset.from_file(str(self.files.folder / shard.file)) for shard in self.entry.shards]
        joined = datasets.concatenate_datasets(parts)
        if not columns:
            return joined
        known = datasets.Dataset(datasets.table.InMemoryTable(self.obs(columns).select(list(columns)).combine_chunks()))
        return datasets.concatenate_datasets([joined, known], axis=1)

    def verify(self) -> None:
        """Check every file of the split and every cell's invariants; raises DataError at the first fault."""
        verify_files(self.files, self.entry.files())
        verify_cells(self.files, self.entry, self.manifest.vocab.tokens)
