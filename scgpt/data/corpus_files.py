"""The files of a corpus by name, wherever it lies: in a folder, or behind a URL that fsspec opens.

A `file://` URL is the folder it names. fsspec is imported for the other URLs only.
"""
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from scgpt.counted import counted
from scgpt.errors import ConfigError, DataError, ScgptError
from scgpt.files import sha256

RESTORE = "restore the file, or build the corpus again"
_PASSWORD = re.compile(r"//[^/@]*:[^/@]*@")
_PIECE_BYTES = 8 << 20     # read at once for a checksum
_GAP_BYTES = 64 << 10      # reading this much in vain is cheaper than asking twice
_MERGED_BYTES = 16 << 20   # of ranges read as one


class CorpusFiles:
    """What lies under `location`: a folder, or a URL such as `s3://bucket/corpus`; names use `/`.

    Every failure to read is a DataError that names the file. Pickling hands over the location.
    """

    def __init__(self, location: Path | str) -> None:
        if isinstance(location, str):
            location = location.removeprefix("file://")
        remote = isinstance(location, str) and "://" in location
        self.location: Path | str = str(location).rstrip("/") if remote else Path(location)
        self._system: tuple[int, Any] | None = None   # by which process

    def __reduce__(self) -> tuple[object, ...]:
        return CorpusFiles, (self.location,)

    @property
    def folder(self) -> Path | None:
        """The folder of a corpus on this machine's file systems; None behind a URL."""
        return self.location if isinstance(self.location, Path) else None

    def where(self, name: str = "") -> str:
        """The path or URL of a file, for people: without a password that stands in the URL."""
        return _PASSWORD.sub("//", self.url(name))

    def url(self, name: str = "") -> str:
        """The path or URL of a file, to open it."""
        return f"{self.location}/{name}" if name else str(self.location)

    def read(self, name: str) -> bytes:
        """The whole content of a (small) file."""
        with self._told(name), self._open(name) as stream:
            return stream.read()

    def sizes(self, names: Sequence[str]) -> list[int]:
        """Bytes of each file; DataError for the first that is missing."""
        if self.folder is None:
            with self._told(names[0] if len(names) == 1 else ""):
                return [int(size) for size in self._remote.sizes([self.url(name) for name in names])]
        found = []
        for name in names:
            with self._told(name):
                found.append((self.folder / name).stat().st_size)
        return found

    def names(self) -> list[str]:
        """Every file below the location, sorted; nothing behind http(s), where no list can be relied on."""
        if self.folder is not None:
            return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        if self.url().startswith(("http://", "https://")):
            return []
        with self._told(""):
            self._remote.invalidate_cache()
            root = self._remote._strip_protocol(self.url()).rstrip("/") + "/"
            return sorted(str(path).removeprefix(root) for path in self._remote.find(root))

    def sha256(self, name: str) -> str:
        """Hex digest of a file, read in pieces."""
        if self.folder is not None:
            with self._told(name):
                return sha256(self.folder / name)
        digest = hashlib.sha256()
        with self._told(name), self._open(name) as stream:
            while piece := stream.read(_PIECE_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    @contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """A file to read and seek in, closed after the block; what the block raises from reading is told as ours."""
        with self._told(name), self._open(name) as stream:
            yield stream

    def read_ranges(self, names: Sequence[str], starts: NDArray[np.int64], stops: NDArray[np.int64],
                    ) -> list[memoryview]:
        """Bytes [starts[i], stops[i]) of file names[i]; neighbours are read as one, and remote reads run together.

        The ranges of one file must ascend. Raises DataError where a file ends before its range does.
        """
        merged, places = _merge(names, starts, stops)
        pieces = self._read_merged(merged)
        for (name, start, stop), piece in zip(merged, pieces, strict=True):
            if len(piece) > stop - start:
                raise DataError("the server sends a whole file where a part was asked for", where=self.where(name),
                                fix="serve the corpus by one that answers range requests, or copy it to a folder")
            if len(piece) < stop - start:
                raise DataError(f"the file ends {counted(stop - start - len(piece), 'byte')} too early",
                                where=self.where(name), fix=RESTORE)
        return [memoryview(pieces[piece])[start - merged[piece][1]:stop - merged[piece][1]]
                for piece, start, stop in zip(places, starts.tolist(), stops.tolist(), strict=True)]

    def _read_merged(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        if self.folder is None:
            names, starts, stops = (list(part) for part in zip(*ranges, strict=True)) if ranges else ([], [], [])
            with self._told(names[0] if len(set(names)) == 1 else ""):
                pieces: list[bytes] = self._remote.cat_ranges([self.url(name) for name in names], starts, stops,
                                                              on_error="raise")
                return pieces
        pieces = []
        for name, start, stop in ranges:
            with self._told(name), self._open(name) as stream:
                stream.seek(start)
                pieces.append(stream.read(stop - start))
        return pieces

    def _open(self, name: str) -> BinaryIO:
        if self.folder is not None:
            return (self.folder / name).open("rb")
        stream: BinaryIO = self._remote.open(self.url(name), "rb")
        return stream

    @property
    def _remote(self) -> Any:
        """The fsspec file system of the URL; a forked process, which has none of its threads, has one of its own."""
        if self._system is None or self._system[0] != os.getpid():
            self._system = os.getpid(), self._connect()
        return self._system[1]

    def _connect(self) -> Any:
        scheme = self.where().partition("://")[0]
        try:
            import fsspec
        except ModuleNotFoundError as error:
            raise ConfigError("reading a corpus behind a URL needs the package 'fsspec', which is not installed",
                              where=self.where(), fix="in a clone, install it with: pip install '.[remote]'") from error
        try:
            system = fsspec.core.url_to_fs(self.url())[0]
            system.invalidate_cache()   # what this process listed before may be gone
            return system
        except ImportError as error:
            raise ConfigError(f"'{scheme}://' needs a package that is not installed: {error}", where=self.where(),
                              fix="in a clone, install it with: pip install '.[remote]'") from error
        except ValueError as error:
            raise ConfigError(f"'{scheme}://' is no kind of URL that can be read: {error}", where=self.where(),
                              fix="give a folder, or a URL such as s3://bucket/corpus") from error

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Turn what a file system raises into one sentence."""
        try:
            yield
        except ScgptError:
            raise
        except FileNotFoundError as error:
            what, fix = f"the file '{name}' is missing" if name else f"a file is missing: {error}", RESTORE
            if error.__cause__ is not None:   # a web server that does not answer is "not found" to fsspec
                what += f" or cannot be reached ({_PASSWORD.sub('//', str(error.__cause__))})"
                fix = "check the address and the connection"
            raise DataError(what, where=self.where(), fix=fix) from error
        except Exception as error:   # each remote file system has errors of its own, few of them OSError
            if self.folder is not None and not isinstance(error, OSError):
                raise
            reason = _PASSWORD.sub("//", getattr(error, "strerror", None) or str(error) or type(error).__name__)
            raise DataError(f"the file cannot be read: {reason}", where=self.where(name),
                            fix="check the path, its permissions and the connection") from error


def _merge(names: Sequence[str], starts: NDArray[np.int64], stops: NDArray[np.int64],
           ) -> tuple[list[tuple[str, int, int]], list[int]]:
    """(file, start, stop) of the ranges to read, and for each range asked for the place of the one that holds it."""
    merged: list[tuple[str, int, int]] = []
    places: list[int] = []
    for name, start, stop in zip(names, starts.tolist(), stops.tolist(), strict=True):
        if merged:
            last_name, first, last = merged[-1]
            if name == last_name and first <= start <= last + _GAP_BYTES and stop - first <= _MERGED_BYTES:
                merged[-1] = (name, first, max(last, stop))
                places.append(len(merged) - 1)
                continue
        merged.append((name, start, stop))
        places.append(len(merged) - 1)
    return merged, places
