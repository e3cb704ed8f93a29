"""What a run says: metrics.jsonl and events.jsonl always, a progress bar or plain lines, Weights & Biases. Rank 0 only.

The JSON lines are the record; a resume repeats steps, and the last row of a step counts. A line that a killed process
left unfinished is cut off at the next start.
"""
import errno
import json
import math
import os
import resource
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.config import TrainConfig
from pretrain.objectives import Objective
from pretrain.progress import progress
from pretrain.stopwatch import FORWARD, TO_DEVICE
from pretrain.tracking import Tracker
from pretrain.world import World
from scgpt.errors import CheckpointError

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


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


def last_row(path: Path) -> dict[str, Any] | None:
    """The last row of a JSON lines file; None where there is none. What stands before it is not read."""
    if not path.is_file():
        return None
    lines = path.read_bytes().split(b"\n")[:-1]
    return dict(json.loads(lines[-1])) if lines else None


class RunLog:
    """Everything a run reports. On other ranks than the first it does nothing.

    Args:
        run: the run directory.
        config: of the run; where to track.
        total_steps: for the bar.
        first: whether this is rank 0.
    """

    def __init__(self, run: Path, config: TrainConfig, *, total_steps: int, first: bool) -> None:
        self._first = first
        if not first:
            return
        self._metrics, self._events = JsonLines(run / METRICS), JsonLines(run / EVENTS)
        self._progress = progress(total_steps)
        self._tracker = Tracker(run, config, failed=lambda text: self.event("tracking_failed", text),
                                copied=lambda text: self.event("tracked_apart", text))

    def row(self, row: dict[str, Any]) -> None:
        """One logging step or one validation."""
        if not self._first:
            return
        self._metrics.write(row)
        self._tracker.log(row)
        self._progress.row(row)

    def event(self, event: str, text: str | None = None, **facts: Any) -> None:
        """Something that happened; with `text`, also told to the user."""
        if not self._first:
            return
        self._events.write({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts,
                            **({"text": text} if text else {})})
        if text is not None:
            self._progress.say(text)

    def failed(self, error: BaseException) -> None:
        """The last event of a start that fails; one that cannot be written must not hide the failure itself."""
        with suppress(OSError):
            self.event("failed", error=f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Finish trackers and files."""
        if not self._first:
            return
        self._progress.close()
        self._tracker.finish()
        self._metrics.close()
        self._events.close()


class Window:
    """The steps since the last train row: loss sums, and how fast they were. A checkpoint holds it (`reduced`).

    So a row that a resume completes has the very numbers of the uninterrupted run's.

    Args:
        rows: of a checkpoint: for each step the counts in the order of `objective.units` (first its hidden positions),
            then the sums in the order of `objective.names`.
        objective: what the sums are of.
        peak_tflops: of a rank's device, for MFU; None: not known.
    """

    def __init__(self, rows: Sequence[Sequence[float]], objective: Objective, peak_tflops: float | None = None) -> None:
        self._objective, self._rows, self._peak_tflops = objective, [list(row) for row in rows], peak_tflops
        self._lr, self._waited_s = 0.0, 0.0
        self._restart()

    def _restart(self) -> None:
        self._pending: list[tuple[Sequence[int], Tensor]] = []
        self._cells = self._tokens = self._flops = 0
        self._step_s: list[float] = []
        self._started = self._step_began = time.perf_counter()

    def add(self, sums: Tensor, *, counts: Sequence[int], n_cells: int, n_tokens: int, flops: int, lr: float) -> None:
        """One step: this rank's sums, (names,) float64 on any device; all else is of all ranks."""
        now = time.perf_counter()
        self._step_s.append(now - self._step_began)
        self._step_began = now
        self._pending.append((counts, sums))
        self._cells, self._tokens, self._flops = self._cells + n_cells, self._tokens + n_tokens, self._flops + flops
        self._lr = lr

    @property
    def is_empty(self) -> bool:
        """Whether no step had an update."""
        return not self._pending and not self._rows

    def exclude(self, seconds: float) -> None:
        """Time that was no training."""
        self._started += seconds
        self._step_began += seconds

    def reduced(self, world: World) -> list[list[float]]:
        """The rows of the steps so far, over all ranks."""
        if self._pending:
            sums = world.sum(torch.stack([sums for _, sums in self._pending]).cpu()).tolist()
            self._rows += [[*map(float, counts), *row] for (counts, _), row in zip(self._pending, sums, strict=True)]
            self._pending = []
        return self._rows

    def row(self, world: World, waited_s: float, parts_s: Mapping[str, float] = MappingProxyType({})) -> dict[str, Any]:
        """The metrics of the window, which begins anew: means over all that its terms sum over, rates over all ranks.

        All ranks call it, for docs/metrics.md has figures of the slowest one.

        Args:
            world: the ranks.
            waited_s: what this rank's loader has waited since it was made.
            parts_s: what the parts of this rank's steps took since the last row, see `Stopwatch`.
        """
        rows = self.reduced(world)
        n_units = len(self._objective.units)
        totals = [sum(column) for column in zip(*rows, strict=True)]
        means = self._objective.means(totals[n_units:], totals[:n_units])
        elapsed_s, steps = time.perf_counter() - self._started, max(1, len(self._step_s))
        median_s, slow_s = np.percentile(self._step_s, (50, 95)).tolist() if self._step_s else (0.0, 0.0)
        tflops_per_s = self._flops / elapsed_s / 1e12
        row = {**means, "lr": self._lr, "cells_per_s": self._cells / elapsed_s,
               "tokens_per_s": self._tokens / elapsed_s, "tflops_per_s": tflops_per_s,
               "mfu": tflops_per_s / (self._peak_tflops * world.world_size) if self._peak_tflops else None,
               "step_time_s": elapsed_s / steps, "step_time_p50_s": median_s, "step_time_p95_s": slow_s,
               **_of_ranks(world, (waited_s - self._waited_s) / steps,
                           {name: seconds / steps for name, seconds in parts_s.items()})}
        self._waited_s, self._rows = waited_s, []
        self._restart()
        return row


def _of_ranks(world: World, data_wait_s: float, parts_s: Mapping[str, float]) -> dict[str, float]:
    """Seconds a step and memory of all ranks, and the rank that the others wait for.

    Up to the end of the forward passes ranks do not wait for each other (but to gather ZeRO 3's parameters), so what a
    rank takes until then is its own.
    """
    told = world.gather((data_wait_s, dict(parts_s), peak_memory_bytes(world)))
    own_s = [wait_s + parts.get(TO_DEVICE, 0.0) + parts.get(FORWARD, 0.0) for wait_s, parts, _ in told]
    mean_s = sum(own_s) / len(own_s)
    return {"data_wait_s": max(wait_s for wait_s, _, _ in told),
            **{f"{name}_s": sum(parts[name] for _, parts, _ in told) / len(told) for name in parts_s},
            "memory_bytes": max(n_bytes for _, _, n_bytes in told),
            "slowest_rank": own_s.index(max(own_s)), "slowest_rank_ratio": max(own_s) / mean_s if mean_s else 1.0}


def peak_memory_bytes(world: World) -> int:
    """The most that tensors took on this rank's GPU since the last call; without one: the process, since it began."""
    if world.device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024   # Linux counts in KiB
    n_bytes = torch.cuda.max_memory_allocated(world.device)
    torch.cuda.reset_peak_memory_stats(world.device)
    return n_bytes
