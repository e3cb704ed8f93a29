"""manifest.json: what a corpus holds, with a checksum of every file and of itself; without it there is no corpus."""
import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scgpt.config import Config
from scgpt.data.schema import FORMAT, FORMAT_VERSION
from scgpt.errors import DataError
from scgpt.files import json_bytes, write_bytes

MANIFEST = "manifest.json"
VOCAB = "vocab.json"


class BatchEntry(Config):
    """One record batch of a shard: enough to read it alone, also over a network."""

    offset: int      # bytes from the start of the file to the batch's message
    first_row: int   # cells of the shard before this batch
    cells: int


class ObsEntry(Config):
    """The Parquet file with what is known of a shard's cells, in the same order."""

    file: str        # path within the corpus
    bytes: int
    sha256: str


class ShardEntry(Config):
    """One token file."""

    file: str        # path within the corpus
    cells: int
    tokens: int      # values, `<cls>` not counted
    bytes: int
    sha256: str
    batches: list[BatchEntry]
    obs: ObsEntry


class SplitEntry(Config):
    """The shards of train or valid, in order."""

    cells: int
    tokens: int
    shards: list[ShardEntry]


class VocabEntry(Config):
    """Which vocabulary the ids belong to."""

    name: str
    sha256: str      # of vocab.json
    tokens: int


class GeneSummary(Config):
    """How a source's genes met the vocabulary."""

    style: str                      # symbol, ensembl
    column: str                     # where the identifiers were found: index, or a column of var
    n_genes: int
    n_mapped: int                   # genes with a token
    overlap: float                  # n_mapped / n_genes
    n_renamed: int                  # of those, found under a previous or later symbol
    n_merged: int                   # genes summed into another gene of the same token
    unmapped: list[str]             # the genes without a token, sorted
    unmapped_sum: float             # their counts in the cells that were read


class SourceEntry(Config):
    """The ledger of one source: every cell is written, or filtered for one reason."""

    name: str
    file: str
    bytes: int
    sha256: str
    cells_in: int
    cells_written: int
    filtered: dict[str, int]        # reason -> cells
    values: int                     # stored values of the written cells
    expression_sum: float           # their sum
    genes: GeneSummary


class Manifest(Config):
    """The index of a corpus; the order of the fields is the order in the file."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    created_by: str                 # package and version
    expression_kind: str            # counts, log1p, ...
    vocab: VocabEntry
    columns: list[str]              # metadata columns kept
    splits: dict[str, SplitEntry]
    sources: list[SourceEntry]
    plan_sha256: str                # what was decided before any work
    seed: int
    config: dict[str, Any]          # resolved corpus configuration, without an absolute path

    def to_bytes(self) -> bytes:
        """The file's content: one byte sequence for one manifest, its own sha256 as the last key."""
        body = self.model_dump(mode="json")
        return json_bytes({**body, "sha256": hashlib.sha256(json_bytes(body)).hexdigest()})

    def write(self, corpus: Path) -> None:
        """Publish `manifest.json`: from this moment the corpus exists."""
        write_bytes(corpus / MANIFEST, self.to_bytes())

    @classmethod
    def read(cls, corpus: Path) -> "Manifest":
        """Read and check `manifest.json`.

        Raises DataError when the folder is no corpus, its format is newer than this package, or any byte was changed.
        """
        path = corpus / MANIFEST
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"not a corpus: {MANIFEST} cannot be read ({error.strerror})", where=str(corpus),
                            fix="give a folder that `scgpt data build CONFIG --out DIR` has made") from error
        damaged = DataError(f"{MANIFEST} was changed after it was written", where=str(path),
                            fix="restore the file, or build the corpus again")
        try:
            body = json.loads(content)
            version = body["format_version"] if body["format"] == FORMAT else None
        except (ValueError, KeyError, TypeError) as error:
            raise damaged from error
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise DataError(f"the corpus has format version {version}, this package reads up to {FORMAT_VERSION}",
                            where=str(path), fix="upgrade scgpt-pretrain")
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
