"""Location: where a source lies, a file or a folder, on a disk of this machine or behind a URL that fsspec opens.

It is what workers are handed: a text, from which each opens its own connection. Credentials come from the environment
and the configuration files that the storage's own library reads; what a URL itself carries of them (`user:password@`,
the signature after `?`) is used to open it and shown to nobody.
"""
import contextlib
import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_pipeline.sources.storage import REMOTE_BLOCK_BYTES, Entry, entry_of, file_system
from scgpt import files
from scgpt.errors import ConfigError, ScgptError, SourceError

_STREAM_BYTES = 8 << 20   # a request while a whole remote file is read
# Endings that are no part of a source's name, the longest first.
_SUFFIXES = (".datatable.parquet", ".zarr.zip", ".h5ad", ".zarr", ".parquet", ".arrow", ".soma", ".scb", ".mtx.gz",
             ".mtx", ".h5", ".zip", ".gz")
_HTTP = ("http", "https")
_ABSENT = (404, 410)   # what a web server answers for what it lacks


@dataclass(frozen=True, slots=True, repr=False, order=True)
class Location:
    """The place of a source. `Location.of` makes one."""

    url: str     # an absolute path, or a URL whole, secrets included: for opening, never for showing

    @classmethod
    def of(cls, place: "Location | Path | str") -> "Location":
        """The location of a path (relative to the working directory) or a URL; `file://` is a path."""
        if isinstance(place, Location):
            return place
        text = str(place)
        scheme, mark, rest = text.partition("://")
        if mark and scheme.lower() not in ("file", "local"):
            return cls(f"{scheme.lower()}://{rest.rstrip('/')}")
        return cls(str(Path(rest if mark else text).expanduser().absolute()))

    def __str__(self) -> str:
        """For people: without what only its owner should see."""
        if not self.is_remote:
            return self.url
        shown = re.sub(r"//[^/@]*:[^/@]*@", "//", self.url)
        return re.sub(r"[?#].*", "", re.sub(r"//[^/@]*@", "//", shown)) if self.scheme in _HTTP else shown

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.url}/{name}")

    @property
    def scheme(self) -> str:
        """`s3`, `https`, ...; empty for a path."""
        return self.url.partition("://")[0] if self.is_remote else ""

    @property
    def is_remote(self) -> bool:
        """Whether it is behind a URL."""
        return "://" in self.url

    @property
    def path(self) -> Path:
        """The path of what lies on this machine; ConfigError for a URL."""
        if self.is_remote:
            raise ConfigError(f"only a local path can be read here, not {self.scheme}://", where=str(self),
                              fix="copy it to a disk first")
        return Path(self.url)

    @property
    def name(self) -> str:
        """The last part: name of the file or folder."""
        return str(self).rstrip("/").rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without the ending that says its kind."""
        ending = next((suffix for suffix in _SUFFIXES if self.name.lower().endswith(suffix)), "")
        return self.name[:len(self.name) - len(ending)] or self.name

    @property
    def suffix(self) -> str:
        """The last ending, with its dot, as it is written."""
        return Path(self.name).suffix

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        if not self.is_remote:
            return Path(self.url).exists()
        with self._access():
            system, path = self._system()
            if self.scheme not in _HTTP:
                return bool(system.exists(path))
            try:   # `exists` takes a server that is down, or that refuses, for one that lacks the file
                system.info(path)
            except FileNotFoundError as error:
                if not _is_absent(error):
                    raise
                return False
            return True

    def check(self) -> None:
        """Raise SourceError where there is nothing, or what is neither a file nor a folder."""
        if not self.exists():
            raise SourceError("there is no such file", where=str(self), fix="check the path")
        if not self.is_remote and not Path(self.url).is_dir():
            _check_file(Path(self.url))

    def is_folder(self) -> bool:
        """Whether it is a folder; a prefix of an object store is one when there is something below it."""
        if not self.is_remote:
            return Path(self.url).is_dir()
        if self.scheme in _HTTP:
            return False   # a web server lists nothing that could be relied on
        with self._access():
            system, path = self._system()
            return bool(system.isdir(path))

    def names(self) -> list[str]:
        """What lies directly in the folder, files and folders, sorted; nothing for a file."""
        if not self.is_folder():
            return []
        with self._access():
            if not self.is_remote:
                return sorted(path.name for path in Path(self.url).iterdir())
            system, path = self._system()
            found = [str(name).rstrip("/") for name in system.ls(path, detail=False)]
            return sorted({name.rpartition("/")[2] for name in found if name.strip("/") != path.strip("/")})

    def files(self) -> list[Entry]:
        """The file itself, or every file below the folder, sorted by name."""
        with self._access():
            return self._remote_files() if self.is_remote else self._local_files()

    def file_system(self) -> Any:
        """The fsspec file system behind a URL, as the environment and its configuration files set it up."""
        with self._access():
            return self._system()[0]

    def open(self) -> BinaryIO:
        """The file's bytes, seekable; a remote one by blocks of 1 MiB, of which 32 are kept."""
        with self._access():
            if not self.is_remote:
                return Path(self.url).open("rb")
            system, path = self._system()
            stream = system.open(path, "rb", block_size=REMOTE_BLOCK_BYTES, cache_type="blockcache")
            if not stream.seekable() or not self._sends_parts(system, path, stream.size):
                stream.close()
                raise _no_parts(self)
            return cast(BinaryIO, stream)

    def _sends_parts(self, system: Any, path: str, size: int) -> bool:
        """Whether a web server heeds `Range`, asked for the last byte; of a file in one block it need not."""
        return (self.scheme not in _HTTP or size <= REMOTE_BLOCK_BYTES
                or len(system.cat_file(path, start=size - 1, end=size)) == 1)

    def expand(self) -> "list[Location]":
        """What matches the glob, sorted; itself where it is none, or where a file bears just this name."""
        if not glob.has_magic(str(self)) or self.scheme in _HTTP or self.exists():
            return [self]
        if not self.is_remote:
            return sorted(Location(name) for name in glob.glob(self.url, recursive=True))  # noqa: PTH207 absolute
        with self._access():
            system, path = self._system()
            return sorted(Location.of(system.unstrip_protocol(name)) for name in system.glob(path))

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes [first, last) of a file, for each span."""
        with self._access():
            if not self.is_remote:
                parts = []
                with Path(self.url).open("rb") as stream:
                    for first, last in spans:
                        stream.seek(first)
                        parts.append(stream.read(last - first))
                return parts
            system, path = self._system()
            parts = [bytes(system.cat_file(path, start=first, end=last)) if last > first else b""
                     for first, last in spans]
            if [len(part) for part in parts] != [last - first for first, last in spans]:
                raise _no_parts(self)
            return parts

    def file_sha256(self) -> str:
        """Hex digest of a file, read from front to back."""
        with self._access():
            if not self.is_remote:
                return files.sha256(Path(self.url))
            digest = hashlib.sha256()
            system, path = self._system()
            with system.open(path, "rb", block_size=_STREAM_BYTES, cache_type="readahead") as stream:
                while piece := stream.read(_STREAM_BYTES):
                    digest.update(piece)
            return digest.hexdigest()

    def _local_files(self) -> list[Entry]:
        root = Path(self.url)
        paths = ([Path(folder, name) for folder, _, names in os.walk(root, onerror=_raise, followlinks=True)
                  for name in names]
                 if root.is_dir() else [root])
        found = []
        for path in paths:
            status = _check_file(path)
            name = path.relative_to(root).as_posix() if path != root else root.name
            found.append(Entry(name, status.st_size, str(status.st_mtime_ns)))
        return sorted(found, key=lambda entry: entry.name)

    def _remote_files(self) -> list[Entry]:
        system, path = self._system()
        if not self.is_folder():
            return [entry_of(self.name, system.info(path))]
        base = path.rstrip("/") + "/"
        found = system.find(path, detail=True)
        return sorted((entry_of(str(name).removeprefix(base), about) for name, about in found.items()),
                      key=lambda entry: entry.name)

    def _system(self) -> tuple[Any, str]:
        return file_system(self.url, shown=str(self))

    @contextlib.contextmanager
    def _access(self) -> Iterator[None]:
        """Turn whatever a disk, a network or a storage's library raises into one sentence."""
        try:
            yield
        except ScgptError:
            raise
        except FileNotFoundError as error:
            if not _is_absent(error):
                raise self._unreadable(error.__cause__ or error) from error.__cause__
            where = str(self) if self.is_remote or error.filename is None else str(error.filename)
            fix = "check the path" + ("; folders are read from disks and object stores, not from web servers"
                                      if self.scheme in _HTTP else "")
            raise SourceError("there is no such file", where=where, fix=fix) from error
        except ImportError as error:
            raise ConfigError(f"{self.scheme}:// needs a package that is not installed: {error}", where=str(self),
                              fix="in a clone: pip install '.[remote]'" if self.scheme in ("s3", *_HTTP) else
                                  "install it beside fsspec") from error
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: BaseException) -> SourceError:
        return SourceError(f"cannot be read: {self.cause(error)}", where=str(self),
                           fix="check the address, the credentials and the network" if self.is_remote else
                               "check the file's permissions")

    def cause(self, error: BaseException) -> str:
        """What an error says, in one line, without the secrets of the URL."""
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = " ".join(text.replace(self.url, str(self)).split())
        text = text[1:-1] if isinstance(error, KeyError) else text   # it says the key as Python writes it
        text = re.sub(r"//[^/@\s]*@", "//", re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", text))
        return text[:200] or type(error).__name__


def _is_absent(error: FileNotFoundError) -> bool:
    """Whether a file is not there: of a web server, whatever it answered, fsspec says so, and the answer is the cause.
    """
    return error.__cause__ is None or getattr(error.__cause__, "status", 0) in _ABSENT


def _no_parts(location: Location) -> SourceError:
    return SourceError("the server sends no parts of a file, only the whole", where=str(location),
                       fix="download it first")


def _check_file(path: Path) -> os.stat_result:
    """What the system says of a file; SourceError for what is none: opening a pipe may never return."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise SourceError("it is neither a file nor a folder", where=str(path), fix="give a file")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:   # no manifest could name it
        raise ConfigError("the name is no UTF-8 text", where=ascii(str(path)), fix="rename it") from error
    return status


def _raise(error: OSError) -> None:
    raise error
