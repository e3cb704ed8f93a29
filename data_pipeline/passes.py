"""The passes of a build: a task a row block, a task a part of all hashes, a task a shard.

Whoever runs the tasks, the records are the same. What an earlier build of the same plan has finished is found by its
records, checked, and not done again.
"""
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from data_pipeline.build_dir import BuildDir, Record
from data_pipeline.cells import SPLITS
from data_pipeline.commit import Results
from data_pipeline.duplicates import HashFile, n_parts
from data_pipeline.plan import Block, Plan
from data_pipeline.progress import Progress
from data_pipeline.quarantine import failure, note_failures
from data_pipeline.stores import store_pieces, write_store_piece
from data_pipeline.tasks import (
    Layout,
    block_task,
    cut_folder,
    cut_source,
    cut_task,
    duplicates_task,
    find_duplicates,
    hash_file,
    hash_source,
    merge_to_shard,
    shard_task,
    shard_tasks,
    source_task,
    tokenize_to_run,
)
from data_pipeline.workers import Job, Workers
from scgpt.data.schema import expression_dtype, gene_dtype
from scgpt.errors import SourceError


def carry_out(directory: BuildDir, plan: Plan, workers: Workers, progress: Progress, seconds: dict[str, float],
              ) -> Results:
    """All passes: tokenise, find duplicates, merge.

    Raises SourceError where a source cannot be read (with `on_error: skip`: where none can).
    """
    layout = Layout(directory, plan.config, plan.n_values, tuple(plan.splits[name].n_shards for name in SPLITS))
    with timed(seconds, "tokenise"):
        identities, blocks, records, failed = _tokenise(layout, plan, workers, progress)
    if not blocks:
        raise next(iter(failed.values()))
    names = [source.name for source in plan.sources]
    with timed(seconds, "duplicates"):
        found = [HashFile(hash_file(directory, block), block.source) for block in blocks]
        parts = n_parts(sum(record["cells"] for record in records))
        shared = workers.share(found)
        equals = workers.run("duplicates", layout, [
            Job(find_duplicates, duplicates_task(part), 1, (part, parts, shared, names)) for part in range(parts)],
            "parts", progress)
    value_type = expression_dtype(integer=all(record["integer"] for record in records),
                                  largest=max(record["largest"] for record in records)).name
    tasks = shard_tasks(plan.sources, blocks, records, equals if plan.config.cells.remove_duplicates else [])
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
    return Results(identities, blocks, records, equals, shards, stores, failed)


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


def _tokenise(layout: Layout, plan: Plan, workers: Workers, progress: Progress,
              ) -> tuple[list[Record], list[Block], list[Record], dict[int, SourceError]]:
    """The first pass: what each source is known by, the blocks of those that were read, their records, the others."""
    shared = [workers.share(source) for source in plan.sources]
    cut, failed = _sources_to_cut(plan), dict[int, SourceError]()
    if cut:
        done = workers.run("cut", layout, [Job(cut_source, cut_task(number), 1, (number, shared[number], firsts))
                                           for number, firsts in cut.items()], "files", progress)
        note_failures(failed, zip(cut, done, strict=True))
    blocks = [block for block in plan.blocks if block.source not in failed]
    jobs = [Job(hash_source, source_task(number), 0, (number, source)) for number, source in enumerate(shared)]
    jobs += [Job(tokenize_to_run, block_task(block), block.last - block.first, (
        block, shared[block.source], cut_folder(layout.build, block.source) if block.source in cut else None))
             for block in blocks]
    done = workers.run("tokenise", layout, jobs, "cells", progress)
    hashed, records = done[:len(shared)], done[len(shared):]
    note_failures(failed, ((block.source, record) for block, record in zip(blocks, records, strict=True)))
    note_failures(failed, enumerate(hashed))
    read = [(block, record) for block, record in zip(blocks, records, strict=True) if block.source not in failed]
    return ([{} if failure(record) else record for record in hashed], [block for block, _ in read],
            [record for _, record in read], failed)


def _sources_to_cut(plan: Plan) -> dict[int, list[int]]:
    """place of a source -> first rows of its blocks, where it is stored by columns and has several."""
    firsts: dict[int, list[int]] = {}
    for block in plan.blocks:
        if plan.sources[block.source].by_columns:
            firsts.setdefault(block.source, []).append(block.first)
    return {source: rows for source, rows in firsts.items() if len(rows) > 1}


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long the block took as `seconds[stage]`."""
    started = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - started
