import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pretrain.draw import order_of
from pretrain.mixture import Mixture
from pretrain.order import PERIOD, ROUNDS, Blocks, permute, shares
from pretrain.thinning import LEVELS
from scgpt.errors import DataError
from scgpt.rng import PURPOSE_ORDER, bits, stream


class Counted:
    """Cells of which only their number is known, and their lengths where they are given."""

    def __init__(self, n_cells, lengths=None):
        self.n_cells, self.lengths = n_cells, lengths

    def __len__(self):
        return self.n_cells

    def lengths_of(self, indices):
        return self.lengths[indices]


def epoch_order(n_cells, seed=0, epoch=0):
    return permute(np.arange(n_cells), np.full(n_cells, epoch), n_cells, seed)


@settings(max_examples=30, deadline=None)
@given(n_cells=st.integers(1, 40), size=st.integers(1, 60), n_steps=st.integers(1, 12))
def test_global_batches_are_the_epochs_end_to_end(n_cells, size, n_steps):
    n_epochs = -(-n_steps * size // n_cells)
    expected = np.concatenate([epoch_order(n_cells, 9, epoch) for epoch in range(n_epochs)])[:n_steps * size]
    order = order_of(Counted(n_cells), seed=9)
    steps = [order.batch(step, size) for step in range(n_steps)]
    np.testing.assert_array_equal(np.concatenate([indices for indices, _ in steps]), expected)
    np.testing.assert_array_equal(np.concatenate([epochs for _, epochs in steps]),
                                  np.arange(n_steps * size) // n_cells)


def test_any_position_of_a_trillion_cells_at_once():
    n_cells = 10**12
    indices, epochs = order_of(Counted(n_cells), seed=0).batch(5 * 10**9, 512)
    assert len(np.unique(indices)) == 512
    assert indices.min() >= 0
    assert indices.max() < n_cells
    assert np.unique(epochs).tolist() == [2]
    assert indices[0] == slow_trillion(5 * 10**9 * 512 % n_cells)


def slow_trillion(place):
    side = 10**6
    key = np.uint64(stream(0, 2, 0, PURPOSE_ORDER))
    a, b = divmod(place, side)
    for r in range(0, ROUNDS, 2):
        a = (a + int(bits(np.uint64(bits(key, r)), b))) % side
        b = (b + int(bits(np.uint64(bits(key, r + 1)), a))) % side
    return a * side + b


def test_a_split_without_cells_is_refused():
    with pytest.raises(DataError, match="no cells to train on"):
        order_of(Counted(0), seed=0)


# ---- mixtures


def mixed(n_steps, size, n_cells, weights, seed=0, first=0):
    """Corpora, cells within them, epochs of the steps' places."""
    order = order_of(Mixture(tuple(map(Counted, n_cells)), tuple(weights)), seed=seed)
    cells, epochs = (np.concatenate(parts) for parts in zip(
        *(order.batch(step, size) for step in range(first, first + n_steps)), strict=True))
    corpora = np.searchsorted(order.first_cells, cells, side="right") - 1
    return corpora, cells - order.first_cells[corpora], epochs


def test_every_period_holds_exactly_the_shares():
    corpora, _, _ = mixed(2 * PERIOD // 512, 512, [70_000, 300, 5_000], [2, 1, 0.5])
    for period in range(2):
        found = np.bincount(corpora[period * PERIOD:(period + 1) * PERIOD], minlength=3)
        np.testing.assert_array_equal(found, shares([2, 1, 0.5]))
    near = np.bincount(corpora[:4_096], minlength=3) / 4_096   # and they are mixed, not one after the other
    np.testing.assert_allclose(near, np.array([2, 1, 0.5]) / 3.5, atol=0.05)


@settings(max_examples=20, deadline=None)
@given(n_cells=st.lists(st.integers(1, 400), min_size=1, max_size=4), seed=st.integers(0, 2**62), data=st.data())
def test_each_corpus_of_a_mixture_goes_through_epochs_of_its_own(n_cells, seed, data):
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(n_cells), max_size=len(n_cells)))
    corpora, indices, epochs = mixed(8, 256, n_cells, weights, seed)
    for corpus, cells in enumerate(n_cells):
        own_indices, own_epochs = indices[corpora == corpus], epochs[corpora == corpus]
        drawn = np.bincount(own_indices, minlength=cells)
        assert len({(epoch, index) for epoch, index in zip(own_epochs.tolist(), own_indices.tolist(), strict=True)}) \
            == len(own_indices)
        assert drawn.max(initial=0) <= own_epochs.max(initial=0) + 1


def test_a_corpus_runs_through_whole_epochs_over_whole_periods():
    """All places of some periods at once: every cell of a finished epoch exactly once."""
    corpora, indices, epochs = mixed(PERIOD // 256, 256, [1_000, 77], [3, 1])
    for corpus, cells in enumerate((1_000, 77)):
        for epoch in range(int(shares([3, 1])[corpus]) // cells):
            mine = indices[(corpora == corpus) & (epochs == epoch)]
            np.testing.assert_array_equal(np.sort(mine), np.arange(cells))


def test_steps_of_a_mixture_are_places_end_to_end():
    whole = mixed(1, 640, [50, 60], [1, 2], seed=3)
    parts = mixed(10, 64, [50, 60], [1, 2], seed=3)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)


# ---- cells of few genes are drawn less


def steps_of(order, size, n_steps, first=0):
    """(cells, epochs) of the steps' places, end to end."""
    return tuple(np.concatenate(parts) for parts in zip(
        *(order.batch(step, size) for step in range(first, first + n_steps)), strict=True))


def weights_of(lengths, full_genes):
    """The rule, one cell after the other."""
    return [min(LEVELS, max(1, int(LEVELS * length / full_genes + 0.5))) for length in lengths]


LENGTHS = st.lists(st.integers(0, 120), min_size=1, max_size=80).map(np.array)
BLOCKS = st.sampled_from([None, Blocks(5, 2)])


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, full_genes=st.integers(1, 100), seed=st.integers(0, 2**62), blocks=BLOCKS)
def test_any_32_epochs_in_a_row_take_a_cell_exactly_as_often_as_its_weight_says(lengths, full_genes, seed, blocks):
    order = order_of(Counted(len(lengths), lengths), seed=seed, full_genes=full_genes, blocks=blocks)
    weights = np.array(weights_of(lengths, full_genes))
    total = int(weights.sum())
    assert order.n_cells(LEVELS) == total
    cells, epochs = steps_of(order, 1, 2 * total)
    taken = np.zeros((2 * LEVELS, len(lengths)), int)
    np.add.at(taken, (epochs, cells), 1)
    assert taken.max() == 1   # once an epoch at most
    assert (np.diff(epochs) >= 0).all()
    sums = np.cumsum(np.vstack([np.zeros(len(lengths), int), taken]), axis=0)
    np.testing.assert_array_equal(sums[LEVELS:] - sums[:-LEVELS], np.broadcast_to(weights, (LEVELS + 1, len(lengths))))
    spans = np.arange(2 * LEVELS + 1)[:, None] * weights / LEVELS   # never further than one from even, wherever begun
    for first in (0, 7):
        assert (np.abs(sums[first:] - sums[first] - spans[:len(sums) - first]) < 1).all()


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, first=st.integers(0, 10**9), blocks=BLOCKS)
def test_any_place_of_a_thinned_run_is_computed_alone(lengths, first, blocks):
    order = order_of(Counted(len(lengths), lengths), seed=4, full_genes=60, blocks=blocks)
    whole, parts = steps_of(order, 24, 1, first), steps_of(order, 4, 6, 6 * first)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)


def test_effective_epochs_and_sizes_of_epochs_are_told():
    lengths = np.random.default_rng(0).integers(1, 100, 3_000)
    order = order_of(Counted(3_000, lengths), seed=1, full_genes=60)
    assert order.n_cells(0) == 0
    for epoch in (0, 1, 5, LEVELS, LEVELS + 3, 10**6):
        n_cells = int(order.n_cells(epoch))
        _, epochs = order.batch(n_cells // 2, 2) if n_cells % 2 == 0 else order.batch(n_cells, 1)
        assert epochs[0] == epoch
        assert order.epochs(n_cells) == [epoch]
        size = order.n_cells(epoch + 1) - n_cells
        assert order.epochs(n_cells + int(size) // 4)[0] == pytest.approx(epoch + 0.25, abs=1e-3)
        assert order.n_cells(epoch + 0.5) == n_cells + size / 2
    weights = np.array(weights_of(lengths, 60))
    assert order.mean(lengths) == pytest.approx(lengths @ weights / weights.sum(), rel=1e-12)


def test_shallow_cells_come_evenly_over_epochs_and_in_no_order():
    """1,024 cells of weight 1/4: an epoch takes 256 of them, give or take what phases drawn by lot differ."""
    order = order_of(Counted(1_024, np.full(1_024, 8)), seed=0, full_genes=32)
    sizes = np.diff([order.n_cells(epoch) for epoch in range(LEVELS + 1)])
    assert np.abs(sizes - 256).max() < 4.5 * np.sqrt(1_024 * 0.25 * 0.75)
    cells, _ = order.batch(0, int(sizes[0]))
    assert abs(np.corrcoef(cells, np.arange(len(cells)))[0, 1]) < 4.5 / np.sqrt(len(cells))
    other, _ = order_of(Counted(1_024, np.full(1_024, 8)), seed=1, full_genes=32).batch(0, 256)
    assert set(other.tolist()) != set(cells[:256].tolist())


def test_a_mixture_thins_each_of_its_corpora():
    parts = (Counted(40, np.full(40, 10)), Counted(30, np.full(30, 40)))
    order = order_of(Mixture(parts, (1.0, 1.0)), seed=0, full_genes=40)
    cells, epochs = steps_of(order, 256, 16)
    assert order.n_cells(LEVELS) == 40 * 8 + 30 * 32
    for corpus, (first, size) in enumerate(((0, 10), (40, 30))):
        own = (cells >= first) & (cells < first + len(parts[corpus]))
        assert order.epochs(4_096)[corpus] == pytest.approx(np.count_nonzero(own) / size, abs=2)
        assert len(set(zip(cells[own].tolist(), epochs[own].tolist(), strict=True))) == np.count_nonzero(own)


# ---- groups of one domain


DOMAINS = st.lists(st.sampled_from([0, 0, 0, 0, 1, 1, 3]), min_size=1, max_size=60).map(np.array)


@settings(max_examples=40, deadline=None)
@given(domains=DOMAINS, group=st.integers(1, 9), seed=st.integers(0, 2**62), blocks=BLOCKS,
       full_genes=st.sampled_from([None, 50]), data=st.data())
def test_groups_are_of_one_domain_and_no_cell_is_lost_or_doubled(domains, group, seed, blocks, full_genes, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, 60), min_size=len(domains), max_size=len(domains))))
    order = order_of(Counted(len(domains), lengths), seed=seed, domains=domains, group=group, blocks=blocks,
                     full_genes=full_genes)
    n_epochs = 2 * LEVELS
    n_groups = int(order.n_cells(n_epochs)) // group
    assume(n_groups)
    cells, epochs = steps_of(order, group, n_groups)
    assert (domains[cells].reshape(-1, group) == domains[cells].reshape(-1, group)[:, :1]).all()
    pairs = set(zip(cells.tolist(), epochs.tolist(), strict=True))
    assert len(pairs) == len(cells)   # a cell once an epoch at most
    weights = np.full(len(domains), LEVELS) if full_genes is None else np.array(weights_of(lengths, full_genes))
    for domain in set(domains.tolist()):
        own = domains == domain
        missing = int(2 * weights[own].sum()) - np.count_nonzero(own[cells])
        assert 0 <= missing < group   # what waits for the next epoch


@settings(max_examples=20, deadline=None)
@given(domains=DOMAINS, group=st.integers(1, 6), first=st.integers(0, 10**7))
def test_any_group_is_computed_alone(domains, group, first):
    order = order_of(Counted(len(domains)), seed=4, domains=domains, group=group)
    whole, parts = steps_of(order, 12 * group, 1, first), steps_of(order, 3 * group, 4, 4 * first)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_epoch_mixes_the_groups_of_all_domains():
    domains = np.repeat([0, 1, 2], [6_000, 3_000, 1_000])
    order = order_of(Counted(10_000), seed=0, domains=domains, group=10)
    cells, epochs = order.batch(0, 10_000)
    assert set(epochs.tolist()) == {0}
    np.testing.assert_array_equal(np.sort(cells), np.arange(10_000))
    drawn = domains[cells[::10]]
    early = np.bincount(drawn[:500], minlength=3)   # as many as a fair draw without replacement of half of them
    sigma = np.sqrt(1_000 * np.array([.6, .3, .1]) * np.array([.4, .7, .9]) / 4)
    assert (np.abs(early - np.array([300, 150, 50])) < 4.5 * sigma).all()
    assert order.epochs(10_000) == [1.0]
    assert order.epochs(2_500) == [0.25]


def test_a_mixture_draws_groups_of_each_corpus():
    domains = np.array([0, 1] * 20 + [1, 2] * 10)
    order = order_of(Mixture((Counted(40), Counted(20)), (1.0, 3.0)), seed=0, domains=domains, group=4)
    cells, _ = steps_of(order, 64, 64)
    assert (domains[cells].reshape(-1, 4) == domains[cells].reshape(-1, 4)[:, :1]).all()
    of_one = np.count_nonzero(cells < 40)
    assert order.epochs(4_096) == pytest.approx([of_one / 40, (4_096 - of_one) / 20], abs=0.2)
