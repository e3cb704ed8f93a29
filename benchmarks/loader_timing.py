"""One side of the loader benchmark within a process of its own: batches as fast as they come, for some seconds.

NumPy and the standard library alone: peers run in interpreters that hold nothing of ours.
"""
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """What a side hands over."""

    n_cells: int
    genes: np.ndarray                  # token ids, of any shape: joined end to end, or in padded rows
    values: np.ndarray | None = None   # stored values of the genes; None: something else was made of them


Epochs = Callable[[int], Iterator[Batch]]   # epoch -> its batches


@dataclass(frozen=True, slots=True)
class Timing:
    """What one run of one side took."""

    cells: int
    tokens: int
    seconds: float
    cpu_s: float        # of the process, its threads and its children
    read_bytes: int     # from storage, not from the page cache


@dataclass(frozen=True, slots=True)
class Seen:
    """Sums over all cells of one epoch, whatever their order: equal sums, equal cells."""

    cells: int
    genes: int          # values that were handed over
    gene_ids: int       # sum of ids
    counts: int | None  # sum of the stored values; None where they are binned


def timed(epochs: Epochs, *, seconds: float) -> dict[str, object]:
    """Take batches for `seconds`, epoch after epoch, as JSON's values; half as long before, untimed.

    So compiling, opening, first faults and what a loader looks ahead at its start are not counted.
    """
    batches = _endless(epochs)
    begun = time.perf_counter()
    for number, _ in enumerate(batches):
        if number and time.perf_counter() - begun >= seconds / 2:
            break
    n_cells = n_tokens = 0
    cpu, read = _cpu_s(), _read_bytes()
    start = time.perf_counter()
    while True:
        batch = next(batches)
        n_cells += batch.n_cells
        n_tokens += batch.genes.size
        now = time.perf_counter() - start
        if now >= seconds:
            break
    return asdict(Timing(n_cells, n_tokens, now, _cpu_s() - cpu, _read_bytes() - read))


def seen(epochs: Epochs, *, special: Sequence[int] = ()) -> dict[str, object]:
    """What one epoch holds, as JSON's values; `special`: ids that are no genes."""
    n_cells = n_genes = gene_ids = counts = 0
    whole = True
    for batch in epochs(0):
        is_gene = ~np.isin(batch.genes, list(special))
        n_cells, n_genes = n_cells + batch.n_cells, n_genes + int(is_gene.sum())
        gene_ids += int(batch.genes[is_gene].sum(dtype=np.int64))
        if batch.values is None:
            whole = False
        else:
            counts += int(batch.values[is_gene].sum(dtype=np.float64))
    return asdict(Seen(n_cells, n_genes, gene_ids, counts if whole else None))


def _endless(epochs: Epochs) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from epochs(epoch)
        epoch += 1


def _cpu_s() -> float:
    """CPU seconds of this process, its threads, and its children that live; those that ended count once they did."""
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system + sum(map(_cpu_of, _children()))


def _children() -> list[int]:
    """Processes below this one."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            stat = _stat(int(folder.name))
            if stat:
                parents[int(folder.name)] = int(stat[1])
    found, queue = [], [os.getpid()]
    while queue:
        parent = queue.pop()
        below = [process for process, its in parents.items() if its == parent]
        found += below
        queue += below
    return found


def _cpu_of(process: int) -> float:
    stat = _stat(process)
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK") if stat else 0.0


def _stat(process: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; none where the process has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _read_bytes() -> int:
    """Bytes that this process had read from storage, mapped files included; 0 where the kernel does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)
