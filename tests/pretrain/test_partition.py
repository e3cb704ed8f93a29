import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.partition import micro_batches, of_rank, one_domain_batches

LENGTHS = st.lists(st.integers(1, 2_000), min_size=0, max_size=200).map(lambda lengths: np.array(lengths, np.int64))


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 40))
def test_each_cell_is_in_one_micro_batch_and_tokens_are_balanced(lengths, size):
    dealt = micro_batches(lengths, size)
    assert len(dealt) == -(-len(lengths) // size)
    np.testing.assert_array_equal(np.sort(np.concatenate([*dealt, np.empty(0, np.int64)])), np.arange(len(lengths)))
    cells = [len(batch) for batch in dealt]
    assert max(cells, default=0) <= size
    assert max(cells, default=0) - min(cells, default=0) <= 1
    if dealt and len(lengths) % size == 0:
        assert set(cells) == {size}
        tokens = [lengths[batch].sum() for batch in dealt]
        assert max(tokens) - min(tokens) <= lengths.max() - lengths.min()


def test_cells_are_dealt_to_and_fro_by_length():
    dealt = micro_batches(np.array([10, 50, 20, 60, 30, 40]), 2)
    assert [batch.tolist() for batch in dealt] == [[0, 3], [1, 2], [4, 5]]   # 60 + 10, 50 + 20, 40 + 30


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 12), seed=st.integers(0, 99))
def test_micro_batches_of_one_domain_hold_each_cell_once(lengths, size, seed):
    domains = np.random.default_rng(seed).integers(0, 3, len(lengths)) * 7
    dealt = one_domain_batches(lengths, domains, size)
    np.testing.assert_array_equal(np.sort(np.concatenate([*dealt, np.empty(0, np.int64)])), np.arange(len(lengths)))
    assert all(len(set(domains[batch].tolist())) == 1 for batch in dealt)
    assert len(dealt) == sum(-(-int(count) // size) for count in np.bincount(domains))
    tokens = [int(lengths[batch].sum()) for batch in dealt]
    assert tokens == sorted(tokens, reverse=True)
    for domain in set(domains.tolist()):   # balanced within a domain
        own = [int(lengths[batch].sum()) for batch in dealt if domains[batch[0]] == domain]
        if np.count_nonzero(domains == domain) % size == 0:
            assert max(own) - min(own) <= np.ptp(lengths[domains == domain])


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_micro_batch_is_run_by_one_rank(world_size):
    dealt = [of_rank(10, rank, world_size) for rank in range(world_size)]
    assert sorted(number for numbers in dealt for number in numbers) == list(range(10))
    assert all(number % world_size == rank for rank, numbers in enumerate(dealt) for number in numbers)
