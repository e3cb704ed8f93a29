"""The tokens of a split, opened: whatever the form, the compression and the place, cells are asked for in one way."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scgpt.data.schema import CellViews, RaggedBatch, offsets_of

WINDOW_VALUES = 4 << 20   # values that are read at once by what walks through all cells


class Shards(Protocol):
    """Cells of a split by their place, 0 to cells - 1; the caller keeps to that range."""

    def lengths(self, cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """Values of the given cells, (cells,), without reading them."""

    def cell_ids(self, cells: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Ids of the given cells, (cells,)."""

    def fetch(self, cells: NDArray[np.int64]) -> RaggedBatch:
        """Copy the given cells out, in the given order, with `cell_id`."""

    def views(self, cells: NDArray[np.int64]) -> CellViews:
        """The given cells, in the given order; nothing is copied where they are mapped into memory."""


@dataclass(frozen=True, slots=True)
class CellRange:
    """Some neighbouring cells of other shards, as if they were all."""

    shards: Shards
    first: int

    def lengths(self, cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """See Shards."""
        return self.shards.lengths(cells + self.first)

    def cell_ids(self, cells: NDArray[np.int64]) -> NDArray[np.uint64]:
        """See Shards."""
        return self.shards.cell_ids(cells + self.first)

    def fetch(self, cells: NDArray[np.int64]) -> RaggedBatch:
        """See Shards."""
        return self.shards.fetch(cells + self.first)

    def views(self, cells: NDArray[np.int64]) -> CellViews:
        """See Shards."""
        return self.shards.views(cells + self.first)


def windows(shards: Shards, first: int, last: int, *, max_values: int = WINDOW_VALUES) -> Iterator[tuple[int, int]]:
    """Cut cells [first, last) into ranges of at most `max_values` values; a longer cell is alone."""
    step = 1 << 20   # cells whose lengths are looked at together
    for start in range(first, last, step):
        offsets = offsets_of(shards.lengths(np.arange(start, min(start + step, last))))
        begin = 0
        while begin < len(offsets) - 1:
            end = max(int(np.searchsorted(offsets, offsets[begin] + max_values, side="right")) - 1, begin + 1)
            yield start + begin, start + end
            begin = end


def part_bounds(cells: Sequence[int]) -> list[tuple[int, int]]:
    """First and last + 1 cell of each part of a split."""
    bounds = offsets_of(np.array(cells, np.int64)).tolist()
    return list(pairwise(bounds))
