"""Genes without expression that join a cell before it is sampled: upstream's `include_zero_gene`, as many as are asked.

They are a uniform sample without replacement of the vocabulary's genes that the cell does not express, with value 0.
The sampling to the context length then treats all alike, so with as many as there are every gene of the vocabulary has
the same chance, which is what upstream does. Zeros have no part in the edges of the bins, and bin 0.
"""
from collections.abc import Callable

import numpy as np
from numba import njit
from numpy.typing import NDArray

from scgpt import rng
from scgpt.collate.compiled import digest_of
from scgpt.data import gather
from scgpt.data.gather import at
from scgpt.data.schema import CELL_ID, CellViews, RaggedBatch, offsets_of
from scgpt.rng import PURPOSE_UNEXPRESSED, Word, below, stream


def add_unexpressed(cells: CellViews, lengths: NDArray[np.int64], gene_ids: NDArray[np.int32], *, seed: Word,
                    epochs: NDArray[np.int64]) -> RaggedBatch:
    """The cells with genes of value 0 behind those that they express.

    Args:
        cells: their genes are among `gene_ids`.
        lengths: (cells,) genes of each afterwards, at most `len(gene_ids)`.
        gene_ids: (genes,) the vocabulary's, without special tokens.
        seed: with the ids of the cells and `epochs`, (cells,), the key of the draws.
        epochs: see `seed`.

    Raises DataError where a cell holds a gene id outside the vocabulary.
    """
    offsets = offsets_of(lengths)
    genes, expressions = np.empty(offsets[-1], cells.gene_type), np.empty(offsets[-1], cells.expression_type)
    known = max(int(gene_ids.max(initial=0)) + 1, cells.n_tokens)
    damaged = _fill(cells.genes, cells.expressions, cells.lengths, np.uint64(seed), cells.cell_ids, epochs, gene_ids,
                    np.zeros(known, np.bool_), offsets, genes, expressions)
    if damaged >= 0:
        raise cells.damaged(damaged)
    return RaggedBatch(genes, expressions, offsets, {CELL_ID: cells.cell_ids})


def _compiled(sources: str) -> Callable[..., int]:
    """The loop over cells; `sources`: a digest of the files of its steps, see scgpt/collate/compiled.py."""

    @njit(cache=True, nogil=True)
    def fill(genes_at: NDArray[np.uint64], expressions_at: NDArray[np.uint64], lengths: NDArray[np.int64], seed: Word,
             cell_ids: NDArray[np.uint64], epochs: NDArray[np.int64], gene_ids: NDArray[np.int32],
             marked: NDArray[np.bool_], out_offsets: NDArray[np.int64], out_genes: NDArray[np.unsignedinteger],
             out_expressions: NDArray[np.generic]) -> int:
        """`marked`: (largest id + 1,) False; left so. Returns a cell with a larger id, at once; -1 where none has."""
        _ = sources
        for cell in range(len(cell_ids)):
            first, stop, n_expressed = out_offsets[cell], out_offsets[cell + 1], lengths[cell]
            genes, expressions = (at(genes_at[cell], out_genes, n_expressed),
                                  at(expressions_at[cell], out_expressions, n_expressed))
            for i in range(n_expressed):
                if genes[i] >= len(marked):
                    return cell
                out_genes[first + i], out_expressions[first + i] = genes[i], expressions[i]
                marked[genes[i]] = True
            for i in range(first + n_expressed, stop):
                out_expressions[i] = 0
            key = stream(seed, epochs[cell], cell_ids[cell], PURPOSE_UNEXPRESSED)
            _draw(key, gene_ids, marked, out_genes[first + n_expressed:stop])
            for i in range(first, stop):
                marked[out_genes[i]] = False
        return -1

    return fill


@njit(cache=True, nogil=True)
def _draw(key: Word, gene_ids: NDArray[np.int32], marked: NDArray[np.bool_],
          drawn: NDArray[np.unsignedinteger]) -> None:
    """Fill `drawn` with genes that are not marked, each once: by trial where most are free, else by selection."""
    free = 0
    for gene in gene_ids:
        free += not marked[gene]
    if 2 * len(drawn) <= free and 2 * free >= len(gene_ids):
        n = 0
        for i in range(len(drawn)):
            gene = gene_ids[below(key, n, len(gene_ids))]
            while marked[gene]:
                n += 1
                gene = gene_ids[below(key, n, len(gene_ids))]
            n += 1
            marked[gene] = True
            drawn[i] = gene
        return
    n_drawn = 0
    for n in range(len(gene_ids)):
        if not marked[gene_ids[n]]:
            if below(key, n, free) < len(drawn) - n_drawn:
                drawn[n_drawn] = gene_ids[n]
                n_drawn += 1
            free -= 1


_fill = _compiled(digest_of(rng, gather))
