"""Which cells make global batch t: a permutation of all cells for each epoch, computed by index, never stored.

Position p = step * global_batch_size + k of a run falls on epoch p // n_cells. Every cell comes up exactly once an
epoch; a batch may straddle two epochs, so none is dropped or repeated to fill one. State is the step alone.

The permutation is a Feistel network on the grid a x b, a = ceil(sqrt(n)), b = ceil(n / a) (Black, Rogaway: Ciphers with
arbitrary finite domains, CT-RSA 2002, with addition modulo a and b): each round shifts one coordinate by a keyed hash
of the other, which can be undone, so it permutes the grid; an index that lands on the grid's few places past n - 1 is
sent through again. O(1) memory, some 0.2 us an index at any n up to 2**62. A stored permutation of 1e9 cells would take
8 GB on each rank and seconds an epoch.
"""
import numpy as np
from numba import njit
from numpy.typing import NDArray

from scgpt.errors import DataError
from scgpt.rng import PURPOSE_ORDER, Word, bits, stream

ROUNDS = 12   # chi-square over all 24 orders of 4 cells is flat from 6 on (tests); twice that for peace


def global_batch(step: int, *, n_cells: int, global_batch_size: int,
                 seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cells of the training's global batch `step` (from 0): their indices and epochs, (global_batch_size,) int64 each.

    Raises DataError when there are no cells.
    """
    if n_cells < 1:
        raise DataError("there are no cells to train on", fix="give a corpus whose training split has cells")
    positions = np.arange(global_batch_size) + step * global_batch_size
    epochs, places = np.divmod(positions, n_cells)
    return permute(places, epochs, n_cells, seed), epochs


def in_order(step: int, *, n_cells: int, global_batch_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cells of batch `step` of one pass in stored order (evaluation): the last one is shorter, then they are empty."""
    indices = np.arange(min(step * global_batch_size, n_cells), min((step + 1) * global_batch_size, n_cells))
    return indices, np.zeros_like(indices)


@njit(cache=True, nogil=True)
def permute(places: NDArray[np.int64], epochs: NDArray[np.int64], n_cells: int, seed: Word) -> NDArray[np.int64]:
    """Where the permutation of each epoch sends each place, (places,): a bijection of [0, n_cells) for one epoch."""
    side_a = np.uint64(np.ceil(np.sqrt(n_cells)))
    side_b = (np.uint64(n_cells) + side_a - np.uint64(1)) // side_a
    keys = np.empty(ROUNDS, np.uint64)
    keys_epoch = -1
    permuted = np.empty_like(places)
    for i in range(len(places)):
        if epochs[i] != keys_epoch:
            keys_epoch = epochs[i]
            key = stream(seed, keys_epoch, 0, PURPOSE_ORDER)
            for r in range(ROUNDS):
                keys[r] = bits(key, r)
        index = np.uint64(places[i])
        while True:
            index = _encrypt(index, keys, side_a, side_b)
            if index < np.uint64(n_cells):
                break
        permuted[i] = index
    return permuted


@njit(cache=True, nogil=True)
def _encrypt(index: Word, keys: NDArray[np.uint64], side_a: Word, side_b: Word) -> np.uint64:
    """One pass over the grid: index = a * side_b + b."""
    a, b = np.uint64(index // side_b), np.uint64(index % side_b)
    for r in range(0, len(keys), 2):
        a = np.uint64((a + bits(keys[r], b) % side_a) % side_a)
        b = np.uint64((b + bits(keys[r + 1], a) % side_b) % side_b)
    return np.uint64(a * side_b + b)
