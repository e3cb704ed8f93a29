import dataclasses

import numpy as np
import pytest

from scgpt.collate import CollateConfig, collate
from scgpt.collate.binning import bin_cell
from scgpt.data import RaggedBatch
from scgpt.data.schema import offsets_of
from scgpt.errors import ConfigError
from tests.evenness import assert_even
from tests.scgpt.collate.cells import CLS_ID, random_cells

GENES = np.arange(60_000, dtype=np.int32)


def config_of(context_length=128, genes=GENES, **settings):
    return CollateConfig(context_length, gene_ids=genes, **settings)


def few_cells(n_cells, genes):
    """Cells that express the same few genes."""
    counts = np.arange(1, len(genes) + 1, dtype=np.uint16)
    return RaggedBatch(np.tile(np.array(genes, np.uint16), n_cells), np.tile(counts, n_cells),
                       offsets_of(np.full(n_cells, len(genes))), {"cell_id": np.arange(n_cells, dtype=np.uint64)})


def cell_of(batch, cell):
    span = slice(batch.cu_seqlens[cell] + 1, batch.cu_seqlens[cell + 1])
    return batch.gene_ids[span], batch.targets[span], batch.values[span], batch.target_mask[span]


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("task", ["pcpt", "both"])
@pytest.mark.parametrize("style", ["binned", "log1p"])
def test_genes_of_value_0_join_and_the_expressed_ones_keep_their_bins(dtype, task, style):
    cells = random_cells(20, longest=60, dtype=dtype)
    config = config_of(unexpressed_genes=30, task=task, input_style=style, tie_rule="highest")
    batch = collate(cells, config, cls_id=CLS_ID, seed=3, epochs=1)
    np.testing.assert_array_equal(np.diff(batch.cu_seqlens), cells.lengths + 31)
    for cell in range(len(cells)):
        gene_ids, targets, values, hidden = cell_of(batch, cell)
        span = slice(cells.offsets[cell], cells.offsets[cell + 1])
        expressed = np.isin(gene_ids, cells.genes[span])
        assert len(set(gene_ids.tolist())) == len(gene_ids)
        assert np.count_nonzero(~expressed) == 30
        assert (targets[~expressed] == 0).all()
        own = cells.expressions[span]
        wanted = (bin_cell(own, 51, seed=3, epoch=1, cell_id=0, tie_rule="highest") if style == "binned"
                  else np.log1p(own.astype(np.float64)).astype(np.float32))
        bins = dict(zip(cells.genes[span].tolist(), wanted.tolist(), strict=True))
        assert [bins[gene] for gene in gene_ids[expressed].tolist()] == targets[expressed].tolist()
        np.testing.assert_array_equal(values, np.where(hidden, -1, targets))


def test_a_cell_without_any_expressed_gene_has_zeros_alone():
    cells = few_cells(2, [])
    batch = collate(cells, config_of(unexpressed_genes=5), cls_id=CLS_ID, seed=0, epochs=0)
    assert cell_of(batch, 0)[1].tolist() == [0] * 5


@pytest.mark.parametrize("n_unexpressed", [3, 6, 99])   # by trial, by selection, all there are
def test_every_gene_that_is_not_expressed_is_equally_likely(n_unexpressed):
    genes = np.arange(0, 20, 2, dtype=np.int32)
    batch = collate(few_cells(20_000, [4, 10, 18]), config_of(genes=genes, unexpressed_genes=n_unexpressed),
                    cls_id=CLS_ID, seed=1, epochs=0)
    drawn = min(n_unexpressed, 7)
    assert np.diff(batch.cu_seqlens).tolist() == [1 + 3 + drawn] * 20_000
    counts = np.bincount(batch.gene_ids[batch.targets == 0], minlength=20)
    free = [0, 2, 6, 8, 12, 14, 16]
    assert counts.sum() == counts[free].sum() == 20_000 * drawn
    if drawn < len(free):
        assert_even(counts[free], draws=20_000, off=0.06)


def test_with_all_genes_a_long_cell_is_a_uniform_sample_of_the_vocabulary():
    """Upstream's include_zero_gene: expressed or not, a gene has the same chance to stay."""
    genes = np.arange(12, dtype=np.int32)
    batch = collate(few_cells(20_000, [1, 5, 6, 7]), config_of(context_length=7, genes=genes, unexpressed_genes=12),
                    cls_id=CLS_ID, seed=1, epochs=0)
    counts = np.bincount(batch.gene_ids[batch.gene_ids != CLS_ID], minlength=12)
    assert_even(counts, draws=20_000, off=0.06)


def test_draws_depend_on_seed_epoch_and_cell_alone():
    cells, config = random_cells(10, longest=40), config_of(unexpressed_genes=20)
    together = collate(cells, config, cls_id=CLS_ID, seed=1, epochs=2)
    alone = collate(cells.take(np.array([7])), config, cls_id=CLS_ID, seed=1, epochs=2)
    for one, other in zip(cell_of(alone, 0), cell_of(together, 7), strict=True):
        np.testing.assert_array_equal(one, other)
    for seed, epoch in ((2, 2), (1, 3)):
        other = collate(cells, config, cls_id=CLS_ID, seed=seed, epochs=epoch)
        assert (other.gene_ids != together.gene_ids).any()


def test_genes_to_draw_from_must_be_given():
    with pytest.raises(ConfigError, match="which genes there are"):
        collate(few_cells(1, [3]), dataclasses.replace(config_of(unexpressed_genes=1), gene_ids=np.empty(0, np.int32)),
                cls_id=CLS_ID, seed=0, epochs=0)
