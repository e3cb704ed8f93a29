"""Random numbers that depend on what they are for, never on who draws them or when.

A stream is named by (seed, epoch, cell_id, purpose); its n-th number is a pure function of the stream's key and n. So a
cell gets the same draws on any rank, worker or resume. The generator is SplitMix64 (Steele, Lea, Flood: Fast splittable
pseudorandom number generators, OOPSLA 2014) read at a counter: key + n times the golden-ratio increment, then the
finaliser of the paper ("mix64variant13"). Philox would do as well at some three times the cost a draw.

All functions are compiled, and meant to be called from compiled loops over cells. From Python they give plain integers:
wrap a key in np.uint64 before handing it back.
"""
import numpy as np
from numba import njit, uint64
from numpy.typing import NDArray

Word = int | np.integer   # 64 bits, read as unsigned

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_TO_UNIT = 1.0 / (1 << 53)

# Purposes: what a draw is for. A number never changes its meaning, and is never reused (2 and 3 have been).
PURPOSE_SAMPLE = np.uint64(1)      # which genes of a long cell stay
PURPOSE_MASK_RATIO = np.uint64(4)  # the mask ratio of a cell, where a list is given
PURPOSE_ORDER = np.uint64(5)       # the permutation of an epoch
PURPOSE_SHUFFLE = np.uint64(6)     # bucket and key of a cell when a corpus is shuffled
PURPOSE_SPLIT = np.uint64(7)       # perception or generation
PURPOSE_HOLD_OUT = np.uint64(8)    # the split of a cell, where cells are held out one by one
PURPOSE_DROPOUT = np.uint64(9)     # seed of a micro-batch's dropout: (seed, step, its number) for epoch and cell
PURPOSE_WEIGHTS = np.uint64(10)    # seed of a model's first weights
PURPOSE_MIXTURE = np.uint64(11)    # which corpus a place of a mixture falls to; seed of the order of each corpus
PURPOSE_DEPTH = np.uint64(12)      # in which epochs a cell of few genes comes up
PURPOSE_DOMAIN = np.uint64(13)     # seed of the order of groups of one domain, and of the order of each domain's cells
PURPOSE_UNEXPRESSED = np.uint64(14)   # which genes without expression join a cell
PURPOSE_VALUE = np.uint64(15)      # of a value: whether it is hidden; lower 32 bits: which of several bins it gets


@njit(cache=True, nogil=True, inline="always")
def mix(word: Word) -> np.uint64:
    """A bijection of 64-bit numbers whose output bits each depend on all input bits."""
    x = uint64(word)
    x = (x ^ (x >> _S30)) * _MIX_A
    x = (x ^ (x >> _S27)) * _MIX_B
    return x ^ (x >> _S31)


@njit(cache=True, nogil=True)
def stream(seed: Word, epoch: Word, cell_id: Word, purpose: Word) -> np.uint64:
    """The 64-bit key of the stream (seed, epoch, cell_id, purpose)."""
    key = mix(uint64(seed) + GOLDEN)
    key = mix(key ^ (uint64(epoch) + GOLDEN))
    key = mix(key ^ (uint64(cell_id) + GOLDEN))
    return mix(key ^ (uint64(purpose) + GOLDEN))


@njit(cache=True, nogil=True, inline="always")
def bits(key: Word, n: Word) -> np.uint64:
    """Number n of a stream: 64 uniform bits."""
    return mix(uint64(key) + (uint64(n) + uint64(1)) * GOLDEN)


@njit(cache=True, nogil=True)
def fill(key: Word, numbers: NDArray[np.integer], words: NDArray[np.uint64]) -> None:
    """words[i] = number numbers[i] of a stream."""
    for i in range(len(words)):
        words[i] = bits(key, numbers[i])


@njit(cache=True, nogil=True, inline="always")
def uniform(key: Word, n: Word) -> float:
    """Number n of a stream as a float64 in [0, 1), all 53 bits random."""
    return float(bits(key, n) >> _S11) * _TO_UNIT


@njit(cache=True, nogil=True, inline="always")
def below(key: Word, n: Word, bound: int) -> int:
    """Number n of a stream as an integer in [0, bound); bias below bound / 2**53."""
    return int(uniform(key, n) * bound)
