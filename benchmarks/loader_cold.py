"""Memory that holds less than the corpus: a memory cgroup for one child, or pages dropped before it starts.

The page cache is charged to the cgroup of the process that reads, so a limit below the corpus makes shuffled reads go
to storage again and again, as they do where a corpus is larger than the machine.
"""
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "scgpt-bench-"   # of our cgroups; the process that made it follows
SHARE = 4                 # the limit is this part of the corpus,
LEAST_BYTES = 768 << 20   # but room for the program itself
_ROOT = Path("/sys/fs/cgroup")


def files_of(corpus: Path) -> list[Path]:
    """The token files."""
    return sorted(corpus.rglob("*.arrow"))


def limit_bytes(corpus: Path) -> int:
    """What the process that reads the corpus may hold, page cache included."""
    return max(sum(path.stat().st_size for path in files_of(corpus)) // SHARE, LEAST_BYTES)


def drop_pages(corpus: Path) -> None:
    """Have the kernel forget what it holds of the corpus, where nobody maps it."""
    for path in files_of(corpus):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(corpus: Path) -> None:
    """Have the kernel hold the corpus, as far as memory allows."""
    buffer = bytearray(16 << 20)
    for path in files_of(corpus):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


@contextmanager
def memory_limit(n_bytes: int) -> Iterator[Path | None]:
    """A memory cgroup of that size, which a process enters by `join`; None where none can be made.

    It is removed at the end, with whatever still runs in it; one that a killed benchmark left is removed by the next.
    """
    parent, limit = _parent()
    group = parent / f"{PREFIX}{os.getpid()}" if parent is not None else None
    try:
        if parent is not None and group is not None:
            _remove_abandoned(parent)
            try:
                group.mkdir()
                (group / limit).write_text(str(n_bytes))
            except OSError:   # no right to, or the controller is not handed down
                _remove(group)
                group = None
        yield group
    finally:
        if group is not None:
            _remove(group)


def join(group: Path) -> None:
    """Move this process into the cgroup."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _parent() -> tuple[Path | None, str]:
    """Where a cgroup can be made, and its file for the limit: version 1's controller, else version 2's."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(",") and (_ROOT / "memory").is_dir():
            return _ROOT / "memory" / path.strip("/"), "memory.limit_in_bytes"
        if not controllers and (_ROOT / path.strip("/") / "cgroup.controllers").exists():
            parent = _ROOT / path.strip("/")
            with suppress(OSError):   # it holds processes itself, or is not ours: then the group gets no limit
                (parent / "cgroup.subtree_control").write_text("+memory")
            return parent, "memory.max"
    return None, ""


def _remove_abandoned(parent: Path) -> None:
    for group in parent.glob(f"{PREFIX}*"):
        if not Path(f"/proc/{group.name.removeprefix(PREFIX)}").exists():
            _remove(group)


def _remove(group: Path) -> None:
    """End what runs in the cgroup, wait for it, remove the cgroup."""
    for _ in range(50):
        if not group.is_dir():
            return
        for process in (group / "cgroup.procs").read_text().split():
            try:
                os.kill(int(process), signal.SIGKILL)
            except ProcessLookupError:   # it has ended by itself
                continue
        try:
            group.rmdir()
        except OSError:   # the last process is still on its way out
            time.sleep(0.1)
