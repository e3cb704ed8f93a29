"""Is a corpus whole? Every file against the manifest; `deep`, every cell against the format's invariants."""
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from scgpt.counted import counted
from scgpt.data.corpus_files import RESTORE, CorpusFiles
from scgpt.data.manifest import MANIFEST, VOCAB, FileEntry, Manifest, SplitEntry, check_sizes
from scgpt.data.open_shards import open_shards
from scgpt.data.schema import CELL_ID, CONTENT_HASH, check_cells
from scgpt.data.shards import part_bounds, windows
from scgpt.errors import DataError

LOCK = ".lock"                            # held by a build; may stay, holds nothing
NOT_COVERED = ("run.json", "report.html", "report.json", LOCK)   # may differ between two equal corpora


def verify_corpus(path: Path | str, *, deep: bool = False) -> Manifest:
    """Check a corpus: manifest, vocabulary, every file's bytes and sha256, no file that the manifest does not name.

    `deep` holds every cell against the format's invariants too. Raises DataError at the first fault.
    """
    files = CorpusFiles(path)
    manifest = Manifest.read(files)
    _verify_sha256(files, VOCAB, manifest.vocab.sha256)
    named = {MANIFEST, VOCAB, *NOT_COVERED}
    for split in manifest.splits.values():
        named |= verify_files(files, split.files())
    for name in files.names():
        if name not in named:
            raise DataError(f"the file '{name}' does not belong to the corpus", where=files.where(),
                            fix="move it elsewhere")
    for split in manifest.splits.values() if deep else ():
        verify_cells(files, split, manifest.vocab.tokens)
    return manifest


def verify_files(files: CorpusFiles, entries: Iterable[FileEntry]) -> set[str]:
    """Hold each file's bytes and sha256 against the manifest; returns their names."""
    names = set()
    for entry in entries:
        check_sizes(files, [entry])
        _verify_sha256(files, entry.file, entry.sha256)
        names.add(entry.file)
    return names


def verify_cells(files: CorpusFiles, split: SplitEntry, n_tokens: int) -> None:
    """Hold every cell of a split against the invariants of the format, and its metadata against its id."""
    from scgpt.data.content import content_hashes  # compiled code, for this only

    if not split.cells:
        return
    shards = open_shards(files, split)
    for part, (first, last) in zip(split.parts, part_bounds([part.cells for part in split.parts]), strict=True):
        ids, hashes, tokens = [], [], 0
        for start, stop in windows(shards, first, last):
            batch = shards.fetch(np.arange(start, stop))
            check_cells(batch, n_tokens=n_tokens,
                        where=f"{files.where(part.obs.file.partition('/')[0])}, cells of that split from {start}")
            ids.append(batch.columns[CELL_ID])
            hashes.append(content_hashes(batch)[0])
            tokens += len(batch.genes)
        with files.opened(part.obs.file) as stream:   # corpora of older packages hold no content hash
            table = pq.ParquetFile(stream)
            held = [name for name in (CELL_ID, CONTENT_HASH) if name in table.schema_arrow.names]
            known = {name: column.to_numpy() for name, column in zip(held, table.read(held).columns, strict=True)}
        if tokens != part.tokens:
            raise DataError(f"{counted(tokens, 'value')}, the manifest says {part.tokens}",
                            where=files.where(part.obs.file), fix="build the corpus again")
        expected = {name: np.concatenate([np.zeros(0, np.uint64), *found])
                    for name, found in ((CELL_ID, ids), (CONTENT_HASH, hashes))}
        if CELL_ID not in known or not all(np.array_equal(known[name], expected[name]) for name in known):
            raise DataError("the metadata are of other cells than the shard's", where=files.where(part.obs.file),
                            fix="build the corpus again")


def _verify_sha256(files: CorpusFiles, name: str, digest: str) -> None:
    if files.sha256(name) != digest:
        raise DataError("the file's sha256 is not the manifest's", where=files.where(name), fix=RESTORE)
