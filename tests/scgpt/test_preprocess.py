"""Binning of a row: edges of the public function that the golden vectors leave open."""
import numpy as np
import pytest
import torch

from scgpt.collate.binning import bin_cell
from scgpt.preprocess import _digitize, binning


def test_zero_rows_stay_zero_whatever_they_are():
    assert torch.equal(binning(torch.zeros(4), 51), torch.zeros(4, dtype=torch.int64))
    assert np.array_equal(binning(np.zeros(4, np.float32), 51), np.zeros(4, np.float32))


@pytest.mark.parametrize("row", [torch.zeros(0), np.zeros(0)])
def test_an_empty_row_gives_an_empty_one(row):
    assert binning(row, 51).shape == (0,)


def test_highest_rule_takes_the_highest_of_tied_bins():
    bins = binning(np.array([1.0, 1, 1, 2, 5]), 51, tie_rule="highest")
    assert bins.tolist() == [25, 25, 25, 37, 50]


def test_ties_fall_on_every_bin_they_may():
    np.random.seed(0)  # noqa: NPY002 the generator that the function draws from
    ones = np.concatenate([binning(np.array([1.0, 1, 1, 2, 5]), 51)[:3] for _ in range(500)])
    assert set(ones.astype(int)) == set(range(1, 26))


def test_the_row_is_left_as_it_was():
    row = torch.tensor([3.0, 0, 1])
    binning(row, 51)
    assert row.tolist() == [3, 0, 1]


def test_compiled_binning_of_training_gives_the_same_bins():
    values = np.random.default_rng(0).permutation(np.arange(1, 400)).astype(np.float32)
    assert np.array_equal(binning(values, 51), bin_cell(values, 51, seed=0, epoch=0, cell_id=0))


def test_digitize_takes_rows_only():
    with pytest.raises(ValueError, match="dimension"):
        _digitize(np.zeros((2, 2)), np.zeros(3))
