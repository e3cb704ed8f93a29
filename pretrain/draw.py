"""Which cells a run draws when: step -> the cells of its global batch, from counts and seeds alone.

A `Pool` is gone through epoch by epoch, in a permutation of its own for each. A `Domains` draws groups of cells of one
domain, each domain a pool. An `Order` deals the places of a run out to the corpora of a mixture, each of which is a
pool, or domains. All answer for any place at once: state is the step alone. A batch may straddle two epochs: no cell is
dropped or repeated to fill one.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pretrain.mixture import Mixture
from pretrain.order import PERIOD, Blocks, deal, permuted, places_of, shares
from pretrain.thinning import Thinning
from scgpt.data.schema import CellViews, RaggedBatch, offsets_of
from scgpt.errors import DataError
from scgpt.rng import PURPOSE_DOMAIN, PURPOSE_MIXTURE, Word, stream

Drawn = tuple[NDArray[np.int64], NDArray[np.int64]]   # cells and their epochs


class Cells(Protocol):
    """What the loader reads from: TokenDataset, or anything alike."""

    def __len__(self) -> int:
        """Cells."""

    def fetch(self, indices: NDArray[np.integer]) -> RaggedBatch:
        """The given cells in the given order, with `cell_id`."""

    def views(self, indices: NDArray[np.integer]) -> CellViews:
        """The same, where they lie in memory."""

    def lengths_of(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Values of the given cells, without reading them."""


@dataclass(frozen=True)
class Pool:
    """Cells that come up once an epoch each, or in some epochs only (`thinning`), in endless epochs."""

    n_cells: int
    seed: Word
    blocks: Blocks | None = None        # see `order.permute_in_blocks`
    thinning: Thinning | None = None    # which cells an epoch takes; None: all
    members: NDArray[np.unsignedinteger] | None = None   # (n_cells,) what the cells are numbered elsewhere; None: alike

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(kinds + 1,) places before each of the epochs of a cycle, after which the sizes of epochs repeat."""
        return offsets_of(np.array([self.n_cells]) if self.thinning is None else self.thinning.sizes)

    def draw(self, places: NDArray[np.int64]) -> Drawn:
        """The cells that come at places of the endless sequence of epochs; fastest where the places ascend."""
        if self.thinning is None:
            epochs, within = np.divmod(places, self.n_cells)
            cells = permuted(within, epochs, self.n_cells, self.seed, self.blocks)
        else:
            cycles, rest = np.divmod(places, self.ends[-1])
            kinds = np.searchsorted(self.ends, rest, side="right") - 1
            epochs, within = cycles * (len(self.ends) - 1) + kinds, rest - self.ends[kinds]
            cells = np.empty_like(places)
            for epoch in np.unique(epochs).tolist():
                own = np.flatnonzero(epochs == epoch)
                size = int(self.thinning.sizes[epoch % len(self.thinning.sizes)])
                ranks = permuted(within[own], epochs[own], size, self.seed, self.blocks)
                cells[own] = self.thinning.select(ranks, epoch)
        return cells if self.members is None else self.members[cells].astype(np.int64), epochs

    def before(self, epoch: float) -> float:
        """Places of the first `epoch` epochs."""
        if self.thinning is None:
            return epoch * self.n_cells
        cycle, rest = divmod(epoch, len(self.ends) - 1)
        return float(cycle * self.ends[-1] + np.interp(rest, np.arange(len(self.ends)), self.ends))

    def epochs(self, n_places: int) -> float:
        """Epochs that the first places go through."""
        cycles, rest = divmod(n_places, int(self.ends[-1]))
        kind = int(np.searchsorted(self.ends, rest, side="right")) - 1
        return cycles * (len(self.ends) - 1) + kind + float((rest - self.ends[kind]) / np.diff(self.ends)[kind])

    def sums(self, numbers: NDArray[np.int64]) -> tuple[float, float]:
        """A number known of each cell: its sum over the cells of a cycle of epochs, and how many these are."""
        own = numbers if self.members is None else numbers[self.members]
        if self.thinning is None:
            return float(own.sum()), float(self.n_cells)
        return float(own @ self.thinning.weights.astype(np.int64)), float(self.ends[-1])


@dataclass(frozen=True)
class Domains:
    """Groups of cells of one domain; the cells of each domain come up as in a pool of their own.

    A domain's endless sequence is cut into groups. Epoch e has the groups that its cells complete: of domain d, from
    floor(before_d(e) / group) to floor(before_d(e + 1) / group), so that fewer than `group` cells of a domain wait for
    the next epoch, and none is lost or doubled. The groups of an epoch come in a permutation.
    """

    pools: tuple[Pool, ...]
    group: int                     # cells
    seed: Word                     # of the order of groups
    blocks: Blocks | None = None   # of groups

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """(domains, kinds + 1) see `Pool.ends`."""
        return np.stack([pool.ends for pool in self.pools])

    def _groups_before(self, epoch: int) -> NDArray[np.int64]:
        """(domains,) groups of the first epochs."""
        cycle, kind = divmod(epoch, self._ends.shape[1] - 1)
        before: NDArray[np.int64] = (cycle * self._ends[:, -1] + self._ends[:, kind]) // self.group
        return before

    def _epoch_of(self, place: int) -> int:
        """The epoch that a place falls on: bisection of `_groups_before`."""
        low, high = 0, 1
        while self._groups_before(high).sum() <= place:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._groups_before(middle).sum() <= place else (low, middle)
        return low

    def draw(self, places: NDArray[np.int64]) -> Drawn:
        """The cells of the groups that come at ascending places, (places x group,) each, group by group."""
        cells, epochs = np.empty((2, len(places), self.group), np.int64)
        done = 0
        while done < len(places):
            epoch = self._epoch_of(int(places[done]))
            begin, end = self._groups_before(epoch), self._groups_before(epoch + 1)
            stop = int(np.searchsorted(places, end.sum(), side="left"))
            within = places[done:stop] - begin.sum()
            slots = permuted(within, np.full_like(within, epoch), int((end - begin).sum()), self.seed, self.blocks)
            ends = np.cumsum(end - begin)
            domains = np.searchsorted(ends, slots, side="right")
            groups = slots - ends[domains] + end[domains]
            for domain in np.unique(domains).tolist():
                own = np.flatnonzero(domains == domain)
                ordinals = groups[own, None] * self.group + np.arange(self.group)
                drawn = self.pools[domain].draw(ordinals.ravel())
                cells[done + own], epochs[done + own] = (part.reshape(-1, self.group) for part in drawn)
            done = stop
        return cells.ravel(), epochs.ravel()

    def before(self, epoch: float) -> float:
        """Places of the first `epoch` epochs."""
        first, last = (self._groups_before(int(epoch) + after).sum() for after in (0, 1))
        return float(first + (last - first) * (epoch - int(epoch)))

    def epochs(self, n_places: int) -> float:
        """Epochs that the first places go through."""
        epoch = self._epoch_of(n_places)
        first, last = (self._groups_before(epoch + after).sum() for after in (0, 1))
        return epoch + float((n_places - first) / (last - first))

    def sums(self, numbers: NDArray[np.int64]) -> tuple[float, float]:
        """See `Pool.sums`."""
        totals = [pool.sums(numbers) for pool in self.pools]
        return sum(total for total, _ in totals), sum(count for _, count in totals)


@dataclass(frozen=True)
class Order:
    """The cells of every global batch of a run."""

    draws: tuple[Pool | Domains, ...]    # of each corpus
    first_cells: NDArray[np.int64]       # (corpora + 1,) cells before each corpus
    counts: NDArray[np.int64]            # (corpora,) places of each in PERIOD, see `order.shares`
    seed: Word
    group: int = 1                       # cells that are drawn together: of one domain, where it is above 1

    def batch(self, step: int, global_batch_size: int) -> Drawn:
        """Cells of global batch `step` (from 0) and their epochs, (global_batch_size,) int64 each."""
        n_places = global_batch_size // self.group
        places = np.arange(n_places) + step * n_places
        if len(self.draws) == 1:
            return self.draws[0].draw(places)
        cells, epochs = np.empty((2, n_places, self.group), np.int64)
        corpora, ordinals = deal(places, self.counts, self.seed)
        for corpus, draw in enumerate(self.draws):
            own = np.flatnonzero(corpora == corpus)
            own = own[np.argsort(ordinals[own], kind="stable")]   # keys are made anew where the epoch changes
            cells[own], epochs[own] = (part.reshape(-1, self.group) for part in draw.draw(ordinals[own]))
            cells[own] += self.first_cells[corpus]
        return cells.ravel(), epochs.ravel()

    def epochs(self, n_cells: int) -> list[float]:
        """How often each corpus has been gone through after a run's first `n_cells` cells."""
        n_places = [n_cells // self.group]
        if len(self.draws) > 1:
            n_places = places_of(n_places[0], self.counts, self.seed).tolist()
        return [draw.epochs(places) for draw, places in zip(self.draws, n_places, strict=True)]

    def n_cells(self, epochs: float) -> float:
        """Cells of the first `epochs` epochs, each corpus counted once an epoch."""
        return self.group * sum(draw.before(epochs) for draw in self.draws)

    def mean(self, numbers: NDArray[np.int64]) -> float:
        """The mean over the cells that are drawn of a number known of each cell, (cells,)."""
        parts = np.split(numbers, self.first_cells[1:-1])
        sums = [draw.sums(part) for draw, part in zip(self.draws, parts, strict=True)]
        means = np.array([total / count for total, count in sums])
        return float(means @ self.counts) / PERIOD


def order_of(cells: Cells, *, seed: int, blocks: Blocks | None = None, full_genes: int | None = None,
             domains: NDArray[np.integer] | None = None, group: int = 1) -> Order:
    """The order of a corpus, or of the corpora of a mixture.

    Args:
        cells: what is drawn from.
        seed: of the run.
        blocks: read blocks of neighbours; None: every cell on its own.
        full_genes: cells with fewer expressed genes are drawn in proportion; None: all alike.
        domains: (cells,) domain of each cell, from 0, where groups of one domain are drawn.
        group: cells of such a group.

    Raises DataError when there are no cells, or for weights of a mixture that deal nothing.
    """
    if not len(cells):
        raise DataError("there are no cells to train on", fix="give a corpus whose training split has cells")
    parts: Sequence[Cells] = cells.parts if isinstance(cells, Mixture) else (cells,)
    first_cells = offsets_of(np.array([len(part) for part in parts]))
    draws: list[Pool | Domains] = []
    for corpus, part in enumerate(parts):
        own_seed = seed if len(parts) == 1 else np.uint64(stream(seed, 0, 1 + corpus, PURPOSE_MIXTURE))
        if domains is None:
            draws.append(_pool(part, None, own_seed, blocks, full_genes))
        else:
            own = domains[first_cells[corpus]:first_cells[corpus + 1]]
            draws.append(_domains(part, own, group, own_seed, blocks, full_genes))
    weights = cells.weights if isinstance(cells, Mixture) else (1.0,)
    return Order(tuple(draws), first_cells, shares(weights), seed, 1 if domains is None else group)


def _pool(cells: Cells, members: NDArray[np.unsignedinteger] | None, seed: Word, blocks: Blocks | None,
          full_genes: int | None) -> Pool:
    n_cells = len(cells) if members is None else len(members)

    def lengths_of(places: NDArray[np.int64]) -> NDArray[np.int64]:
        return cells.lengths_of(places if members is None else members[places])

    thinning = (Thinning.of(n_cells, lengths_of, full_genes=full_genes, seed=seed) if full_genes is not None else None)
    return Pool(n_cells, seed, blocks, thinning, members)


def _domains(cells: Cells, domains: NDArray[np.integer], group: int, seed: Word, blocks: Blocks | None,
             full_genes: int | None) -> Domains:
    """One pool a domain. In blocks, a group comes from one block, and blocks of groups are mixed in place of cells."""
    kind = np.uint32 if len(domains) <= 1 << 32 else np.uint64
    by_domain = np.argsort(domains, kind="stable").astype(kind)
    of_cells = None if blocks is None else Blocks(blocks.cells, 1)
    of_groups = None if blocks is None else Blocks(max(1, blocks.cells // group), blocks.window)
    found, firsts = np.unique(domains[by_domain], return_index=True)
    pools = [_pool(cells, members, np.uint64(stream(seed, 0, 1 + domain, PURPOSE_DOMAIN)), of_cells, full_genes)
             for domain, members in zip(found.tolist(), np.split(by_domain, firsts[1:]), strict=True)]
    return Domains(tuple(pools), group, np.uint64(stream(seed, 0, 0, PURPOSE_DOMAIN)), of_groups)
