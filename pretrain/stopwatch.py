"""Seconds that the parts of a step take, on the device that does the work, without waiting for it."""
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

FORWARD, BACKWARD, OPTIMIZER, TO_DEVICE = "forward", "backward", "optimizer", "to_device"


class Stopwatch:
    """Adds up seconds by part. On a GPU, events in its stream measure, and are read when the sums are asked for.

    Each part is also a range of a profile (`scgpt train --profile`).
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure the block as `name`."""
        with record_function(name):
            if self._on_gpu:
                start = self._now()
                yield
                self._events.append((name, start, self._now()))
            else:
                started = time.perf_counter()
                yield
                self._seconds[name] += time.perf_counter() - started

    @staticmethod
    def _now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def take(self) -> dict[str, float]:
        """The sums since the last call. On a GPU it waits for what was measured."""
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1e3
        taken = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return taken
