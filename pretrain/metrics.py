"""What a run says: metrics.jsonl and events.jsonl always, a progress bar or plain lines, Weights & Biases. Rank 0 only.

The JSON lines are the record; a resume repeats steps, and the last row of a step counts. A line that a killed process
left unfinished is cut off at the next start. Trackers may fail: that is told once, and the run goes on.
"""
import errno
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.config import TrainConfig
from pretrain.objectives import Objective
from pretrain.world import World
from scgpt.errors import CheckpointError
from scgpt.files import remove

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
_WANDB_DIRS = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")


class JsonLines:
    """An append-only file of one JSON object a line, each written at once."""

    def __init__(self, path: Path) -> None:
        if path.is_file():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(path, whole)
        self._path, self._stream = path, path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; numbers that are not finite become null. Raises OSError with the path."""
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in row.items()}
        line = json.dumps(finite, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            n_written = self._stream.write(line)
        except OSError as error:
            error.filename = str(self._path)
            raise
        if n_written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, without an unfinished last line. Raises CheckpointError for any other bad line."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise CheckpointError("this line is no JSON object", where=f"{path}:{number}",
                                  fix="mend or remove the line") from error
    return rows


def say(line: str) -> None:
    """One line to stderr."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class RunLog:
    """Everything a run reports. On other ranks than the first it does nothing.

    Args:
        run: the run directory.
        config: of the run; where to track.
        total_steps: for the bar.
        first: whether this is rank 0.
    """

    def __init__(self, run: Path, config: TrainConfig, *, total_steps: int, first: bool) -> None:
        self._first, self._total = first, total_steps
        if not first:
            return
        self._metrics, self._events = JsonLines(run / METRICS), JsonLines(run / EVENTS)
        self._bar = _Bar(total_steps) if sys.stderr.isatty() else None
        self._wandb = self._start_wandb(run, config)

    def row(self, row: dict[str, Any]) -> None:
        """One logging step or one validation."""
        if not self._first:
            return
        self._metrics.write(row)
        prefix = "" if row["split"] == "train" else f"{row['split']}/"
        tracked = {f"{prefix}{key}": value for key, value in row.items() if key not in ("step", "split")}
        self._track(lambda run: run.log(tracked, step=row["step"]))
        line = describe(row, self._total)
        if self._bar is None:
            say(line)
        elif row["split"] == "train":
            self._bar.update(row["step"], line)
        else:
            self._bar.say(line)

    def event(self, event: str, text: str | None = None, **facts: Any) -> None:
        """Something that happened; with `text`, also told to the user."""
        if not self._first:
            return
        self._events.write({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts,
                            **({"text": text} if text else {})})
        if text is not None:
            (say if self._bar is None else self._bar.say)(text)

    def failed(self, error: BaseException) -> None:
        """The last event of a start that fails; one that cannot be written must not hide the failure itself."""
        with suppress(OSError):
            self.event("failed", error=f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Finish trackers and files."""
        if not self._first:
            return
        if self._bar is not None:
            self._bar.close()
        self._track(lambda run: run.finish())
        self._metrics.close()
        self._events.close()

    def _track(self, call: Callable[[Any], None]) -> None:
        """Call the tracker's run, where there is one; the first failure is told and ends the tracking, not the run."""
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:  # noqa: BLE001 whatever the tracker raises
            self._wandb = None
            with suppress(OSError):
                self.event("tracking_failed", f"wandb failed ({str(error).splitlines()[0] if str(error) else error!r}):"
                                              " the run goes on without it; metrics.jsonl holds all")

    def _start_wandb(self, run: Path, config: TrainConfig) -> Any:
        """The tracker's run, kept below RUN/wandb; None where it is disabled or cannot start."""
        if config.tracking.wandb == "disabled":
            return None
        folder = (run / "wandb").resolve()
        folder.mkdir(exist_ok=True)
        for name in _WANDB_DIRS:
            os.environ.setdefault(name, str(folder if name != "WANDB_DIR" else run.resolve()))
        os.environ.setdefault("WANDB_SILENT", "true")
        logging.raiseExceptions = False   # wandb's own log on a full disk: no traceback for every line
        for left in folder.glob("tmp*wandb-*"):   # of a start that was killed
            remove(left)
        with _temporary_files_in(folder):
            return self._init_wandb(run, config)

    def _init_wandb(self, run: Path, config: TrainConfig) -> Any:
        try:
            import wandb
        except ImportError:
            self.event("tracking_failed", "wandb is not installed: the run is not tracked; metrics.jsonl holds all")
            return None
        for mode in dict.fromkeys((config.tracking.wandb, "offline")):
            try:
                return wandb.init(project=config.tracking.project, name=run.resolve().name, mode=mode,
                                  dir=run.resolve(), config=config.model_dump(mode="json"),
                                  settings=wandb.Settings(init_timeout=30, console="off", x_disable_stats=True))
            except (wandb.Error, OSError) as error:
                self.event("tracking_failed", f"wandb ({mode}) cannot start: {str(error).splitlines()[0]}")
        return None


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """wandb makes temporary folders when it is imported, and leaves them when it is killed: not in the system's."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


class _Bar:
    """A bar on a terminal, and lines above it."""

    def __init__(self, total_steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[line]}"))
        self._progress = Progress(*columns, console=Console(stderr=True), redirect_stderr=False)
        self._task = self._progress.add_task("train", total=total_steps, line="")
        self._progress.start()

    def update(self, step: int, line: str) -> None:
        self._progress.update(self._task, completed=step, line=line.split("  ", 1)[-1])

    def say(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


class Window:
    """The steps since the last train row: loss sums, and how fast they were. A checkpoint holds it (`reduced`).

    So a row that a resume completes has the very numbers of the uninterrupted run's.

    Args:
        rows: of a checkpoint: for each step the counts in the order of `objective.units` (first its hidden positions),
            then the sums in the order of `objective.names`.
        objective: what the sums are of.
    """

    def __init__(self, rows: Sequence[Sequence[float]], objective: Objective) -> None:
        self._objective, self._rows = objective, [list(row) for row in rows]
        self._lr, self._waited_s = 0.0, 0.0
        self._restart()

    def _restart(self) -> None:
        self._pending: list[tuple[Sequence[int], Tensor]] = []
        self._steps = self._cells = self._tokens = 0
        self._started = time.perf_counter()

    def add(self, sums: Tensor, *, counts: Sequence[int], n_cells: int, n_tokens: int, lr: float) -> None:
        """One step: this rank's sums, (names,) float64 on any device; the counts are of all ranks."""
        self._pending.append((counts, sums))
        self._steps, self._cells, self._tokens = self._steps + 1, self._cells + n_cells, self._tokens + n_tokens
        self._lr = lr

    @property
    def is_empty(self) -> bool:
        """Whether no step had an update."""
        return not self._pending and not self._rows

    def exclude(self, seconds: float) -> None:
        """Time that was no training."""
        self._started += seconds

    def reduced(self, world: World) -> list[list[float]]:
        """The rows of the steps so far, over all ranks."""
        if self._pending:
            sums = world.sum(torch.stack([sums for _, sums in self._pending]).cpu()).tolist()
            self._rows += [[*map(float, counts), *row] for (counts, _), row in zip(self._pending, sums, strict=True)]
            self._pending = []
        return self._rows

    def row(self, world: World, waited_s: float) -> dict[str, float]:
        """The metrics of the window, which begins anew: means over all that its terms sum over, rates over all ranks.

        `waited_s` is what the loader has waited since it was made.
        """
        rows = self.reduced(world)
        n_units = len(self._objective.units)
        totals = [sum(column) for column in zip(*rows, strict=True)]
        means = self._objective.means(totals[n_units:], totals[:n_units])
        elapsed_s, steps = time.perf_counter() - self._started, max(1, self._steps)
        row = {**means, "lr": self._lr, "cells_per_s": self._cells / elapsed_s,
               "tokens_per_s": self._tokens / elapsed_s, "step_time_s": elapsed_s / steps,
               "data_wait_s": (waited_s - self._waited_s) / steps}
        self._waited_s, self._rows = waited_s, []
        self._restart()
        return row


def describe(row: Mapping[str, Any], total_steps: int) -> str:
    """A row as a line of a log."""
    if row["split"] == "train":
        return (f"step {row['step']}/{total_steps}  loss {row['loss']:.2f}  lr {row['lr']:.2e}  "
                f"grad {row['grad_norm']:.2f}  {row['cells_per_s']:,.0f} cells/s  {row['tokens_per_s']:,.0f} tokens/s")
    return (f"step {row['step']}/{total_steps}  {row['split']}: loss_expression {row['loss_expression']:.2f} "
            f"(predicting each gene's mean: {row['loss_gene_mean']:.2f})")
