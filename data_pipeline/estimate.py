"""How long a build will take: the first rows of its largest source are built for real, and the seconds scaled up.

Measured on the machine that asks, with its disks and this very source. What it assumes: all values cost what these do,
and every core is kept busy. The start of Ray, some seconds, is not counted.
"""
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.build_dir import BuildDir
from data_pipeline.cells import SPLITS
from data_pipeline.duplicates import HashFile
from data_pipeline.plan import Block, Plan
from data_pipeline.tasks import Layout, find_duplicates, hash_file, merge_to_shard, shard_tasks, tokenize_to_run
from scgpt.data.schema import expression_dtype
from scgpt.errors import SourceError

_SAMPLE_VALUES = 1 << 21   # stored values of the rows that are built: some tenths of a second


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of a build, and what they were judged by."""

    core_s: float   # of one core, for all passes over all values
    cores: int      # that this process may use
    source: str     # whose first cells were built
    cells: int      # of them
    values: int     # stored values of these

    @property
    def wall_s(self) -> float:
        """Where every core of this machine is busy."""
        return self.core_s / self.cores


def estimate(plan: Plan) -> Estimate | None:
    """Build a sample in a temporary folder; None where no source lets a few rows be read, or they cannot be.

    A source that is stored by columns does not: it would be read as a whole.
    """
    places = [place for place, source in enumerate(plan.sources) if not source.by_columns and source.n_values]
    if not places:
        return None
    place = max(places, key=lambda number: plan.sources[number].n_values)
    try:
        sample = _sample(plan, place)
        _seconds(plan, Block(0, place, 0, 1, sample.values, 0))   # machine code, libraries, connections
        seconds = _seconds(plan, sample)
    except (SourceError, OSError):
        return None
    return Estimate(plan.n_values * seconds / max(sample.values, 1), len(os.sched_getaffinity(0)),
                    plan.sources[place].name, sample.last, sample.values)


def _sample(plan: Plan, place: int) -> Block:
    """The first rows of a source that have values."""
    rows = next(block.last for block in plan.blocks if block.source == place and block.values)
    with plan.sources[place].open() as source:
        offsets = source.value_offsets(0, rows)
    rows = max(int(np.searchsorted(offsets - offsets[0], _SAMPLE_VALUES, side="right")) - 1, 1)
    return Block(0, place, 0, rows, int(offsets[rows] - offsets[0]), 0)


def _seconds(plan: Plan, block: Block) -> float:
    """How long the passes take for the rows of one block."""
    with _build_dir(plan) as build:
        layout = Layout(build, plan.config, block.values, (1,) * len(SPLITS))
        started = time.monotonic()
        record = tokenize_to_run(layout, block, plan.sources[block.source], None)
        equals = find_duplicates(layout, 0, 1, [HashFile(hash_file(build, block), block.source)],
                                 [source.name for source in plan.sources])
        value_type = expression_dtype(integer=record["integer"], largest=record["largest"]).name
        left_out = [equals] if plan.config.cells.remove_duplicates else []
        for task in shard_tasks(plan.sources, [block], [record], left_out):
            merge_to_shard(layout, task, value_type)
        return time.monotonic() - started


@contextmanager
def _build_dir(plan: Plan) -> Iterator[BuildDir]:
    with tempfile.TemporaryDirectory(prefix="scgpt-plan-") as folder:
        build = BuildDir(Path(folder), plan.sha256)
        for path in (build.path / "records", build.runs, *(build.shards(split) for split in SPLITS)):
            path.mkdir(parents=True)
        yield build
