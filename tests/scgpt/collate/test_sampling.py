import itertools

import numpy as np
import pytest

from scgpt.collate.sampling import BLOCK, sample
from scgpt.rng import PURPOSE_SAMPLE, bits
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
    expected = n_draws / len(subsets)
    chi_square = sum((count - expected) ** 2 / expected for count in subsets.values())
    assert chi_square < 43.8   # 19 degrees of freedom, p = 0.001; one subset off by 10 % of its share is found surely
