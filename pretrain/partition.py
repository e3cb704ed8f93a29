"""Which cells form micro-batch j of a step, and which rank runs it. Cells know nothing of ranks.

What is computed together (packing, batch statistics, dropout keyed by (seed, step, j)) is therefore the same on any
world size. Cells are sorted by tokens and dealt out like cards, to and fro: micro-batches of equally many cells, whose
token counts differ by no more than the longest and the shortest cell do. Where each is to be of one domain, the cells
of each domain are dealt by themselves.
"""
import itertools

import numpy as np
from numpy.typing import NDArray


def micro_batches(lengths: NDArray[np.integer], micro_batch_size: int) -> list[NDArray[np.int64]]:
    """Deal the cells of a global batch into ceil(cells / micro_batch_size) micro-batches, tokens balanced.

    Args:
        lengths: (cells,) tokens of each cell.
        micro_batch_size: cells of a micro-batch at most; all have as many where it divides the cells, else they differ
            by one at most.

    Returns the cells' places in the global batch, each place once, ascending within a micro-batch.
    """
    n_cells = len(lengths)
    n_micro = -(-n_cells // micro_batch_size)
    if n_micro == 0:
        return []
    longest_first = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    deal, card = np.divmod(np.arange(n_cells), n_micro)
    owner = np.empty(n_cells, np.int64)
    owner[longest_first] = np.where(deal % 2 == 0, card, n_micro - 1 - card)
    by_owner = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=n_micro)).tolist()
    return [by_owner[first:end] for first, end in itertools.pairwise([0, *ends])]


def one_domain_batches(lengths: NDArray[np.integer], domains: NDArray[np.integer],
                       micro_batch_size: int) -> list[NDArray[np.int64]]:
    """As `micro_batches`, each of cells of one domain; most tokens first, so that ranks work on alike ones together.

    `domains`: (cells,). Where `micro_batch_size` divides the cells of every domain, all have as many.
    """
    dealt = [own[batch] for domain in np.unique(domains).tolist() for own in [np.flatnonzero(domains == domain)]
             for batch in micro_batches(lengths[own], micro_batch_size)]
    return sorted(dealt, key=lambda batch: -int(lengths[batch].sum()))


def of_rank(n_micro: int, rank: int, world_size: int) -> range:
    """The micro-batches that a rank runs, in order: j = rank modulo world_size."""
    return range(rank, n_micro, world_size)
