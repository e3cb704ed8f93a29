"""Carry out a plan with Ray: a task a row block, then a task a shard, then the commit.

Tasks hand back small records; cells travel through files only. A task may run twice, even at once: names of unfinished
files carry the attempt, equal work gives equal bytes, and the record follows the files. What an earlier build of the
same plan has finished is found by its records, checked, and not done again.
"""
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.build_dir import BuildDir, Record, claim, finished
from data_pipeline.cells import SPLITS
from data_pipeline.commit import commit
from data_pipeline.config import CorpusConfig
from data_pipeline.plan import Plan, make_plan
from data_pipeline.progress import Progress
from data_pipeline.ray_folder import ray_folder
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
from scgpt.data import Manifest, verify_corpus
from scgpt.data.schema import expression_dtype
from scgpt.errors import DataError, ScgptError

_OBJECT_STORE_BYTES = 80 << 20   # records are small; the least that Ray takes is 75 MiB
_RETRIES = 5                     # of a task whose worker was lost; a task that raises is not tried again
_IN_FLIGHT = 4                   # tasks handed to Ray for each CPU


@dataclass(frozen=True, slots=True)
class BuildResult:
    """A finished corpus, and how long the stages took: plan, tokenise, merge, commit."""

    manifest: Manifest
    seconds: Mapping[str, float]   # empty where the corpus was complete already


def build(config: CorpusConfig, out: Path, *, ray_address: str | None = None, fresh: bool = False,
          progress: Progress | None = None) -> BuildResult:
    """Make the corpus of `config` in the directory `out`, or finish it; a complete one is checked and left alone.

    Args:
        config: what goes into the corpus.
        out: its directory; every node of the cluster must see it.
        ray_address: a Ray cluster to join; None: RAY_ADDRESS, else a local one that ends with the build.
        fresh: replace what another build has left in `out`.
        progress: where to tell how far it is.

    Raises ScgptError: see make_plan and claim; SourceError when a source turns out to be damaged.
    """
    out = out.absolute()   # workers have working directories of their own
    progress = progress or Progress()
    seconds: dict[str, float] = {}
    with _timed(seconds, "plan"):
        plan = make_plan(config)
    with claim(out, plan, fresh=fresh) as directory:
        if finished(directory):
            return BuildResult(_verified(out), {})
        with _ray(ray_address or os.environ.get("RAY_ADDRESS"), directory) as workers, progress:
            hashes, blocks, shards = carry_out(directory, plan, workers, progress, seconds)
        with _timed(seconds, "commit"), _disk_errors(out):
            manifest = commit(directory, plan, hashes=hashes, blocks=blocks, shards=shards,
                              timing={"seconds": {name: round(value, 3) for name, value in seconds.items()}})
    return BuildResult(manifest, seconds)


def _verified(out: Path) -> Manifest:
    try:
        return verify_corpus(out)
    except DataError as error:
        error.fix = "restore the file, or build the corpus again with --fresh"
        raise


def carry_out(directory: BuildDir, plan: Plan, workers: "Workers", progress: Progress, seconds: dict[str, float],
             ) -> tuple[list[str], list[Record], dict[str, list[Record]]]:
    """Both passes: (sha256 of each source, result of each block, results of the shards of each split)."""
    layout = Layout(directory, plan.config, plan.n_values, tuple(plan.splits[name].n_shards for name in SPLITS))
    with _timed(seconds, "tokenise"):
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
    with _timed(seconds, "merge"):
        jobs = [Job(merge_to_shard, shard_task(task), 1, (task, value_type)) for task in tasks]
        merged = workers.run("merge", layout, jobs, "shards", progress)
    shards: dict[str, list[Record]] = {name: [] for name in SPLITS}
    for task, record in zip(tasks, merged, strict=True):
        shards[task.split].append(record)
    return [record["sha256"] for record in hashed], blocks, {name: found for name, found in shards.items() if found}


def _sources_to_cut(plan: Plan) -> dict[int, list[int]]:
    """place of a source -> first rows of its blocks, where it is stored by columns and has several."""
    firsts: dict[int, list[int]] = {}
    for block in plan.blocks:
        if plan.sources[block.source].by_columns:
            firsts.setdefault(block.source, []).append(block.first)
    return {source: rows for source, rows in firsts.items() if len(rows) > 1}


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


class RayWorkers:
    """The tasks of a pass on Ray; a bounded number is with Ray at once."""

    def __init__(self, ray: Any, out: Path) -> None:
        self._ray, self._out = ray, out
        self._pending: dict[Any, int] = {}   # reference of a task -> place of its job
        self._in_flight = _IN_FLIGHT * max(int(ray.cluster_resources().get("CPU", 1)), 1)

    def share(self, value: object) -> Any:
        """See Workers."""
        return self._ray.put(value)

    def run(self, stage: str, layout: Layout, jobs: Sequence[Job], unit: str, progress: Progress) -> list[Record]:
        """See Workers. Raises what a task raised; the others go on, see wait."""
        remote = self._ray.remote(num_cpus=1, max_retries=_RETRIES, scheduling_strategy="SPREAD")(find_or_do)
        shared = self.share(layout)
        progress.start(stage, sum(job.units for job in jobs), unit)
        results: dict[int, Record] = {}
        waiting = iter(enumerate(jobs))
        while len(results) < len(jobs):
            for number, job in _take(waiting, self._in_flight - len(self._pending)):
                self._pending[remote.remote(job.function, shared, job.task, *job.arguments)] = number
            for reference in self._ray.wait(list(self._pending), num_returns=1)[0]:
                number = self._pending.pop(reference)
                results[number] = self._result(reference)
                progress.advance(jobs[number].units)
        progress.finish()
        return [results[number] for number in range(len(jobs))]

    def wait(self) -> None:
        """Until no task of ours is at work: they are few and short.

        Never cancelled: Ray 2.60 ends the driver when a task is cancelled whose result is on its way.
        """
        if self._pending:
            self._ray.wait(list(self._pending), num_returns=len(self._pending))

    def _result(self, reference: Any) -> Record:
        try:
            result: Record = self._ray.get(reference)
            return result
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ScgptError):
                raise error.cause from None
            with _disk_errors(self._out):
                raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise DataError(f"a Ray worker was lost for good: {str(error).splitlines()[0]}",
                            fix="run the same command again: what is finished is kept; if memory was short, "
                                "lower shards.max_bytes or start fewer workers") from error


def find_or_do(function: Callable[..., Record], layout: Layout, task: str, *arguments: object) -> Record:
    """In a worker: the record of a finished task whose files are whole, else that of doing it."""
    record = layout.build.read_record(task)
    return function(layout, *arguments) if record is None else record


def _take(items: Iterator[tuple[int, Job]], number: int) -> Iterator[tuple[int, Job]]:
    for _, item in zip(range(number), items, strict=False):
        yield item


@contextmanager
def _ray(address: str | None, directory: BuildDir) -> Iterator[RayWorkers]:
    """Join the Ray cluster at `address`, or start one on this machine that ends, and leaves nothing, with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")   # only silences a warning
    if address is None:
        # A token of our own: Ray would otherwise make one in the user's home. Read once a process, so set it once.
        if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    elif {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ) or (Path.home() / ".ray/auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")   # else a driver that joins sends no token
    import ray

    if ray.is_initialized():   # inside a program that has its own
        workers = RayWorkers(ray, directory.out)
        try:
            yield workers
        finally:
            workers.wait()   # the directory is given free after this
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        ray.init(address=address, **options)
        try:
            _probe(ray, directory)
            yield RayWorkers(ray, directory.out)
        finally:
            ray.shutdown()
        return
    with ray_folder() as folder:
        ray.init(address="local", num_cpus=len(os.sched_getaffinity(0)), num_gpus=0, include_dashboard=False,
                 object_store_memory=_OBJECT_STORE_BYTES, _temp_dir=str(folder), **options)
        try:
            yield RayWorkers(ray, directory.out)
        finally:
            ray.shutdown()


def _probe(ray: Any, directory: BuildDir) -> None:
    """Raise DataError unless every node of a cluster sees the directory."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    look = ray.remote(num_cpus=0)(_sees)
    seen = ray.get([look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
        directory) for node in nodes])
    blind = [node["NodeManagerAddress"] for node, sees in zip(nodes, seen, strict=True) if not sees]
    if blind:
        raise DataError(f"the directory is not visible on {', '.join(blind)}", where=str(directory.out),
                        fix="give an --out on a file system that all nodes share")


def _sees(directory: BuildDir) -> bool:
    return (directory.path / "plan.json").exists()


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"the corpus cannot be written: {error.strerror or error}", where=str(out),
                        fix="free some space or mend the disk, then run the same command again: what is finished "
                            "is kept") from error


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - started
