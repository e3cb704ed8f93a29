"""The passes of a build: a task a row block, then a task a shard; whoever runs the tasks, the records are the same.

What an earlier build of the same plan has finished is found by its records, checked, and not done again.
"""
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_pipeline.build_dir import BuildDir, Record
from data_pipeline.cells import SPLITS
from data_pipeline.plan import Plan
from data_pipeline.progress import Progress
from data_pipeline.stores import store_pieces, write_store_piece
from data_pipeline.tasks import (
    Layout,
    block_task,
    cut_folder,
    cut_source,
    cut_task,
    hash_source,
    merge_to_shard,
    shard_task,
    shard_tasks,
    source_task,
    tokenize_to_run,
)
from scgpt.data.schema import expression_dtype, gene_dtype


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


def carry_out(directory: BuildDir, plan: Plan, workers: Workers, progress: Progress, seconds: dict[str, float],
             ) -> tuple[list[str], list[Record], dict[str, list[Record]], dict[str, list[Record]]]:
    """All passes: (sha256 of each source, result of each block, and of each split those of its shards and store)."""
    layout = Layout(directory, plan.config, plan.n_values, tuple(plan.splits[name].n_shards for name in SPLITS))
    with timed(seconds, "tokenise"):
        shared = [workers.share(source) for source in plan.sources]
        cut = _sources_to_cut(plan)
        if cut:
            workers.run("cut", layout, [Job(cut_source, cut_task(number), 1, (number, shared[number], firsts))
                                        for number, firsts in cut.items()], "files", progress)
        jobs = [Job(hash_source, source_task(number), 0, (number, source)) for number, source in enumerate(shared)]
        jobs += [Job(tokenize_to_run, block_task(block), block.last - block.first, (
            block, shared[block.source], cut_folder(directory, block.source) if block.source in cut else None))
                 for block in plan.blocks]
        done = workers.run("tokenise", layout, jobs, "cells", progress)
        hashed, blocks = done[:len(shared)], done[len(shared):]
    tasks = shard_tasks(plan.sources, plan.blocks, blocks)
    value_type = expression_dtype(integer=all(block["integer"] for block in blocks),
                                  largest=max(block["largest"] for block in blocks)).name
    with timed(seconds, "merge"):
        jobs = [Job(merge_to_shard, shard_task(task), 1, (task, value_type)) for task in tasks]
        merged = workers.run("merge", layout, jobs, "shards", progress)
    shards: dict[str, list[Record]] = {name: [] for name in SPLITS}
    for task, record in zip(tasks, merged, strict=True):
        shards[task.split].append(record)
    shards = {name: found for name, found in shards.items() if found}
    stores: dict[str, list[Record]] = {}
    if plan.config.shards.form == "zarr":
        with timed(seconds, "store"):
            stores = _write_stores(layout, plan, shards, value_type, workers, progress)
    return [record["sha256"] for record in hashed], blocks, shards, stores


def _write_stores(layout: Layout, plan: Plan, shards: Mapping[str, Sequence[Record]], value_type: str, workers: Workers,
                  progress: Progress) -> dict[str, list[Record]]:
    """The last pass of the Zarr form: the results of the files of each split's store."""
    pieces = [piece for split, records in shards.items() for piece in store_pieces(
        split, records, plan.config.shards, gene_type=gene_dtype(len(plan.vocab)),
        expression_type=np.dtype(value_type))]
    done = workers.run("store", layout, [Job(write_store_piece, piece.task, 1, (piece,)) for piece in pieces],
                       "files", progress)
    stores: dict[str, list[Record]] = {split: [] for split in shards}
    for piece, record in zip(pieces, done, strict=True):
        stores[piece.split].append(record)
    return stores


def _sources_to_cut(plan: Plan) -> dict[int, list[int]]:
    """place of a source -> first rows of its blocks, where it is stored by columns and has several."""
    firsts: dict[int, list[int]] = {}
    for block in plan.blocks:
        if plan.sources[block.source].by_columns:
            firsts.setdefault(block.source, []).append(block.first)
    return {source: rows for source, rows in firsts.items() if len(rows) > 1}


def find_or_do(function: Callable[..., Record], layout: Layout, task: str, *arguments: object) -> Record:
    """In a worker: the record of a finished task whose files are whole, else that of doing it."""
    record = layout.build.read_record(task)
    return function(layout, *arguments) if record is None else record


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long the block took as `seconds[stage]`."""
    started = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - started
