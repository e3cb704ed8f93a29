"""How far a build is: a bar on a terminal, a line now and then elsewhere; to stderr, stdout is for the result."""
import time
from types import TracebackType
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from scgpt.counted import counted
from scgpt.stderr import LastingStderr

_LINE_EVERY_S = 10.0


class Progress:
    """Stages one after the other, each with a number of units to do; use it in a `with`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else cast(TextIO, LastingStderr())
        self._bar = Bar(TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(),
                        TextColumn("{task.fields[unit]}  {task.fields[speed]}"), TimeRemainingColumn(),
                        console=Console(file=self._stream), redirect_stderr=False) if self._stream.isatty() else None
        self._task = TaskID(0)
        self._stage, self._unit = "", ""
        self._total = self._done = self._found = 0
        self._started_s = self._told_s = time.monotonic()

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, stage: str, total: int, unit: str, *, found: int = 0) -> None:
        """Begin a stage of `total` units, `found` of which an earlier build has done."""
        self._stage, self._unit, self._total, self._done, self._found = stage, unit, total, found, found
        self._started_s = self._told_s = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(stage, total=total, completed=found, unit=unit, speed="")
        else:
            before = f", {found:,} of them done before" if found else ""
            self._line(counted(total, unit.removesuffix("s"), unit) + before)

    def advance(self, units: int) -> None:
        """Some units more are done."""
        self._done += units
        if self._bar is not None:
            self._bar.update(self._task, advance=units, speed=f"{self._speed():,.0f} {self._unit}/s")
        elif time.monotonic() - self._told_s >= _LINE_EVERY_S:
            self._told_s = time.monotonic()
            left_s = (self._total - self._done) / self._speed() if self._speed() else float("inf")
            self._line(f"{self._done:,} of {self._total:,} {self._unit}, {self._speed():,.0f} {self._unit}/s, "
                       f"{left_s:,.0f} s left")

    def finish(self) -> None:
        """The stage is done."""
        if self._bar is None:
            seconds = time.monotonic() - self._started_s
            self._line(f"done in {seconds:.1f} s, {self._speed():,.0f} {self._unit}/s")

    def _speed(self) -> float:
        elapsed_s = time.monotonic() - self._started_s
        return (self._done - self._found) / elapsed_s if elapsed_s > 0 else 0.0

    def _line(self, text: str) -> None:
        print(f"{self._stage}: {text}", file=self._stream, flush=True)
