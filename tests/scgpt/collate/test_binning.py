import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt.collate.binning import (
    DIGIT_BITS,
    as_values,
    bin_cell,
    fill_edges,
    probabilities,
    scratch_for,
    sort,
    sort_keys,
)
from scgpt.errors import DataError
from tests.evenness import assert_even


def edges_of(values, n_bins):
    scratch = scratch_for(len(values), n_bins)
    fill_edges(sort_keys(values), values.dtype != np.float32, as_values(scratch.sorted_keys, values.dtype),
               probabilities(n_bins), scratch)
    return scratch.edges


def bin_ranges(values, n_bins):
    """Upstream's definition: the lowest and the highest bin that each value may get."""
    edges = np.quantile(values.astype(np.float64), np.linspace(0, 1, n_bins - 1))
    upto = np.digitize(values.astype(np.float64), edges)
    below = np.digitize(values.astype(np.float64), edges, right=True)
    return np.minimum(below + 1, upto), upto


CELLS = {
    "counts": st.lists(st.integers(1, 12), min_size=1, max_size=300).map(lambda x: np.array(x, np.uint16)),
    "mixed counts": st.lists(st.one_of(st.integers(1, 5), st.integers(1, 300), st.integers(250, 65_535)), min_size=1,
                             max_size=300).map(lambda x: np.array(x, np.uint16)),
    "wide counts": st.lists(st.integers(1, 65_535), min_size=1, max_size=300).map(lambda x: np.array(x, np.uint16)),
    "uint32": st.lists(st.integers(1, 2**32 - 1), min_size=1, max_size=300).map(lambda x: np.array(x, np.uint32)),
    "float32": st.lists(st.floats(0, 2.0**127, width=32, exclude_min=True, allow_subnormal=False), min_size=1,
                        max_size=300).map(lambda x: np.array(x, np.float32)),
}


@pytest.mark.parametrize("kind", CELLS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), n_bins=st.sampled_from([2, 3, 8, 51, 127]))
def test_edges_equal_numpy_quantiles_to_the_bit_and_bins_lie_in_upstreams_range(kind, data, n_bins):
    values = data.draw(CELLS[kind])
    np.testing.assert_array_equal(edges_of(values, n_bins),
                                  np.quantile(values.astype(np.float64), np.linspace(0, 1, n_bins - 1)))
    low, high = bin_ranges(values, n_bins)
    highest = bin_cell(values, n_bins, seed=0, epoch=0, cell_id=1, tie_rule="highest")
    np.testing.assert_array_equal(highest, high)
    spread = bin_cell(values, n_bins, seed=0, epoch=0, cell_id=1)
    assert ((spread >= low) & (spread <= high) & (spread == np.round(spread))).all()
    assert spread.min() >= 1
    assert spread.max() <= n_bins - 1


@settings(max_examples=80, deadline=None)
@given(keys=st.one_of(*(st.lists(st.integers(0, largest), max_size=200) for largest in (3, 2_047, 2_048, 2**32 - 1))))
def test_keys_are_sorted(keys):
    keys = np.array(keys, np.uint32)
    ordered = np.empty_like(keys)
    sort(keys, ordered, np.empty_like(keys), np.empty(1 << DIGIT_BITS, np.int32))
    np.testing.assert_array_equal(ordered, np.sort(keys))


def test_ties_are_spread_evenly_over_the_bins_whose_edges_they_equal():
    values = np.array([1, 1, 1, 2, 5], np.uint16)   # the ones fall anywhere in 1..25 (with the other rule: 25)
    low, high = bin_ranges(values, 51)
    assert (low[0], high[0]) == (1, 25)
    draws = np.array([bin_cell(values, 51, seed=0, epoch=0, cell_id=cell) for cell in range(20_000)])
    for first in range(3):
        counts = np.bincount(draws[:, first].astype(int), minlength=26)[1:]
        assert len(counts) == 25
        assert_even(counts, draws=len(draws), off=0.3)
    np.testing.assert_array_equal(draws[:, 3:], np.broadcast_to([37, 50], (len(draws), 2)))
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.03   # each value is drawn by itself


def test_the_other_rule_gives_the_highest_of_the_tied_numbers():
    bins = bin_cell(np.array([1, 1, 1, 2, 5], np.uint16), 51, seed=0, epoch=0, cell_id=0, tie_rule="highest")
    assert bins.tolist() == [25, 25, 25, 37, 50]


def test_draws_depend_on_seed_epoch_and_cell_alone():
    values = np.ones(200, np.uint16)
    first = bin_cell(values, 51, seed=3, epoch=1, cell_id=9)
    np.testing.assert_array_equal(first, bin_cell(values, 51, seed=3, epoch=1, cell_id=9))
    for other in ({"seed": 4, "epoch": 1, "cell_id": 9}, {"seed": 3, "epoch": 2, "cell_id": 9},
                  {"seed": 3, "epoch": 1, "cell_id": 10}):
        assert (first != bin_cell(values, 51, **other)).any()


def test_equal_values_of_different_types_get_equal_bins():
    counts = np.random.default_rng(0).integers(1, 3_000, 500)
    expected = bin_cell(counts.astype(np.uint16), 51, seed=0, epoch=0, cell_id=5)
    for dtype in (np.uint32, np.float32):
        np.testing.assert_array_equal(bin_cell(counts.astype(dtype), 51, seed=0, epoch=0, cell_id=5), expected)


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_values_without_a_bin_are_refused(wrong):
    with pytest.raises(DataError, match="only finite values above 0"):
        bin_cell(np.array([1, wrong], np.float32), 51, seed=0, epoch=0, cell_id=0)


def test_a_cell_without_values_has_no_bins():
    assert bin_cell(np.empty(0, np.uint16), 51, seed=0, epoch=0, cell_id=0).shape == (0,)


@pytest.mark.skipif("SCGPT_SHARED" not in os.environ, reason="SCGPT_SHARED names no folder with golden vectors")
@pytest.mark.parametrize("name", ["binning_numpy", "binning_numpy_no_zeros", "binning_torch_zeros",
                                  "binning_torch_no_zeros", "binning_one_value", "binning_ties_numpy",
                                  "binning_ties_torch"])
def test_bins_are_those_of_the_public_package(name):
    from safetensors.numpy import load_file

    vectors = Path(os.environ["SCGPT_SHARED"]) / "golden" / "vectors"
    case = next(case for case in json.loads((vectors / "index.json").read_text()) if case["name"] == name)
    tensors = load_file(vectors / f"{name}.safetensors")
    row = tensors["in.arg0"]
    n_bins = case["kwargs"].get("n_bins", case["args"][-1])["value"]
    expressed = row > 0
    bins = bin_cell(row[expressed], n_bins, seed=0, epoch=0, cell_id=0)
    if "uniform" in case:
        low, high = tensors["low.out"][expressed], tensors["high.out"][expressed]
        assert ((bins >= low) & (bins <= high)).all()
        deviation = (bins - (low + high) / 2).sum() / np.sqrt((((high - low + 1) ** 2 - 1) / 12).sum())
        assert abs(deviation) < 6
    else:
        np.testing.assert_array_equal(bins, tensors["out.out"][expressed])
