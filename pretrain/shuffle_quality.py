"""How well an order mixes cells, as numbers beside those of true random batches of the same cells."""
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ShuffleQuality:
    """Means over some global batches; 1 is what true random batches give, but for the bits."""

    travel: float        # |place in the epoch - place in storage|, over a third of the cells
    spread: float        # distance in storage of two cells of a batch, over a third of the cells
    entropy_bits: float  # of the groups (donors, datasets) of a batch's cells
    ideal_bits: float    # the same of as many cells drawn without replacement from all

    @property
    def mixing(self) -> float:
        """Entropy over ideal; 1 where there is one group only."""
        return self.entropy_bits / self.ideal_bits if self.ideal_bits else 1.0


def shuffle_quality(batches: NDArray[np.integer], places: NDArray[np.integer], groups: NDArray[np.integer], *,
                    seed: int = 0) -> ShuffleQuality:
    """Measure the batches of an order.

    Args:
        batches: (batches, cells of a batch) cells by their place in storage.
        places: same shape; the place of each in the epoch, 0 .. cells - 1.
        groups: (all cells,) group of each, from 0.
        seed: of the random batches that are drawn to compare with, as many as are given.
    """
    n_cells, draw = len(groups), np.random.default_rng(seed)
    third = n_cells / 3
    ordered = np.sort(batches, axis=1)
    size = ordered.shape[1]
    ranks = 2 * np.arange(size) - size + 1   # sum over pairs of |x - y| = sum of x_(k) (2 k - size + 1)
    pairs = size * (size - 1) / 2
    ideal = [_entropy_bits(groups[draw.choice(n_cells, size, replace=False, shuffle=False)]) for _ in batches]
    return ShuffleQuality(
        travel=float(np.abs(batches - places).mean() / third),
        spread=float((ordered @ ranks).mean() / max(1.0, pairs) / third),
        entropy_bits=float(np.mean([_entropy_bits(groups[batch]) for batch in batches])),
        ideal_bits=float(np.mean(ideal)))


def _entropy_bits(groups: NDArray[np.integer]) -> float:
    shares = np.unique(groups, return_counts=True)[1] / len(groups)
    return float(-(shares * np.log2(shares)).sum())
