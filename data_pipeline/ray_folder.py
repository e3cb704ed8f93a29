"""The private folder of a local Ray, and the end of everything that Ray leaves: processes, sockets, logs.

Ray shut down while it starts, or whose driver was killed, leaves agents behind that even make its folder again. So each
of its processes carries the folder's name in its environment, and is ended by that.
"""
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = "scgpt-ray-"
_MARK = "SCGPT_RAY_FOLDER"        # environment of the processes of a local Ray
_SHORT = 23                      # characters: our own name adds 19, Ray at most 65, and a socket's path ends at 107
_STALE_S = 60.0                  # a folder of a living build has an owner at once
_PATIENCE_S = 5.0                # for processes of Ray to end


@contextmanager
def ray_folder() -> Iterator[Path]:
    """A folder with a short path for Ray's sockets and logs; what a killed build has left of its own goes too."""
    parent = Path(tempfile.gettempdir())
    parent = parent if len(str(parent)) <= _SHORT else Path("/tmp")  # noqa: S108 mkdtemp makes it private
    for left in parent.glob(f"{TEMPORARY}*"):
        _remove_if_abandoned(left)
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
    owner = folder / "owner"
    with (folder / "new").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        (folder / "new").rename(owner)   # never seen unlocked while we live
        try:
            with _marked(folder):
                yield folder
        finally:
            _remove(folder)


@contextmanager
def _marked(folder: Path) -> Iterator[None]:
    """Let every process that Ray starts here carry the folder's name in its environment; end them with the block.

    Ray leaves agents behind when it is shut down while it starts, and they make the folder again.
    """
    os.environ.setdefault("SPT_NOENV", "1")   # else agents write their process title over the mark
    outer = os.environ.get(_MARK)
    os.environ[_MARK] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(_MARK)
        if outer is not None:
            os.environ[_MARK] = outer
        _end_processes(folder)


def _end_processes(folder: Path) -> None:
    """Kill the processes of the Ray that had `folder`, and no others; this one's environment never had the mark."""
    mark = f"{_MARK}={folder}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):   # of somebody else, or gone meanwhile
            if mark in (process / "environ").read_bytes().split(b"\0") and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)


def _remove_if_abandoned(folder: Path) -> None:
    with suppress(OSError):   # of somebody else, in use, or gone meanwhile
        if not (folder / "owner").exists():
            # Removed while a process of the dead build was still starting, and made again by it.
            if time.time() - folder.stat().st_mtime > _STALE_S:
                _remove(folder)
            return
        with (folder / "owner").open("r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _end_processes(folder)
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder in which processes that are about to end may still make files."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while folder.exists() and time.monotonic() < deadline_s:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
