"""The Zarr form of a corpus: once the shards are merged, each file of a store is a task of its own.

How many cells and values a shard holds is known when all are merged; only then can a flat array be cut. The merged
shards lie in DIR/.build/merged as Arrow, uncompressed, and go with it.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.build_dir import BuildDir, Record
from data_pipeline.config import ShardsConfig
from data_pipeline.tasks import Layout
from scgpt.data import zarr_format
from scgpt.data.arrow_format import map_shards
from scgpt.data.corpus_files import CorpusFiles
from scgpt.data.manifest import FileEntry, PartEntry, ShardEntry, SplitEntry, StoreEntry
from scgpt.data.schema import offsets_of


@dataclass(frozen=True, slots=True)
class StorePiece:
    """What describes a store, or one shard of an array of it, and the merged shards that hold its items."""

    split: str
    layout: zarr_format.StoreLayout
    array: str | None              # None: what describes the store
    number: int
    merged: tuple[ShardEntry, ...]
    first_cell: int                # cells of the split before them
    first_value: int               # values of the split before them

    @property
    def task(self) -> str:
        """Name of its record."""
        return f"store-{self.split}-{self.array or 'description'}-{self.number:05d}"


def store_pieces(split: str, shards: Sequence[Record], config: ShardsConfig, *, gene_type: np.dtype[Any],
                 expression_type: np.dtype[Any]) -> Iterator[StorePiece]:
    """The files of a split's store, from the records of its merged shards."""
    entries = [ShardEntry.model_validate(shard["entry"]) for shard in shards]
    cells, values = [entry.cells for entry in entries], [entry.tokens for entry in entries]
    first_cells, first_values = offsets_of(np.array(cells)).tolist(), offsets_of(np.array(values)).tolist()
    layout = zarr_format.StoreLayout(sum(cells), sum(values), gene_type, expression_type, config.codec,
                                     config.max_bytes)
    yield StorePiece(split, layout, None, 0, (), 0, 0)
    for array in layout.arrays:
        for number in range(layout.n_shards(array)):
            held = layout.parts(array, number, cells, values)
            yield StorePiece(split, layout, array, number, tuple(entries[held.start:held.stop]),
                             first_cells[held.start], first_values[held.start])


def write_store_piece(layout: Layout, piece: StorePiece) -> Record:
    """Write the files of a piece."""
    store = store_folder(layout.build, piece.split)
    if piece.array is None:
        made = zarr_format.write_metadata(store, piece.layout)
    else:
        shards = map_shards(CorpusFiles(layout.build.merged), piece.merged)
        span = zarr_format.Span(shards, sum(entry.cells for entry in piece.merged), piece.first_cell, piece.first_value)
        made = [zarr_format.write_shard(store, piece.layout, piece.array, piece.number, span)]
    entries = [zarr_format.file_entry(layout.build.path, path) for path in made]
    result = {"files": [entry.model_dump(mode="json") for entry in entries]}
    return layout.build.write_record(piece.task, result, made)


def store_folder(build: BuildDir, split: str) -> Path:
    """The store of a split, before the commit."""
    return build.path / f"{split}.zarr"


def store_split(split: str, shards: Sequence[Record], pieces: Sequence[Record], config: ShardsConfig) -> SplitEntry:
    """What the manifest says of a split in the Zarr form."""
    parts = [PartEntry(cells=entry.cells, tokens=entry.tokens, obs=entry.obs)
             for entry in (ShardEntry.model_validate(shard["entry"]) for shard in shards)]
    found = [FileEntry.model_validate(entry) for piece in pieces for entry in piece["files"]]
    store = StoreEntry(path=f"{split}.zarr", files=sorted(found, key=lambda entry: entry.file), parts=parts)
    return SplitEntry(cells=sum(part.cells for part in parts), tokens=sum(part.tokens for part in parts), shards=[],
                      compression=config.codec, store=store)
