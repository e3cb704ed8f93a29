"""The tasks of a build on Ray: in a cluster that is there, in the Ray of this program, or in one started for the build.

Tasks hand back small records; cells travel through files only. A task may run twice, even at once: names of unfinished
files carry the attempt, equal work gives equal bytes, and the record follows the files.
"""
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO, cast

from data_pipeline.build_dir import BuildDir, Record
from data_pipeline.progress import Progress
from data_pipeline.ray_folder import ray_folder
from data_pipeline.tasks import Layout
from data_pipeline.workers import Job, disk_errors, find_or_do
from scgpt.counted import counted
from scgpt.errors import ConfigError, DataError, ScgptError
from scgpt.stderr import LastingStderr

_OBJECT_STORE_BYTES = 80 << 20   # records are small; the least that Ray takes is 75 MiB
_CONNECT_S = 10.0                # for the head of a cluster to answer
_RETRIES = 5                     # of a task whose worker was lost; a task that raises is not tried again
_IN_FLIGHT = 4                   # tasks handed to Ray for each CPU


def has_started() -> bool:
    """Whether this program has a Ray of its own, which costs nothing to use."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


class RayWorkers:
    """The tasks of a pass on Ray; a bounded number is with Ray at once."""

    def __init__(self, ray: Any, out: Path) -> None:
        self._ray, self._out = ray, out
        self._pending: dict[Any, int] = {}   # reference of a task -> place of its job
        self._n_cpus = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        self._in_flight = _IN_FLIGHT * self._n_cpus

    def __str__(self) -> str:
        return f"Ray, {counted(self._n_cpus, 'CPU')}"

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
            with disk_errors(self._out):
                raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise DataError(f"a Ray worker was lost for good: {str(error).splitlines()[0]}",
                            fix="run the same command again: what is finished is kept; if memory was short, "
                                "lower shards.max_bytes or start fewer workers") from error


def _take(items: Iterator[tuple[int, Job]], number: int) -> Iterator[tuple[int, Job]]:
    for _, item in zip(range(number), items, strict=False):
        yield item


@contextmanager
def ray_workers(address: str | None, directory: BuildDir) -> Iterator[RayWorkers]:
    """Join the Ray cluster at `address`, or start one on this machine that ends, and leaves nothing, with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")   # only silences a warning
    address = None if address == "local" else address
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
        with redirect_stdout(cast(TextIO, LastingStderr())):   # Ray tells of dead workers there
            _join(ray, address, options)
            try:
                _probe(ray, directory)
                yield RayWorkers(ray, directory.out)
            finally:
                ray.shutdown()
        return
    os.environ.setdefault("RAY_worker_niceness", "0")   # Ray's 15 starves the work itself where others are busy
    with ray_folder() as folder, redirect_stdout(cast(TextIO, LastingStderr())):
        with _same_answer_to_sigterm():
            ray.init(address="local", num_cpus=len(os.sched_getaffinity(0)), num_gpus=0, include_dashboard=False,
                     object_store_memory=_OBJECT_STORE_BYTES, _temp_dir=str(folder), **options)
        try:
            yield RayWorkers(ray, directory.out)
        finally:
            ray.shutdown()


@contextmanager
def _same_answer_to_sigterm() -> Iterator[None]:
    """Keep the program's own, if it has one: Ray's, which `init` puts in its place, exits with a code of failure."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _join(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Connect to a cluster. Raises ConfigError where none answers (Ray itself would go on trying for minutes)."""
    fix = "give --ray-address HOST:PORT as `ray start --head` has it, and RAY_AUTH_TOKEN_PATH if it wants a token"
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    try:
        if colon and port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
        with _same_answer_to_sigterm():
            ray.init(address=address, **options)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ConfigError(f"no Ray cluster can be joined: {cause}", where=address, fix=fix) from error


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
