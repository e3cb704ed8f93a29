"""`--profile`: a torch profiler trace of a few steps of this start, in the run directory. It changes no number."""
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from scgpt.files import publish

T = TypeVar("T")
TRACES = "profile"
SKIPPED_STEPS, TRACED_STEPS = 3, 3   # the first steps of a start allocate, compile and fill caches


def traced(steps: Iterator[T], folder: Path, *, first_step: int, device: torch.device,
           tell: Callable[[Path], None]) -> Generator[T, None, None]:
    """Hand the steps on, and record what is done with some of them: step SKIPPED_STEPS + 1 and those after it.

    The trace is a Chrome trace, gzipped, for https://ui.perfetto.dev or chrome://tracing. A start that ends before its
    last step leaves a shorter one. Close the iterator when leaving early.

    Args:
        steps: of the loader.
        folder: where the trace is written.
        first_step: number of the first step, from 1.
        device: of this rank.
        tell: is called with the file when it is there.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    n_recorded = 0
    try:
        for place, step in enumerate(steps):
            if place == SKIPPED_STEPS:
                profiler.start()
            n_recorded = place - SKIPPED_STEPS + 1
            yield step
            if n_recorded == TRACED_STEPS:
                break
    finally:
        if n_recorded > 0:
            profiler.stop()
            tell(_write(profiler, folder, first_step + SKIPPED_STEPS, n_recorded))
    yield from steps


def _write(profiler: torch.profiler.profile, folder: Path, first_step: int, n_steps: int) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{first_step:08d}-{first_step + n_steps - 1:08d}.json.gz"
    with publish(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
    return path
