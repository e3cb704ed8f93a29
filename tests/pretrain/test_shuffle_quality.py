import numpy as np
import pytest

from pretrain.order import Blocks, permuted
from pretrain.shuffle_quality import shuffle_quality

N_CELLS, SIZE = 65_536, 256
BY_DONOR = np.arange(N_CELLS) // 1_024   # 64 donors, their cells together


def quality_of(order, groups=BY_DONOR):
    places = np.arange(N_CELLS).reshape(-1, SIZE)
    return shuffle_quality(order.reshape(-1, SIZE), places, groups)


def epoch(blocks, seed=0):
    return permuted(np.arange(N_CELLS), np.zeros(N_CELLS, np.int64), N_CELLS, seed, blocks)


def test_the_numbers_are_those_of_the_plain_definition():
    batches, places = np.array([[3, 0, 7, 4]]), np.array([[0, 1, 2, 3]])
    groups = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2])
    quality = shuffle_quality(batches, places, groups)
    assert quality.travel == pytest.approx(np.mean([3, 1, 5, 1]) / 3)
    assert quality.spread == pytest.approx(np.mean([3, 4, 1, 7, 4, 3]) / 3)
    assert quality.entropy_bits == pytest.approx(1.5)   # groups 1, 0, 2, 1
    assert shuffle_quality(batches, places, np.zeros(9, int)).mixing == 1


def test_the_shuffled_order_is_no_different_from_true_random():
    """Standard errors of 256 batches: 0.0024 bits, 0.3 % of travel, 0.02 % of spread; six of each would be found."""
    ours = quality_of(epoch(None))
    true = [quality_of(np.random.default_rng(seed).permutation(N_CELLS)) for seed in range(1, 6)]
    for name in ("travel", "spread", "entropy_bits"):
        found = np.array([getattr(quality, name) for quality in true])
        assert abs(getattr(ours, name) - found.mean()) < 6 * found.std(ddof=1), name
    assert ours.mixing == pytest.approx(1, abs=0.003)
    assert ours.travel == pytest.approx(1, abs=0.02)


def test_what_is_read_as_stored_is_told_from_what_is_mixed():
    stored, shuffled_corpus = quality_of(np.arange(N_CELLS)), np.random.default_rng(3).permutation(BY_DONOR)
    assert (stored.travel, stored.mixing) == (0, 0)
    assert stored.spread < 0.01
    assert quality_of(np.arange(N_CELLS), shuffled_corpus).mixing == pytest.approx(1, abs=0.003)


def test_more_and_smaller_blocks_mix_better():
    shapes = ((1_024, 2), (1_024, 16), (256, 64), (64, 1_024))
    mixing = [quality_of(epoch(Blocks(*shape))).mixing for shape in shapes]
    assert mixing == sorted(mixing)
    assert mixing[0] < 0.5
    assert mixing[-1] > 0.99
