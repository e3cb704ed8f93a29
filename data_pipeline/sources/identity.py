"""What a source is known by: its state now, its fingerprint before it is read, its identity in the manifest."""
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.sources.location import Location
from data_pipeline.sources.storage import Entry

_EDGE_BYTES = 1 << 20         # read at either end of a file for its fingerprint
_FOLDER_EDGE_BYTES = 1 << 16  # and of each of some files of a folder:
_EDGE_FILES = 16              # that many of the smallest (there the shapes and types are), as many spread over all


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a source is known by before it is read."""

    bytes: int           # of all its files
    edges_sha256: str    # content: ends of the file; of a folder: names, sizes, ends of some files
    state: str           # of all its files, see Entry; in no hash of a corpus


def fingerprint(place: Location) -> Fingerprint:
    """At most 2 MiB of a file are read for it, 4 MiB of a folder."""
    entries = place.files()
    digest = hashlib.sha256()
    if place.is_folder():
        for entry in entries:
            digest.update(f"{entry.name}\0{entry.bytes}\n".encode())
        for entry in _telling(entries):
            digest.update(_edges(place / entry.name, entry.bytes, _FOLDER_EDGE_BYTES))
    else:
        digest.update(_edges(place, entries[0].bytes, _EDGE_BYTES))
    return Fingerprint(sum(entry.bytes for entry in entries), digest.hexdigest(), _state(entries))


def state_of(place: Location) -> str:
    """The state of all files now, to be held against that of a fingerprint; reads no content."""
    return _state(place.files())


def identity_of(place: Location) -> dict[str, str]:
    """What a manifest knows a source by: `etag` where a storage keeps one of each of its files, else `sha256`.

    The ETag or version of a file; of a folder the sha256 over `name NUL etag newline` of its files, sorted. Nothing
    is read for it. It says which upload it was, not which content: a copy elsewhere has another.
    """
    entries = place.files()
    if not entries or not all(entry.etag for entry in entries):
        return {"sha256": sha256_of(place)}
    if not place.is_folder():
        return {"etag": entries[0].etag.strip('"')}
    told = "".join(f"{entry.name}\0{entry.etag}\n" for entry in entries)
    return {"etag": hashlib.sha256(told.encode()).hexdigest()}


def sha256_of(place: Location) -> str:
    """Hex digest of the whole content: of a file; of a folder, over `name NUL digest newline` of its files, sorted.

    Every byte is read.
    """
    if not place.is_folder():
        return place.file_sha256()
    digest = hashlib.sha256()
    for entry in place.files():
        digest.update(f"{entry.name}\0{(place / entry.name).file_sha256()}\n".encode())
    return digest.hexdigest()


def _edges(place: Location, n_bytes: int, edge_bytes: int) -> bytes:
    """The first and the last bytes of a file, which overlap where it is small."""
    tail = max(n_bytes - edge_bytes, 0)
    if n_bytes <= 2 * edge_bytes:   # one request
        content = place.read_spans([(0, n_bytes)])[0]
        return content[:edge_bytes] + content[tail:]
    return b"".join(place.read_spans([(0, edge_bytes), (tail, n_bytes)]))


def _telling(entries: Sequence[Entry]) -> list[Entry]:
    """The files of a folder whose ends go into its fingerprint: bounded in number, the same for the same folder."""
    small = sorted(entries, key=lambda entry: (entry.bytes, entry.name))[:_EDGE_FILES]
    spread = [entries[place * len(entries) // _EDGE_FILES] for place in range(_EDGE_FILES)] if entries else []
    return sorted({entry.name: entry for entry in [*small, *spread]}.values(), key=lambda entry: entry.name)


def _state(entries: Sequence[Entry]) -> str:
    told = "".join(f"{entry.name}\0{entry.bytes}\0{entry.state}\n" for entry in entries)
    return hashlib.sha256(told.encode()).hexdigest()
