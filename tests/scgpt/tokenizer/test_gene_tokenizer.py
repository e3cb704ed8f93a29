"""Upstream's batches for fine-tuning; `tests/scgpt/model/test_stock.py` holds them against the public package."""
import numpy as np
import pytest
import torch

from scgpt.tokenizer import GeneVocab, pad_batch, random_mask_value, tokenize_and_pad_batch, tokenize_batch

VOCAB = GeneVocab([f"g{i}" for i in range(6)], specials=["<pad>", "<cls>"])
GENE_IDS = np.arange(2, 8)
DATA = np.array([[0, 3, 0, 1, 0, 2], [0, 0, 0, 0, 5, 0]], np.float32)


def test_a_row_becomes_its_non_zero_genes_with_cls_in_front():
    tokens = tokenize_batch(DATA, GENE_IDS, cls_id=VOCAB["<cls>"])
    assert [(ids.tolist(), values.tolist(), kind) for ids, values, kind in tokens] == [
        ([1, 3, 5, 7], [0, 3, 1, 2], None), ([1, 6], [0, 5], None)]
    assert tokens[0][0].dtype == torch.int64
    assert tokens[0][1].dtype == torch.float32


def test_zeros_stay_and_cls_does_not_come_where_asked():
    tokens = tokenize_batch(DATA, GENE_IDS, append_cls=False, include_zero_gene=True, return_pt=False)
    assert np.array_equal(np.stack([values for _, values, _ in tokens]), DATA)
    assert all(np.array_equal(ids, GENE_IDS) for ids, _, _ in tokens)


def test_short_cells_are_padded_to_the_longest():
    batch = tokenize_and_pad_batch(DATA, GENE_IDS, 10, VOCAB, "<pad>", -2)
    assert batch["genes"].tolist() == [[1, 3, 5, 7], [1, 6, 0, 0]]
    assert batch["values"].tolist() == [[0, 3, 1, 2], [0, 5, -2, -2]]


@pytest.mark.parametrize("cls_appended", [True, False])
def test_long_cells_are_sampled_without_replacement_and_keep_cls(cls_appended):
    np.random.seed(0)  # noqa: NPY002 upstream's generator
    cell = (torch.arange(1, 31), torch.arange(1.0, 31), None)
    seen = set()
    for _ in range(50):
        batch = pad_batch([cell], 8, VOCAB, cls_appended=cls_appended)
        genes = batch["genes"][0].tolist()
        assert len(set(genes)) == 8
        assert batch["values"][0].tolist() == genes
        seen |= {genes[0]}
    assert (seen == {1}) == cls_appended


def test_modalities_go_along():
    batch = tokenize_and_pad_batch(DATA, GENE_IDS, 10, VOCAB, "<pad>", 0, mod_type=np.array([0, 0, 0, 1, 1, 1]),
                                   vocab_mod={"<pad>": 2, "<cls>": 3})
    assert batch["mod_types"].tolist() == [[3, 0, 1, 1], [3, 1, 2, 2]]


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_a_share_of_each_row_is_masked_padding_never_and_the_input_is_left_as_it_was(kind):
    np.random.seed(0)  # noqa: NPY002
    values = kind(np.array([[0.0, 1, 2, 3, 4, 5], [0, 1, 2, -2, -2, -2]]))
    before = torch.as_tensor(values).clone()
    masked = random_mask_value(values, mask_ratio=0.5, pad_value=-2)
    assert (masked == -1).sum(1).tolist() == [3, 1]
    assert (masked[1, 3:] == -2).all()
    assert masked.dtype == torch.float32
    assert torch.equal(torch.as_tensor(values), before)


@pytest.mark.parametrize("columns", [{"gene_ids": GENE_IDS[1:]}, {"gene_ids": GENE_IDS, "mod_type": GENE_IDS[1:]}])
def test_columns_without_an_entry_are_refused(columns):
    with pytest.raises(ValueError, match="6 genes"):
        tokenize_batch(DATA, **columns)
