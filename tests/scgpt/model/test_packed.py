"""PackedTensors: padding and back, the split, moving between devices."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scgpt.model.packed import PackedTensors
from tests.scgpt.model.packs import cells


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_padding_keeps_every_token_in_order(lengths):
    packed = cells(lengths)
    rows, mask = packed.pad(packed.gene_ids)
    assert rows.shape == mask.shape == (len(lengths), max(lengths))
    assert (~mask).sum(1).tolist() == lengths
    assert torch.equal(rows[~mask], packed.gene_ids)
    assert not rows[mask].any()


def test_split_marks_the_first_tokens_of_each_cell():
    packed = cells([3, 1, 4]).split(torch.tensor([2, 1, 0]))
    assert packed.perception_index.tolist() == [0, 1, 3]
    assert packed.cu_perception.tolist() == [0, 2, 3, 3]
    assert packed.max_perception == 2
    assert packed.is_generation.tolist() == [False, False, True, False, True, True, True, True]


@pytest.mark.parametrize(("change", "says"), [
    ({"cu_seqlens": torch.tensor([0, 3, 5])}, "number of tokens"), ({"cu_seqlens": torch.tensor([0, 3, 9])}, "tokens"),
    ({"cu_seqlens": torch.tensor([1, 3, 4])}, "not 1 to 4"), ({"cu_seqlens": torch.tensor([0, 5, 3, 4])}, "step back"),
    ({"cu_seqlens": torch.tensor([0.0, 3.0, 4.0])}, "float32"),
    ({"cu_seqlens": torch.tensor([[0, 3, 4]])}, r"\(1, 3\)"),
    ({"cu_seqlens": torch.tensor([0, 3, 3, 4])}, "no token"), ({"max_seqlen": 2}, "max_seqlen is 2"),
    ({"values": torch.zeros(3)}, "values"), ({"batch_labels": torch.zeros(3, dtype=torch.long)}, "batch_labels"),
    ({"gene_ids": torch.zeros(2, 2, dtype=torch.long)}, "gene_ids"), ({"pert_flags": torch.zeros(3)}, "pert_flags")],
    ids=str)
def test_parts_that_do_not_fit_each_other_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        replace(cells([3, 1]), **change)


def test_boundaries_of_either_integer_dtype_serve():
    packed = cells([3, 1])
    assert replace(packed, cu_seqlens=packed.cu_seqlens.long()).layout().cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("lengths", [[4, 1], [-1, 1], [1]])
def test_a_split_beyond_the_cell_is_refused(lengths):
    with pytest.raises(ValueError, match="perception_lengths"):
        cells([3, 1]).split(torch.tensor(lengths))


def test_moving_keeps_what_is_not_a_tensor():
    packed = cells([3, 2], n_labels=2).split(torch.tensor([1, 2])).to("meta")
    assert packed.gene_ids.is_meta
    assert packed.perception_index.is_meta
    assert (packed.max_seqlen, packed.max_perception) == (3, 2)


def test_layout_without_split_has_every_token_as_key():
    layout = cells([3, 2]).layout()
    assert layout.key_index is None
    assert layout.is_generation is None
    assert torch.equal(layout.cu_keys, layout.cu_seqlens)


def test_no_cells_at_all():
    nothing = PackedTensors(torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(1, dtype=torch.int32), 0)
    assert nothing.n_cells == 0
    assert nothing.split(torch.zeros(0)).max_perception == 0
