"""Decoded pieces of a corpus, kept by number until others push them out: bounded in bytes, shared by threads."""
from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class RecentlyUsed(Generic[T]):
    """The pieces used last, up to `max_bytes` of them (one larger piece is kept all the same)."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.n_bytes = max_bytes, 0
        self._held: OrderedDict[int, tuple[T, int]] = OrderedDict()
        self._lock = Lock()

    def __contains__(self, number: int) -> bool:
        return number in self._held

    def find(self, numbers: Iterable[int]) -> dict[int, T]:
        """Those of the pieces that are here; they count as used now."""
        with self._lock:
            found = {number: self._held[number][0] for number in numbers if number in self._held}
            for number in found:
                self._held.move_to_end(number)
            return found

    def keep(self, number: int, piece: T, n_bytes: int) -> None:
        """Hold a piece; the longest unused ones go."""
        with self._lock:
            if number in self._held:
                return
            self._held[number] = piece, n_bytes
            self.n_bytes += n_bytes
            while self.n_bytes > self.max_bytes and len(self._held) > 1:
                self.n_bytes -= self._held.popitem(last=False)[1][1]
