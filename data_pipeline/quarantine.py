"""Sources that cannot be read where `on_error: skip`: left out as a whole, and told in the manifest.

A task that meets one hands back the error as its result, in no record on disk: a rerun tries again. All tasks of such a
source are tried, and the first failure in the order of the plan is the one that is told, so that the manifest does not
depend on who was faster.
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from data_pipeline.sources.location import Location
from scgpt.errors import SourceError

_FAILED = "failed"

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A source of which no cell is in the corpus."""

    name: str
    file: str            # without its folder
    reason: str          # one sentence without a folder of this machine
    cells: int | None    # where it could be planned
    sha256: str | None = None   # where the whole of it could be read
    etag: str | None = None     # instead, of what an object store keeps ETags of

    @classmethod
    def of(cls, error: SourceError, location: Location, name: str, *, cells: int | None = None,
           sha256: str | None = None, etag: str | None = None) -> "Quarantined":
        """From what was raised about it."""
        text = error.what if error.where is None else f"{error.what} ({error.where})"
        return cls(name, location.name, text.replace(str(location), location.name), cells, sha256, etag)


def tried(do: Callable[[], Record], on_error: str) -> Record:
    """The record of a task; where `on_error` is skip, a failure of its source as a result."""
    try:
        return do()
    except SourceError as error:
        if on_error != "skip":
            raise
        return {_FAILED: [error.what, error.where, error.fix]}


def failure(record: Record) -> SourceError | None:
    """What `tried` has caught."""
    if _FAILED not in record:
        return None
    what, where, fix = record[_FAILED]
    return SourceError(what, where=where, fix=fix)


def note_failures(failed: dict[int, SourceError], results: Iterable[tuple[int, Record]]) -> None:
    """Add the first failure of each source to `failed`; results are (place of the source, record of a task)."""
    for source, record in results:
        error = failure(record)
        if error is not None:
            failed.setdefault(source, error)
