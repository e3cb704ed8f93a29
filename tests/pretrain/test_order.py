import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.order import (
    PERIOD,
    ROUNDS,
    in_order,
    permute,
    permute_in_blocks,
    shares,
)
from scgpt.errors import DataError
from scgpt.rng import PURPOSE_ORDER, bits, stream
from tests.evenness import assert_even


def epoch_order(n_cells, seed=0, epoch=0):
    return permute(np.arange(n_cells), np.full(n_cells, epoch), n_cells, seed)


def slow_permute(place, epoch, n_cells, seed):
    """The obvious twin, in Python's integers."""
    side_a = next(a for a in itertools.count(1) if a * a >= n_cells)
    side_b = -(-n_cells // side_a)
    key = np.uint64(stream(seed, epoch, 0, PURPOSE_ORDER))
    keys = [np.uint64(bits(key, r)) for r in range(ROUNDS)]
    while True:
        a, b = divmod(place, side_b)
        for r in range(0, ROUNDS, 2):
            a = (a + int(bits(keys[r], b)) % side_a) % side_a
            b = (b + int(bits(keys[r + 1], a)) % side_b) % side_b
        place = a * side_b + b
        if place < n_cells:
            return place


@settings(max_examples=60, deadline=None)
@given(n_cells=st.integers(1, 3_000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_every_cell_comes_up_exactly_once_an_epoch(n_cells, seed, epoch):
    np.testing.assert_array_equal(np.sort(epoch_order(n_cells, seed, epoch)), np.arange(n_cells))


@settings(max_examples=40, deadline=None)
@given(n_cells=st.integers(1, 500), epoch=st.integers(0, 5))
def test_agrees_with_the_slow_twin(n_cells, epoch):
    order = epoch_order(n_cells, 3, epoch)
    assert order.tolist() == [slow_permute(place, epoch, n_cells, 3) for place in range(n_cells)]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(epoch_order(1_000, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == len(orders)


def test_all_orders_of_few_cells_are_equally_likely():
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    n_draws = 24_000
    for epoch in range(n_draws):
        counts[tuple(epoch_order(4, 1, epoch).tolist())] += 1
    assert_even(list(counts.values()), draws=n_draws, off=0.3)


def test_neighbours_in_storage_do_not_stay_neighbours():
    n_cells = 100_000
    order = epoch_order(n_cells)
    assert abs(np.corrcoef(np.arange(n_cells), order)[0, 1]) < 0.015   # 4.7 sigma of a random order
    assert abs(np.abs(np.diff(order)).mean() / n_cells - 1 / 3) < 0.005   # mean distance of two uniform numbers
    batches = order[:99_840].reshape(-1, 512) * 8 // n_cells   # cells of each eighth of the corpus in each batch
    eighths = np.stack([(batches == eighth).sum(1) for eighth in range(8)])
    assert eighths.var() == pytest.approx(512 / 8 * 7 / 8, rel=0.15)   # as drawn at random, neither more nor less even


def test_evaluation_goes_once_through_the_cells_in_stored_order():
    steps = [in_order(step, n_cells=10, global_batch_size=4)[0].tolist() for step in range(4)]
    assert steps == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], []]


# ---- blocks


def block_order(n_cells, block_cells, window_blocks, seed=0, epoch=0):
    return permute_in_blocks(np.arange(n_cells), np.full(n_cells, epoch), n_cells, seed, block_cells, window_blocks)


@settings(max_examples=80, deadline=None)
@given(n_cells=st.integers(1, 2_000), block_cells=st.integers(1, 300), window_blocks=st.integers(1, 12),
       epoch=st.integers(0, 9))
def test_in_blocks_too_every_cell_comes_up_once_an_epoch(n_cells, block_cells, window_blocks, epoch):
    order = block_order(n_cells, block_cells, window_blocks, 5, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(n_cells))


@settings(max_examples=40, deadline=None)
@given(n_cells=st.integers(200, 2_000), block_cells=st.integers(8, 60), window_blocks=st.integers(1, 6))
def test_a_window_of_places_reads_few_blocks_and_mixes_them(n_cells, block_cells, window_blocks):
    order = block_order(n_cells, block_cells, window_blocks)
    size = block_cells * window_blocks
    for first in range(0, n_cells, size):
        cells = np.sort(order[first:first + size])
        runs = 1 + np.count_nonzero(np.diff(cells) != 1)   # neighbours in storage
        assert runs <= window_blocks + 1                   # one block may wrap around the end


def test_any_place_of_blocks_is_computed_alone():
    n_cells, places = 1_003, np.array([0, 500, 1_002, 7])
    whole = [block_order(n_cells, 50, 4, 1, epoch) for epoch in (0, 1)]
    found = permute_in_blocks(np.r_[places, places], np.repeat([0, 1], 4), n_cells, 1, 50, 4)
    np.testing.assert_array_equal(found, np.r_[whole[0][places], whole[1][places]])


def test_blocks_come_in_another_order_each_epoch_and_start_elsewhere():
    orders = [block_order(1_000, 50, 4, seed, epoch) for seed in range(2) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert len({frozenset(order[:200].tolist()) for order in orders}) == len(orders)
    assert len({int(np.sort(order[:50])[0]) % 50 for order in orders}) > 1


# ---- shares of a mixture


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_shares_are_the_weights_to_one_place(weights):
    wanted = np.array(weights) / sum(weights) * PERIOD
    if wanted.min() >= 1:
        counts = shares(weights)
        assert counts.sum() == PERIOD
        assert (np.abs(counts - wanted) <= 1).all()


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [1, float("nan")], [1, 1e-9], [float("inf"), 1],
                                     [1e308, 1e308]])
def test_weights_that_deal_nothing_are_refused(weights):
    with pytest.raises(DataError, match="mixture"):
        shares(weights)
