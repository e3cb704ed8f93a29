"""Results of a function for 0, 1, 2, ... in order, computed ahead by threads; the time spent waiting for them is kept.

Threads and not processes: the batch maths is compiled and releases the GIL, the corpus is mapped into memory, and so
nothing is pickled, copied, shared or left behind. Nothing outlives the process, and little outlives `close`: the items
under way are finished, no further one is begun.
"""
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """Iterator over make(i) for i in `numbers`, at most `ahead` results in memory beside the one handed out.

    Args:
        make: called once for each number, by any thread; an exception it raises is raised in its place in the order.
        numbers: what to call it with, finite or endless.
        workers: threads; 0 computes each item when it is asked for.
        ahead: items begun before they are asked for; None: two a worker.

    Use as a context manager, or `close` it when leaving early.
    """

    def __init__(self, make: Callable[[int], Item], numbers: Iterator[int], *, workers: int,
                 ahead: int | None = None) -> None:
        self.wait_s = 0.0   # seconds that the consumer has waited for items so far
        self._make, self._numbers = make, numbers
        self._ahead = 2 * workers if ahead is None else ahead
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch") if workers else None
        self._begun: deque[Future[Item]] = deque()

    def __iter__(self) -> "Prefetch[Item]":
        return self

    def __next__(self) -> Item:
        start = time.perf_counter()
        try:
            if self._pool is None:
                return self._make(next(self._numbers))
            self._begin()
            if not self._begun:
                raise StopIteration
            item = self._begun.popleft().result()
            self._begin()
            return item
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_s += time.perf_counter() - start

    def _begin(self) -> None:
        """Keep `ahead` items under way."""
        while self._pool is not None and len(self._begun) < self._ahead:
            try:
                number = next(self._numbers)
            except StopIteration:
                return
            self._begun.append(self._pool.submit(self._make, number))

    def close(self) -> None:
        """Begin nothing more, wait for what is under way, forget it. The iterator is at its end."""
        self._numbers = iter(())
        for future in self._begun:
            future.cancel()
        self._begun.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetch[Item]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()
