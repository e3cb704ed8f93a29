"""manifest.json: what a corpus holds, with a checksum of every file and of itself; without it there is no corpus."""
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from scgpt.config import Config
from scgpt.counted import counted
from scgpt.data.corpus_files import RESTORE, CorpusFiles
from scgpt.data.schema import FORMAT, FORMAT_VERSION
from scgpt.errors import DataError
from scgpt.files import json_bytes, write_bytes

MANIFEST = "manifest.json"
VOCAB = "vocab.json"


class Entry(Config):
    """A part of the manifest. A key that may be None is absent then: what an older package wrote stays what it was."""

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        optional = {name for name, field in type(self).model_fields.items() if field.default is None}
        return {name: value for name, value in values.items() if value is not None or name not in optional}


class BatchEntry(Entry):
    """One record batch of a shard: enough to read it alone, also over a network."""

    offset: NonNegativeInt      # bytes from the start of the file to the batch's message
    first_row: NonNegativeInt   # cells of the shard before this batch
    cells: NonNegativeInt


class FileEntry(Entry):
    """One file."""

    file: str   # path within the corpus
    bytes: NonNegativeInt
    sha256: str


class ObsEntry(FileEntry):
    """The Parquet file with what is known of a shard's cells, in the same order."""


class ShardEntry(Entry):
    """One token file of the Arrow form."""

    file: str                # path within the corpus
    cells: NonNegativeInt
    tokens: NonNegativeInt   # values, `<cls>` not counted
    bytes: NonNegativeInt
    sha256: str
    batches: list[BatchEntry]
    obs: ObsEntry

    @model_validator(mode="after")
    def _batches_follow_each_other(self) -> "ShardEntry":
        row, end = 0, 0
        for batch in self.batches:
            if batch.first_row != row or batch.offset < end or batch.offset >= self.bytes:
                raise ValueError(f"the batch of row {batch.first_row} of {self.file} is out of its place")
            row, end = row + batch.cells, batch.offset + 1
        if row != self.cells:
            raise ValueError(f"{self.file} has {counted(self.cells, 'cell')}, its batches {row}")
        return self


class PartEntry(Entry):
    """Some cells of a Zarr store: one metadata file, and one shard where the split is converted to Arrow."""

    cells: NonNegativeInt
    tokens: NonNegativeInt
    obs: ObsEntry


class StoreEntry(Entry):
    """The Zarr form of a split."""

    path: str                # of the group within the corpus
    files: list[FileEntry]   # everything below it, sorted
    parts: list[PartEntry]   # in the order of the cells


class SplitEntry(Entry):
    """The cells of train or valid, in order: shards of the Arrow form, or one store of the Zarr form."""

    cells: NonNegativeInt
    tokens: NonNegativeInt
    shards: list[ShardEntry]                            # empty in the Zarr form
    compression: Literal["zstd", "lz4"] | None = None   # absent: none
    store: StoreEntry | None = None                     # absent: the Arrow form
    groups: list[str] | None = None                     # split by donor or dataset: which of them are here, sorted

    @model_validator(mode="after")
    def _parts_add_up(self) -> "SplitEntry":
        if self.shards and self.store is not None:
            raise ValueError("a split is either shards or a store")
        for what in ("cells", "tokens"):
            total, found = getattr(self, what), sum(getattr(part, what) for part in self.parts)
            if total != found:
                raise ValueError(f"a split of {total} {what} whose parts have {found}")
        return self

    @property
    def form(self) -> Literal["arrow", "zarr"]:
        """How the tokens are stored."""
        return "arrow" if self.store is None else "zarr"

    @property
    def parts(self) -> list[PartEntry]:
        """Cells, tokens and metadata file of each part, in order, in either form."""
        if self.store is not None:
            return self.store.parts
        return [PartEntry(cells=shard.cells, tokens=shard.tokens, obs=shard.obs) for shard in self.shards]

    def files(self) -> Iterator[FileEntry]:
        """Every file of the split."""
        for shard in self.shards:
            yield FileEntry(file=shard.file, bytes=shard.bytes, sha256=shard.sha256)
        if self.store is not None:
            yield from self.store.files
        for part in self.parts:
            yield part.obs


class VocabEntry(Entry):
    """Which vocabulary the ids belong to."""

    name: str
    sha256: str   # of vocab.json
    tokens: NonNegativeInt


class GeneSummary(Entry):
    """How a source's genes met the vocabulary."""

    style: str                  # symbol, ensembl
    column: str                 # where the identifiers were found: index, or a column of var
    n_genes: NonNegativeInt
    n_mapped: NonNegativeInt    # genes with a token
    overlap: float              # n_mapped / n_genes
    n_renamed: NonNegativeInt   # of those, found under a previous or later symbol
    n_merged: NonNegativeInt    # genes summed into another gene of the same token
    unmapped: list[str]         # the genes without a token, sorted
    unmapped_sum: float         # their counts in the cells that were read


class SourceEntry(Entry):
    """The ledger of one source: every cell is written, or filtered for one reason."""

    name: str
    file: str
    bytes: NonNegativeInt
    sha256: str | None = None               # of the whole file; of a folder, of the names and sha256 of its files
    etag: str | None = None                 # instead, where an object store keeps ETags: nothing is read twice for it
    cells_in: NonNegativeInt
    cells_written: NonNegativeInt
    filtered: dict[str, NonNegativeInt]     # reason -> cells
    values: NonNegativeInt                  # stored values of the written cells
    expression_sum: float                   # their sum
    genes: GeneSummary
    columns: dict[str, str] | None = None   # metadata column of the corpus -> its name in this source's obs


class QuarantinedEntry(Entry):
    """A source that could not be read; no cell of it is in the corpus."""

    name: str
    file: str
    reason: str
    cells: NonNegativeInt | None = None   # where its header could be read
    sha256: str | None = None             # where the whole file could be read
    etag: str | None = None


class DuplicatesEntry(Entry):
    """Cells of equal genes and expressions, over all sources."""

    compared: NonNegativeInt        # cells that were looked at: too few genes tell nothing
    equal: NonNegativeInt           # cells that equal an earlier one, in the order of the sources and rows
    across_splits: NonNegativeInt   # cells of valid whose content is in train too; none is left where `removed`
    removed: bool                   # whether the corpus was written without the `equal` cells


class Manifest(Entry):
    """The index of a corpus; the order of the fields is the order in the file."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    created_by: str                                     # package and version
    expression_kind: str                                # counts, log1p, ...
    vocab: VocabEntry
    columns: list[str]                                  # metadata columns kept
    splits: dict[str, SplitEntry]
    sources: list[SourceEntry]
    plan_sha256: str                                    # what was decided before any work
    seed: int
    config: dict[str, Any]                              # resolved corpus configuration, without an absolute path
    duplicates: DuplicatesEntry | None = None
    quarantined: list[QuarantinedEntry] | None = None   # with on_error: skip

    def to_bytes(self) -> bytes:
        """The file's content: one byte sequence for one manifest, its own sha256 as the last key."""
        body = self.model_dump(mode="json")
        return json_bytes({**body, "sha256": hashlib.sha256(json_bytes(body)).hexdigest()})

    def write(self, corpus: Path) -> None:
        """Publish `manifest.json`: from this moment the corpus exists."""
        write_bytes(corpus / MANIFEST, self.to_bytes())

    @classmethod
    def read(cls, corpus: Path | str | CorpusFiles) -> "Manifest":
        """Read and check `manifest.json` of the corpus in a folder or behind a URL.

        Raises DataError where there is no corpus, its format is newer than this package, or any byte was changed.
        """
        files = corpus if isinstance(corpus, CorpusFiles) else CorpusFiles(corpus)
        path = files.where(MANIFEST)
        try:
            content = files.read(MANIFEST)
        except DataError as error:
            cause = error.__cause__
            unread = isinstance(cause, PermissionError) if files.folder else not isinstance(cause, FileNotFoundError)
            if unread:   # it may well be one
                raise
            fix = ("give a folder that `scgpt data build CONFIG --out DIR` has made"
                   if cause is None or cause.__cause__ is None else error.fix)
            raise DataError(f"not a corpus: {error.what}", where=files.where(), fix=fix) from error
        damaged = DataError(f"{MANIFEST} was changed after it was written", where=path, fix=RESTORE)
        try:
            body = json.loads(content)
            version = body["format_version"] if body["format"] == FORMAT else None
        except (ValueError, KeyError, TypeError) as error:
            raise damaged from error
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise DataError(f"the corpus has format version {version}, this package reads up to {FORMAT_VERSION}",
                            where=path, fix="upgrade scgpt-pretrain")
        try:
            body.pop("sha256", None)
            manifest = cls.model_validate(body)
        except ValidationError as error:
            raise damaged from error
        if manifest.to_bytes() != content:
            raise damaged
        return manifest

    @property
    def sha256(self) -> str:
        """The identity of the corpus: the digest that stands in the file."""
        return hashlib.sha256(json_bytes(self.model_dump(mode="json"))).hexdigest()


def check_sizes(files: CorpusFiles, entries: Sequence[FileEntry | ShardEntry]) -> None:
    """Raise DataError where a file is missing or has not the size that the manifest says; reads no content."""
    for entry, size in zip(entries, files.sizes([entry.file for entry in entries]), strict=True):
        if size != entry.bytes:
            raise DataError(f"the file has {counted(size, 'byte')}, the manifest says {entry.bytes}",
                            where=files.where(entry.file), fix=RESTORE)
