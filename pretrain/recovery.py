"""How a run survives: signals, time limit, a launcher that is gone, orphans of the last start, steps without an update.

A step whose loss or gradient is not finite changes no weight on any rank (pretrain.engine). After too many in a row the
run goes back to the weights of an earlier checkpoint and on with the next global batch: those between are skipped, for
with them the same would happen again. All of it follows from checkpoints, configuration and RunState alone, so a run
that is killed in the middle repeats it.
"""
import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from pretrain.world import World
from scgpt.collate import PackedBatch
from scgpt.errors import CheckpointError
from scgpt.process import INTERRUPTING, Interrupter, may_interrupt

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
        for number in filter(may_interrupt, INTERRUPTING):
            earlier = self._previous[number] = signal.signal(number, self._note)
            if isinstance(earlier, Interrupter):
                self._signal = earlier.number
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


@dataclass(frozen=True, slots=True)
class Fault:
    """What was not finite in a step, over all ranks."""

    terms: tuple[str, ...]      # of the loss; none: the gradient alone
    cell_ids: tuple[int, ...]   # of the micro-batches with such a loss; of the whole global batch where there is none

    @classmethod
    def of(cls, names: Sequence[str], batches: Sequence[PackedBatch], sums: Sequence[torch.Tensor],
           world: World) -> "Fault":
        """All ranks call it, after the step.

        Args:
            names: (names,) of the sums.
            batches: this rank's micro-batches.
            sums: one a micro-batch, (names,).
            world: whose ranks are asked.
        """
        bad = [~part.isfinite().cpu() for part in sums]
        terms = [name for number, name in enumerate(names) if any(part[number] for part in bad)]
        guilty = [batch for batch, part in zip(batches, bad, strict=True) if part.any()]
        told = world.gather((terms, _cells_of(guilty)))
        if not any(cells for _, cells in told):
            told = world.gather((terms, _cells_of(batches)))
        found = {term for terms, _ in told for term in terms}
        cell_ids = sorted(cell for _, cells in told for cell in cells)
        return cls(tuple(name for name in names if name in found), tuple(cell_ids))

    def __str__(self) -> str:
        return ", ".join(self.terms or ("gradient",))


def _cells_of(batches: Sequence[PackedBatch]) -> list[int]:
    return [cell for batch in batches for cell in batch.cell_ids.tolist()]


def rollback_targets(saved: Sequence[int], *, last_update: int, rollbacks: Sequence[Sequence[int]],
                     save_every: int) -> list[int]:
    """Which checkpoints a run may go back to, the first one first.

    Weights that were saved right before the trouble may be its cause: a checkpoint counts where an update after it was
    finite. What lies between an earlier roll-back's checkpoint and its end led to trouble once; where that roll-back
    brought no update, its checkpoint did too.

    Args:
        saved: steps of the checkpoints.
        last_update: the last step whose loss and gradient were finite, or that ended with a roll-back.
        rollbacks: the earlier ones, [checkpoint, steps done then].
        save_every: checkpoints at its multiples, and those of roll-backs, come first: an undisturbed run has them too.
    """
    ends = {end for _, end in rollbacks}
    fit = [step for step in saved if step < last_update and not any(begin <= step < end for begin, end in rollbacks)]
    return sorted(fit, key=lambda step: (step % save_every == 0 or step in ends, step), reverse=True)
