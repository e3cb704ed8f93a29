"""Who this process is among the ranks of a run: rank, device, threads, process group, and what the ranks agree on.

A launcher (deepspeed, torchrun, srun with the same variables) sets RANK, WORLD_SIZE and LOCAL_RANK; without one the
process is alone, and needs no port: its group lives in memory, so runs side by side cannot meet.
"""
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch._C._distributed_c10d import HashStore

from scgpt.allocator import keep_freed_memory
from scgpt.errors import EXIT_FAILED, ConfigError, ScgptError, explain

T = TypeVar("T")
_LOCAL_SIZE = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")   # deepspeed, torchrun, Slurm
_PEER_LOST = ("gloo", "nccl", "connection reset", "connection closed", "timed out", "socket")


class RankError(ScgptError):
    """A failure of this rank alone: it tells the user, whichever rank it is."""


class RankZeroError(ScgptError):
    """The failure of rank 0 on another rank: there is nothing left to tell the user."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("rank 0 failed")
        self.exit_code = exit_code


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or hung: torch has no class of its own for it."""
    return any(word in str(error).lower() for word in _PEER_LOST)


def words_of_transport(error: RuntimeError) -> str:
    """What was noticed of a lost peer: the first line, without a place in the transport's source and its advice."""
    line = str(error).strip().splitlines()[0]
    return re.sub(r"^\[[^\]\s]*:\d+\] ", "", line).partition(". This is typically caused by")[0]


@dataclass(frozen=True, slots=True)
class World:
    """One of the ranks of a run."""

    rank: int              # 0 .. world_size - 1
    local_rank: int        # among the ranks of this node
    world_size: int        # ranks of the run
    local_size: int        # ranks of this node
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that writes what only one may write."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        distributed.barrier()

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """The element-wise sum over all ranks, on every rank. Numbers on the CPU travel over gloo: no GPU waits."""
        total = numbers.clone()
        distributed.all_reduce(total)
        return total

    def of_first(self, make: Callable[[], T]) -> T:
        """Rank 0 runs `make`, every rank gets the result; where it raises, the others raise a RankZeroError."""
        told: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_first:
            try:
                told[0] = make()
            except Exception as raised:  # noqa: BLE001 the other ranks wait: they must hear of it
                known = explain(raised)
                error, told[1] = raised, EXIT_FAILED if known is None else known.exit_code
        distributed.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if error is not None:
            raise error
        if told[1] is not None:
            raise RankZeroError(told[1])
        return told[0]  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """The value of each rank, in rank order, on every rank. Small things only: it is pickled."""
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values


def limit_collectives(timeout_s: float) -> None:
    """Let collectives of every group end after `timeout_s`: those that DeepSpeed makes would wait half an hour."""
    for group in list(distributed.distributed_c10d._world.pg_map):
        distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


@contextmanager
def join_world(*, timeout_s: float) -> Iterator[World]:
    """Join the ranks, leave them at the end. Sets the torch threads of a rank to its share of the node's cores.

    A collective that takes longer than `timeout_s` raises: a rank is hung or gone.
    """
    alone = "RANK" not in os.environ
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(next((os.environ[name] for name in _LOCAL_SIZE if name in os.environ), world_size))
    device = _device(local_rank)
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    keep_freed_memory()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(local_rank)}.items():
        os.environ.setdefault(name, value)   # DeepSpeed reads them
    if local_size == world_size and device.type == "cpu":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")   # a host whose own name resolves nowhere trains too
    try:
        _join(device, world_size, timeout_s, alone=alone)
        yield World(int(os.environ["RANK"]), local_rank, world_size, local_size, device)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        if alone:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                os.environ.pop(name, None)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"rank {local_rank} of this node has no GPU: {socket.gethostname()} shows "
                          f"{torch.cuda.device_count()}", fix="start as many ranks as there are GPUs")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join(device: torch.device, world_size: int, timeout_s: float, *, alone: bool) -> None:
    timeout = timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if alone:
        distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        distributed.init_process_group(backend, timeout=timeout, world_size=world_size, rank=int(os.environ["RANK"]))
