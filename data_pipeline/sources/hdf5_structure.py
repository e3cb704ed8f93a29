"""A look at an HDF5 file's structure in a process of its own, before anything is planned on it.

The HDF5 library trusts a file: where certain bytes of its structure are damaged, it ends the process or never returns
(28 of 2,000 files with random bytes). So a child, forked in some 10 ms, goes through all that readers go through, and
what becomes of it is told in one sentence. It also holds the place of every chunk against the file's length.
"""
import contextlib
import faulthandler
import os
import resource
import select
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import h5py

from data_pipeline.sources.elements import is_array
from data_pipeline.sources.faults import RESTORE
from data_pipeline.sources.location import Location
from scgpt.counted import counted
from scgpt.errors import SourceError

LIMIT_S = 300.0                    # for one file; a sound one of 1,000,000 chunks takes some seconds
_CHILD_BYTES = 4 << 30             # of memory that a damaged length can make the child ask for
_TEXT_ROWS = 1 << 20               # read of a column of text
_UNREAD = frozenset({"obsm", "obsp", "varm", "varp", "uns"})   # no reader goes there


def check_structure(location: Location) -> None:
    """Raise SourceError where reading a local HDF5 file would end or stop this process, or a chunk lies outside it.

    Whatever else is wrong with the file, or is no HDF5 file, is left for its reader to tell.
    """
    if location.is_remote or not location.path.is_file() or not h5py.is_hdf5(location.path):
        return
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)   # threads are no danger: the child calls HDF5 alone
        child = os.fork()
    if child == 0:
        _be_child(location, writing)
    os.close(writing)
    try:
        found = _listen(reading)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)   # not reaped yet: the number is still its own
        os.waitpid(child, 0)
    if found != _SOUND:
        raise SourceError(f"a damaged HDF5 file: {found}", where=str(location), fix=RESTORE)


_SOUND = "sound"


def _listen(reading: int) -> str:
    """What the child has found: `_SOUND`, or what is wrong."""
    deadline = time.monotonic() + LIMIT_S
    heard = b""
    while select.select([reading], [], [], max(deadline - time.monotonic(), 0))[0]:
        piece = os.read(reading, 4096)
        if not piece:
            return heard.decode(errors="replace") or "reading its structure ends the HDF5 library"
        heard += piece
    return f"reading its structure does not end within {LIMIT_S:.0f} s"


def _be_child(location: Location, writing: int) -> None:
    """Walk through the file, say what was found, and end without a trace of the parent's business."""
    with contextlib.suppress(BaseException):
        faulthandler.disable()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(int(LIMIT_S) + 10)   # should the parent be killed: nothing of ours turns on for ever
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _CHILD_BYTES, resource.RLIM_INFINITY))
        outside: list[str] = []
        with _reader_tells(), h5py.File(location.path, "r") as file:
            _walk(file, location.path.stat().st_size, set(), outside)
        os.write(writing, (f"{outside[0]} beyond its end" if outside else _SOUND).encode())
    os._exit(0)


def _reader_tells() -> contextlib.AbstractContextManager[None]:
    """For what raises in the child: the reader will meet it too, where it matters, and tell it with its place."""
    return contextlib.suppress(Exception)


def _walk(group: Any, file_bytes: int, seen: set[Any], outside: list[str]) -> None:
    """Go through everything below a group; note in `outside` which arrays have chunks that lie outside the file."""
    for name in group.attrs:
        with _reader_tells():
            group.attrs[name]
    for name in set(group) - (_UNREAD if group.name == "/" else frozenset()):
        with _reader_tells():
            element = group[name]
            identity = h5py.h5o.get_info(element.id).addr
            if identity in seen:
                continue
            seen.add(identity)
            if is_array(element):
                _look(element, file_bytes, outside)
            else:
                _walk(element, file_bytes, seen, outside)


def _look(array: h5py.Dataset, file_bytes: int, outside: list[str]) -> None:
    for name in array.attrs:
        with _reader_tells():
            array.attrs[name]
    beyond = 0

    def place(chunk: Any) -> None:
        nonlocal beyond
        beyond += chunk.byte_offset is not None and chunk.byte_offset + chunk.size > file_bytes

    if array.chunks:
        array.id.chunk_iter(place)
    if beyond:
        outside.append(counted(beyond, f"chunk of {array.name} lies", f"chunks of {array.name} lie"))
    if array.dtype.kind == "O" and array.shape:
        array[:_TEXT_ROWS]
