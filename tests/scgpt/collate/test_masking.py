import numpy as np
import pytest

from scgpt.collate.masking import draw_ratio, hide, split
from scgpt.collate.sampling import BLOCK
from scgpt.rng import PURPOSE_SPLIT, PURPOSE_VALUE, fill
from tests.evenness import assert_even
from tests.scgpt.collate.cells import key_of


def words_of(cell, n_genes):
    words = np.empty(n_genes, np.uint64)
    fill(key_of(0, 3, cell, PURPOSE_VALUE), np.arange(n_genes), words)
    return words


def test_what_is_below_the_ratio_is_hidden():
    values, shown, target_mask = np.arange(1, 301, dtype=np.float32), np.empty(300, np.float32), np.empty(300, np.bool_)
    words = words_of(77, 300)
    hide(words, 0.4, -1.0, values, shown, target_mask)
    expected = np.array([5 * word < 2 * (1 << 64) for word in words.tolist()])
    np.testing.assert_array_equal(target_mask, expected)
    np.testing.assert_array_equal(shown, np.where(expected, -1, values))


@pytest.mark.parametrize("ratio", [0.0, 0.25, np.nextafter(1, 0)])
def test_the_limit_is_met_to_the_last_bit(ratio):
    limit = int(ratio * (1 << 64))
    words = np.array([limit - 1, limit, limit + 1] if limit else [0, 1, 1 << 63], np.uint64)
    target_mask = np.empty(3, np.bool_)
    hide(words, ratio, -1.0, np.ones(3, np.float32), np.empty(3, np.float32), target_mask)
    assert target_mask.tolist() == [limit > 0, False, False]


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.4, 0.999])
def test_positions_are_hidden_independently_with_the_ratio(ratio):
    n_cells, n_genes = 2_000, 100
    hidden = np.empty((n_cells, n_genes), np.bool_)
    for cell in range(n_cells):
        hide(words_of(cell, n_genes), ratio, -1.0, np.ones(n_genes, np.float32), np.empty(n_genes, np.float32),
             hidden[cell])
    sigma = np.sqrt(ratio * (1 - ratio) / hidden.size)
    assert abs(hidden.mean() - ratio) <= 4 * sigma   # finds 0.4 that is off by 0.008, which is 7 sigma
    spread = hidden.sum(1).var(), n_genes * ratio * (1 - ratio)   # a fixed count a cell would have variance 0
    assert spread[0] == pytest.approx(spread[1], rel=0.15)   # 4.7 sigma at 0.4; finds a correlation of 0.003


def test_each_cell_draws_one_of_the_listed_ratios_evenly():
    ratios = np.array([0.25, 0.5, 0.75])
    drawn = np.array([draw_ratio(0, 0, cell, ratios) for cell in range(9_000)])
    counts = [(drawn == ratio).sum() for ratio in ratios]
    assert sum(counts) == len(drawn)
    assert_even(counts, draws=len(drawn), off=0.15)
    assert draw_ratio(0, 0, 1, np.array([0.4])) == 0.4


def split_of(cell, n_genes, ratio, chosen=None):
    chosen = np.arange(n_genes, dtype=np.int32) if chosen is None else chosen.copy()
    n_seen = split(key_of(0, 0, cell, PURPOSE_SPLIT), ratio, chosen, n_genes, np.empty(n_genes + 1, np.int32),
                   np.empty(BLOCK, np.uint64))
    return chosen[:n_seen].tolist(), chosen[n_seen:n_genes].tolist()


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.29, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("n_genes", [0, 1, 3, 10, 100])
def test_a_split_moves_the_share_that_upstream_moves_and_loses_nothing(n_genes, ratio):
    for cell in range(20):
        seen, generated = split_of(cell, n_genes, ratio)
        assert len(generated) == int(n_genes * ratio)
        assert sorted(seen + generated) == list(range(n_genes))
        assert seen == sorted(seen)
        assert generated == sorted(generated)


def test_every_choice_of_the_generation_part_is_equally_likely():
    counts = {}
    for cell in range(10_000):
        generated = tuple(split_of(cell, 5, 0.4)[1])
        counts[generated] = counts.get(generated, 0) + 1
    assert len(counts) == 10   # 5 choose 2
    assert_even(list(counts.values()), draws=10_000, off=0.25)


def test_a_split_takes_the_given_places_whatever_they_are():
    places = np.array([4, 9, 11, 30, 31], np.int32)
    seen, generated = split_of(3, 5, 0.6, places)
    assert sorted(seen + generated) == places.tolist()
