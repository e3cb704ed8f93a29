"""How a run ends early and begins again: signals, time limit, a launcher that is gone, orphans of the last start."""
import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from pretrain.world import World
from scgpt.errors import CheckpointError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ORPHAN_WAIT_S = 120.0   # how long a start waits for ranks of the last one: they end by themselves after a step
_POLL_S = 0.5


class Interruption:
    """Why this rank should stop, if anything asks it to. Use as a context manager: it holds the signal handlers.

    Args:
        max_time_s: seconds from now on after which it asks; None: never.
    """

    def __init__(self, max_time_s: float | None) -> None:
        self._deadline = None if max_time_s is None else time.monotonic() + max_time_s
        self._signal: int | None = None
        self._launchers = _launchers()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt   # Ctrl-C twice: now
        self._signal = number

    @property
    def reason(self) -> str | None:
        """In words, for the log; None while nothing asks."""
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "train.max_time_s is over"
        if self._launchers and _launchers() != self._launchers:
            return "the launcher is gone"
        return None


def _launchers() -> list[int]:
    """Processes whose end makes this one an orphan: DeepSpeed's node launcher and what started it; torchrun's agent."""
    parent = os.getppid()
    command = _read(Path(f"/proc/{parent}/cmdline")).replace("\0", " ")
    if "deepspeed.launcher.launch" in command:
        return [parent, _parent_of(parent)]
    return [parent] if "torchrun" in command or "torch.distributed" in command else []


def _parent_of(process: int) -> int:
    text = _read(Path(f"/proc/{process}/stat"))
    return int(text.rpartition(")")[2].split()[1]) if text else 0   # the name in brackets may hold spaces


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@contextlib.contextmanager
def hold_rank(run: Path, world: World, *, tell: Callable[[str], None], wait_s: float = ORPHAN_WAIT_S) -> Iterator[None]:
    """Hold this rank's kernel lock in RUN/ranks, whose file names its process: `PID HOST`. All ranks call it.

    Ranks of an earlier start that still live are waited for, `wait_s` at most (`tell` says so); nothing is written
    beside them. The kernel drops a lock when its process ends, however it ends. To stop a run, signal the processes
    that RUN/ranks names.

    Raises CheckpointError (every rank) naming the process that still holds the run.
    """
    folder = run / "ranks"
    world.of_first(lambda: _wait_for_others(folder, world, wait_s, tell))
    with (folder / f"rank-{world.rank:05d}").open("a+", encoding="utf-8") as stream:
        held = _try_lock(stream.fileno(), wait_s)
        if all(world.gather(held)):
            stream.truncate(0)
            stream.write(f"{os.getpid()} {socket.gethostname()}\n")
            stream.flush()
        else:
            world.of_first(lambda: _refuse(folder))
        yield


def _wait_for_others(folder: Path, world: World, wait_s: float, tell: Callable[[str], None]) -> None:
    """Rank 0: wait for the locks of every rank of the last start, this start's or not, without keeping them."""
    folder.mkdir(exist_ok=True)
    for path in sorted(folder.glob("rank-*")):
        with path.open("a", encoding="utf-8") as stream:
            if not _try_lock(stream.fileno(), 0.0):
                tell(f"waiting for process {_holder(path)}, a rank of the last start that is still there")
                if not _try_lock(stream.fileno(), wait_s):
                    _refuse(folder)
        if int(path.name.removeprefix("rank-")) >= world.world_size:
            path.unlink()


def _try_lock(descriptor: int, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)


def _holder(path: Path) -> str:
    return " on ".join(_read(path).split())


def _refuse(folder: Path) -> None:
    holders = ", ".join(f"process {_holder(path)} ({path.name})" for path in sorted(folder.glob("rank-*")))
    raise CheckpointError(f"the run is in use: {holders}", where=str(folder.parent),
                          fix="end those processes with `kill`, or wait for them, or give another --out")
