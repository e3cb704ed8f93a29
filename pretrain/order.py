"""In which order cells come up: a permutation of all cells for each epoch, computed by index, never stored.

Two permutations: `permute` of all cells, for storage with true random access; `permute_in_blocks` of blocks of
neighbours and then within windows of blocks, for cold and remote storage. A mixture deals places out to corpora.

The permutation is a Feistel network on the grid a x b, a = ceil(sqrt(n)), b = ceil(n / a) (Black, Rogaway: Ciphers with
arbitrary finite domains, CT-RSA 2002, with addition modulo a and b): each round shifts one coordinate by a keyed hash
of the other, which can be undone, so it permutes the grid; an index that lands on the grid's few places past n - 1 is
sent through again. O(1) memory, some 0.2 us an index at any n up to 2**62. A stored permutation of 1e9 cells would take
8 GB on each rank and seconds an epoch.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from scgpt.errors import DataError
from scgpt.rng import PURPOSE_MIXTURE, PURPOSE_ORDER, Word, bits, stream

PERIOD = 1 << 16   # places after which a mixture has dealt out exactly its shares
ROUNDS = 12   # chi-square over all 24 orders of 4 cells is flat from 6 on (tests); twice that for peace


@dataclass(frozen=True, slots=True)
class Blocks:
    """Neighbours that are read together, and how many such blocks are mixed with each other."""

    cells: int     # of a block
    window: int    # blocks


def permuted(places: NDArray[np.int64], epochs: NDArray[np.int64], n_cells: int, seed: Word,
             blocks: Blocks | None) -> NDArray[np.int64]:
    """`permute`, or `permute_in_blocks` where there are blocks."""
    if blocks is None:
        return permute(places, epochs, n_cells, seed)
    return permute_in_blocks(places, epochs, n_cells, seed, blocks.cells, blocks.window)


def shares(weights: Sequence[float]) -> NDArray[np.int64]:
    """Places of each corpus in a period of a mixture, (corpora,), PERIOD in all: the largest remainders get the rest.

    Raises DataError for a weight that is not above 0, or too small to get a place.
    """
    given = np.asarray(weights, np.float64)
    with np.errstate(over="ignore"):
        total = given.sum()
    if not (np.isfinite(total) and (given > 0).all()):
        raise DataError(f"the weights {list(weights)} of a mixture are not all above 0 and finite, or their sum is not",
                        fix="give positive weights of usual size")
    wanted = given / total * PERIOD
    counts: NDArray[np.int64] = np.floor(wanted).astype(np.int64)
    counts[np.argsort(counts - wanted, kind="stable")[:PERIOD - counts.sum()]] += 1
    if not counts.all():
        raise DataError(f"corpus {int(counts.argmin())} (from 0) of a mixture has less than 1/{PERIOD} of the weight",
                        fix="raise its weight, or leave it out")
    return counts


def deal(places: NDArray[np.int64], counts: NDArray[np.int64],
         seed: Word) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The corpus that each place of a mixture falls to, and which of that corpus's own places it is, (places,) each.

    Every PERIOD places hold exactly `counts` places of the corpora, in a drawn order.
    """
    periods, within = np.divmod(places, PERIOD)
    slots = _slots(within, periods, seed)
    ends = np.cumsum(counts)
    corpora = np.searchsorted(ends, slots, side="right")
    return corpora, periods * counts[corpora] + slots - (ends - counts)[corpora]


def places_of(n_places: int, counts: NDArray[np.int64], seed: Word) -> NDArray[np.int64]:
    """How many of the first `n_places` places of a mixture fall to each corpus, (corpora,)."""
    whole, rest = divmod(n_places, PERIOD)
    slots = _slots(np.arange(rest), np.full(rest, whole), seed)
    begun = np.bincount(np.searchsorted(np.cumsum(counts), slots, side="right"), minlength=len(counts))
    return whole * counts + begun


def _slots(places: NDArray[np.int64], periods: NDArray[np.int64], seed: Word) -> NDArray[np.int64]:
    """The permutation of each period of a mixture."""
    return permute(places, periods, PERIOD, np.uint64(stream(seed, 0, 0, PURPOSE_MIXTURE)))


def in_order(step: int, *, n_cells: int, global_batch_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cells of batch `step` of one pass in stored order (evaluation): the last one is shorter, then they are empty."""
    indices = np.arange(min(step * global_batch_size, n_cells), min((step + 1) * global_batch_size, n_cells))
    return indices, np.zeros_like(indices)


@njit(cache=True, nogil=True)
def permute(places: NDArray[np.int64], epochs: NDArray[np.int64], n_cells: int, seed: Word) -> NDArray[np.int64]:
    """Where the permutation of each epoch sends each place, (places,): a bijection of [0, n_cells) for one epoch."""
    keys = np.empty(ROUNDS, np.uint64)
    keys_epoch = -1
    permuted = np.empty_like(places)
    for i in range(len(places)):
        if epochs[i] != keys_epoch:
            keys_epoch = epochs[i]
            _fill(keys, stream(seed, keys_epoch, 0, PURPOSE_ORDER))
        permuted[i] = _image(places[i], n_cells, keys)
    return permuted


@njit(cache=True, nogil=True)
def permute_in_blocks(places: NDArray[np.int64], epochs: NDArray[np.int64], n_cells: int, seed: Word,
                      block_cells: int, window_blocks: int) -> NDArray[np.int64]:
    """As `permute`, but `window_blocks` x `block_cells` places in a row come from that many blocks of neighbours.

    An epoch begins its blocks at a cell of its own, so that the last and shorter block is never of the same cells.
    Whoever keeps the blocks of one window in memory reads every block once an epoch.
    """
    n_blocks = (n_cells + block_cells - 1) // block_cells
    whole_blocks = n_cells // block_cells   # the shorter one stays the last of the epoch
    window_cells = block_cells * window_blocks
    block_keys, cell_keys = np.empty(ROUNDS, np.uint64), np.empty(ROUNDS, np.uint64)
    keys_epoch, keys_window, start = -1, -1, np.int64(0)
    permuted = np.empty_like(places)
    for i in range(len(places)):
        window = places[i] // window_cells
        if epochs[i] != keys_epoch:
            keys_epoch, keys_window = epochs[i], -1
            key = stream(seed, keys_epoch, 0, PURPOSE_ORDER)
            _fill(block_keys, key)
            start = np.int64(bits(key, ROUNDS) % np.uint64(n_cells))
        if window != keys_window:
            keys_window = window
            _fill(cell_keys, stream(seed, keys_epoch, 1 + window, PURPOSE_ORDER))
        first = window * window_cells
        within = _image(places[i] - first, min(window_cells, n_cells - first), cell_keys)
        block = window * window_blocks + within // block_cells
        block = _image(block, whole_blocks, block_keys) if block < whole_blocks else n_blocks - 1
        permuted[i] = (start + block * block_cells + within % block_cells) % n_cells
    return permuted


@njit(cache=True, nogil=True)
def _fill(keys: NDArray[np.uint64], key: Word) -> None:
    for r in range(len(keys)):
        keys[r] = bits(key, r)


@njit(cache=True, nogil=True)
def _image(place: int, n_places: int, keys: NDArray[np.uint64]) -> np.int64:
    """Where the permutation of [0, n_places) that `keys` name sends a place."""
    side_a = np.uint64(np.ceil(np.sqrt(n_places)))
    side_b = (np.uint64(n_places) + side_a - np.uint64(1)) // side_a
    index = np.uint64(place)
    while True:
        index = _encrypt(index, keys, side_a, side_b)
        if index < np.uint64(n_places):
            return np.int64(index)


@njit(cache=True, nogil=True)
def _encrypt(index: Word, keys: NDArray[np.uint64], side_a: Word, side_b: Word) -> np.uint64:
    """One pass over the grid: index = a * side_b + b."""
    a, b = np.uint64(index // side_b), np.uint64(index % side_b)
    for r in range(0, len(keys), 2):
        a += bits(keys[r], b) % side_a
        a -= side_a if a >= side_a else np.uint64(0)   # modulo side_a, without a second division
        b += bits(keys[r + 1], a) % side_b
        b -= side_b if b >= side_b else np.uint64(0)
    return np.uint64(a * side_b + b)
