"""Whoever runs the tasks of a pass: what passes ask of them, and the workers of this process, threads.

Ray's workers (ray_workers.py) answer to the same names; both call `find_or_do`, so that neither changes a byte.
"""
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.build_dir import Record
from data_pipeline.progress import Progress
from data_pipeline.quarantine import tried
from data_pipeline.tasks import Layout
from scgpt.counted import counted
from scgpt.errors import DataError


@dataclass(frozen=True, slots=True)
class Job:
    """One call of a task: `function(layout, *arguments)`."""

    function: Callable[..., Record]
    task: str                     # name of its record
    units: int                    # what it adds to the progress
    arguments: tuple[Any, ...]


class Workers(Protocol):
    """Whoever runs the tasks of a pass."""

    def share(self, value: object) -> Any:
        """Put a small value where every task can get it, once instead of with each call."""

    def run(self, stage: str, layout: Layout, jobs: Sequence[Job], unit: str, progress: Progress) -> list[Record]:
        """The result of each job, in their order: found finished, or done now."""

    def __str__(self) -> str:
        """Who they are, for people."""


class Threads:
    """Workers of this process, a thread a core: inflating, hashing and compiled loops let go of the interpreter."""

    def __init__(self, out: Path) -> None:
        self._out, self._n_threads = out, len(os.sched_getaffinity(0))

    def __str__(self) -> str:
        return f"{counted(self._n_threads, 'thread')} of this process"

    def share(self, value: object) -> object:
        """See Workers."""
        return value

    def run(self, stage: str, layout: Layout, jobs: Sequence[Job], unit: str, progress: Progress) -> list[Record]:
        """See Workers. Raises what a task raised, once no other is at work: the directory is given free after this."""
        progress.start(stage, sum(job.units for job in jobs), unit)
        with ThreadPoolExecutor(self._n_threads) as pool:
            try:
                tasks = {pool.submit(find_or_do, job.function, layout, job.task, *job.arguments): job for job in jobs}
                for task in as_completed(tasks):
                    with disk_errors(self._out):
                        task.result()
                    progress.advance(tasks[task].units)
            finally:
                pool.shutdown(cancel_futures=True)
        progress.finish()
        return [task.result() for task in tasks]


def find_or_do(function: Callable[..., Record], layout: Layout, task: str, *arguments: object) -> Record:
    """In a worker: the record of a finished task whose files are whole, else that of doing it."""
    record = layout.build.read_record(task)
    return tried(partial(function, layout, *arguments), layout.config.on_error) if record is None else record


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Raise an OSError of the block as a DataError about the corpus in `out`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"the corpus cannot be written: {error.strerror or error}", where=str(out),
                        fix="free some space or mend the disk, then run the same command again: what is finished "
                            "is kept") from error
