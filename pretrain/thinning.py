"""Which cells an epoch takes where shallow ones are drawn less: exact counts, not drawn, any place computed alone.

A cell of n expressed genes has weight w = clip(round(LEVELS x n / full_genes), 1, LEVELS). Epoch e takes it where
w x (e + phase) mod LEVELS < w, with a phase drawn once for each cell. Multiples of w modulo LEVELS visit each multiple
of gcd(w, LEVELS) equally often, so any LEVELS epochs in a row take the cell exactly w times, as evenly spaced as whole
numbers allow (Bresenham's line; the phases keep cells of one weight from coming all at once), and no cell is lost.

Which cell is the r-th that an epoch takes follows from one byte a cell and, for each of the LEVELS kinds of epochs, how
many it takes before every CHUNK-th cell: 1.5 bytes a cell in all. A list of the taken cells would be 8 bytes a cell,
made anew each epoch; cells in classes of equal weight, each dealt out like a corpus of a mixture, would lose the
neighbourhood that `data.order=blocks` reads by.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from scgpt.rng import PURPOSE_DEPTH, Word, bits, stream

LEVELS = 32     # weights are multiples of 1 / LEVELS; epochs e and e + LEVELS take the same cells
CHUNK = 512     # cells between two counts
_READ_CELLS = 1 << 20   # cells whose lengths are looked up at once


@dataclass(frozen=True)
class Thinning:
    """The cells that each of LEVELS kinds of epochs takes; epoch e is of kind e modulo LEVELS."""

    weights: NDArray[np.uint8]   # (cells,) 1 .. LEVELS: epochs of LEVELS that take the cell
    before: NDArray[np.int64]    # (LEVELS, chunks + 1) cells that such an epoch takes before each chunk, and in all
    key: np.uint64               # of the phases

    @classmethod
    def of(cls, n_cells: int, lengths_of: Callable[[NDArray[np.int64]], NDArray[np.int64]], *, full_genes: int,
           seed: Word) -> "Thinning":
        """Weigh `n_cells` cells by their expressed genes, which `lengths_of` tells of the cells with given places.

        Args:
            n_cells: cells.
            lengths_of: places, (some,), to expressed genes, (some,).
            full_genes: a cell with as many is taken by every epoch.
            seed: of the phases.
        """
        weights = np.empty(n_cells, np.uint8)
        for first in range(0, n_cells, _READ_CELLS):
            lengths = lengths_of(np.arange(first, min(first + _READ_CELLS, n_cells)))
            weights[first:first + _READ_CELLS] = np.clip((2 * LEVELS * lengths + full_genes) // (2 * full_genes),
                                                         1, LEVELS)
        key = np.uint64(stream(seed, 0, 0, PURPOSE_DEPTH))
        return cls(weights, _count(weights, key), key)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(LEVELS,) cells that an epoch of each kind takes."""
        return self.before[:, -1]

    def select(self, ranks: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The cells that come at `ranks` among those that an epoch takes, in stored order, (ranks,)."""
        level = epoch % LEVELS
        return _select(ranks, level, self.weights, self.before[level], self.key)


@njit(cache=True, nogil=True, inline="always")
def _takes(weight: int, phase: int, level: int) -> bool:
    return weight * (level + phase) % LEVELS < weight


@njit(cache=True, nogil=True)
def _count(weights: NDArray[np.uint8], key: Word) -> NDArray[np.int64]:
    """`Thinning.before`."""
    n_chunks = (len(weights) + CHUNK - 1) // CHUNK
    before = np.zeros((LEVELS, n_chunks + 1), np.int64)
    for cell in range(len(weights)):
        weight, phase, chunk = int(weights[cell]), int(bits(key, cell) % np.uint64(LEVELS)), cell // CHUNK
        for level in range(LEVELS):
            before[level, chunk + 1] += _takes(weight, phase, level)
    for level in range(LEVELS):
        for chunk in range(n_chunks):
            before[level, chunk + 1] += before[level, chunk]
    return before


@njit(cache=True, nogil=True)
def _select(ranks: NDArray[np.int64], level: int, weights: NDArray[np.uint8], before: NDArray[np.int64],
            key: Word) -> NDArray[np.int64]:
    cells = np.empty_like(ranks)
    for i in range(len(ranks)):
        chunk = np.searchsorted(before, ranks[i], side="right") - 1
        left = ranks[i] - before[chunk]   # taken cells of the chunk that come before
        cell = chunk * CHUNK
        while True:
            taken = _takes(int(weights[cell]), int(bits(key, cell) % np.uint64(LEVELS)), level)
            if taken and left == 0:
                break
            left -= taken
            cell += 1
        cells[i] = cell
    return cells
