import itertools

import numpy as np
import pytest

from scgpt.collate.sampling import BLOCK, sample
from scgpt.rng import PURPOSE_SAMPLE, bits
from tests.evenness import assert_even
from tests.scgpt.collate.cells import key_of


def chosen_of(key, n_values, n_wanted):
    chosen = np.empty(n_wanted + 1, np.int32)
    return chosen[:sample(key, chosen, n_values, n_wanted, np.empty(BLOCK, np.uint64))]


def slow_sample(key, n_values, n_wanted):
    chosen = []
    for i in range(n_values):
        if (int(bits(key, i)) >> 32) * (n_values - i) >> 32 < n_wanted - len(chosen):
            chosen.append(i)
    return chosen


@pytest.mark.parametrize(("n_values", "n_wanted"), [(0, 5), (1, 1), (5, 5), (5, 9), (6, 5), (100, 1), (3000, 1199)])
def test_agrees_with_the_slow_twin_and_is_ascending_and_unique(n_values, n_wanted):
    for cell in range(20):
        key = key_of(1, 0, cell, PURPOSE_SAMPLE)
        chosen = chosen_of(key, n_values, n_wanted)
        expected = range(n_values) if n_values <= n_wanted else slow_sample(key, n_values, n_wanted)
        assert chosen.tolist() == list(expected)
        assert len(chosen) == min(n_values, n_wanted)
        assert (np.diff(chosen) > 0).all()


def test_every_subset_is_equally_likely():
    subsets = dict.fromkeys(itertools.combinations(range(6), 3), 0)
    n_draws = 40_000
    for cell in range(n_draws):
        subsets[tuple(chosen_of(key_of(7, 0, cell, PURPOSE_SAMPLE), 6, 3).tolist())] += 1
    assert_even(list(subsets.values()), draws=n_draws, off=0.2)


@pytest.mark.parametrize(("n_values", "n_wanted"), [(300, 119), (2_500, 1_199)])
def test_every_place_of_a_long_cell_is_equally_likely_beside_any_other(n_values, n_wanted):
    n_draws = 4_000
    taken = np.zeros((n_draws, n_values), bool)
    for cell in range(n_draws):
        taken[cell, chosen_of(key_of(8, 0, cell, PURPOSE_SAMPLE), n_values, n_wanted)] = True
    assert_even(taken.sum(0), draws=n_draws, off=0.4)
    share = n_wanted / n_values
    both = share * (n_wanted - 1) / (n_values - 1)
    for apart in (1, 2, BLOCK):   # pairs of neighbours, and of places of neighbouring blocks
        pairs = (taken[:, apart:] & taken[:, :-apart]).mean(1)
        sigma = pairs.std() / np.sqrt(n_draws)
        assert 7 * sigma < 0.02 * both   # pairs that come together 2 % too often or too rarely are found
        assert abs(pairs.mean() - both) < 4 * sigma
