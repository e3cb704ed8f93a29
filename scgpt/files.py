"""Publish files so that they are either whole or absent: temporary name, write, fsync, rename, fsync the folder.

A temporary name starts with `.tmp-` and carries host, process and a random word, so two attempts at one file never meet
and whatever a killed process left behind can be told from finished work.
"""
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from scgpt.errors import DataError

TEMPORARY_PREFIX = ".tmp-"
_READ_BYTES = 1 << 20


def temporary_path(path: Path) -> Path:
    """A name beside `path` that no other attempt uses."""
    return path.with_name(f"{TEMPORARY_PREFIX}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def fsync_path(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Hand out a temporary path; when the block succeeds, make what was written there durable and name it `path`.

    Works for a file and for a folder (whose files are made durable one by one; `path` must not exist then). When the
    block raises, the temporary is removed and `path` is what it was; an OSError then names `path`.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        for part in sorted(temporary.rglob("*")) if temporary.is_dir() else []:
            fsync_path(part)
        fsync_path(temporary)
        temporary.rename(path)
        fsync_path(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) and (error.filename is None or str(temporary) in str(error.filename)):
            error.strerror = error.strerror or str(error)   # HDF5 gives a sentence only: a name would hide it
            error.filename = str(path)   # what the user knows, not the temporary name
            del error.filename2
        remove(temporary)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Publish `data` at `path`."""
    with publish(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: object) -> None:
    """Publish `value` as indented JSON, keys in the order given, one trailing newline."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """The bytes that `write_json` writes; the same value gives the same bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Remove a file or a whole folder; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):   # on a read-only disk, unlinking what is not there fails too
        path.unlink(missing_ok=True)


def remove_abandoned(path: Path) -> None:
    """Remove what attempts at `path` by processes of this machine that are gone have left; where no lock is held."""
    prefix = f"{TEMPORARY_PREFIX}{socket.gethostname()}-"
    for left in path.parent.glob(f"{glob.escape(prefix)}*-{glob.escape(path.name)}"):
        process, _, rest = left.name.removeprefix(prefix).partition("-")
        ours = process.isdigit() and rest.partition("-")[2] == path.name
        if ours and not Path(f"/proc/{process}").exists():
            remove(left)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed attempts left in `folder` (not below it). Call only while holding the folder's lock."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        remove(path)


@contextlib.contextmanager
def lock(path: Path, *, holder: str, fix: str) -> Iterator[None]:
    """Hold a kernel lock on `path` (made if missing); the kernel drops it when the process ends, however it ends.

    Raises DataError at once, naming `holder` (what holds it, in words), when another process has it.
    """
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{holder} is already at work here", where=str(path.parent), fix=fix) from error
        yield
