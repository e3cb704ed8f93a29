import numpy as np
import pytest

from scgpt.collate import CollateConfig, PackedBatch, collate
from tests.scgpt.collate.cells import CLS_ID, random_cells


def test_the_padded_view_holds_upstreams_keys_padded_at_the_end():
    batch = PackedBatch(
        gene_ids=np.array([9, 3, 4, 9, 5], np.int32), values=np.array([-2, 7, -1, -2, -1], np.float32),
        targets=np.array([-2, 7, 8, -2, 2], np.float32), target_mask=np.array([0, 0, 1, 0, 1], bool),
        cu_seqlens=np.array([0, 3, 5], np.int32), max_seqlen=3, cell_ids=np.array([1, 2], np.uint64))
    padded = batch.padded(pad_id=0, pad_value=-2)
    assert padded["gene"].tolist() == [[9, 3, 4], [9, 5, 0]]
    assert padded["expr"].tolist() == [[-2, 7, 8], [-2, 2, -2]]
    assert padded["masked_expr"].tolist() == [[-2, 7, -1], [-2, -1, -2]]
    assert padded["gene"].dtype == np.int64
    assert (len(batch), batch.n_tokens, batch.n_targets) == (2, 5, 2)


def test_the_padded_view_of_a_cell_in_two_parts_has_upstreams_keys_each_part_padded_at_its_end():
    batch = PackedBatch(
        gene_ids=np.array([9, 3, 4, 6, 9, 5, 7], np.int32), values=np.array([-2, 7, -1, -1, -2, 3, -1], np.float32),
        targets=np.array([-2, 7, 8, 2, -2, 3, 4], np.float32), target_mask=np.array([0, 0, 1, 1, 0, 0, 1], bool),
        cu_seqlens=np.array([0, 4, 7], np.int32), max_seqlen=4, cell_ids=np.array([1, 2], np.uint64),
        perception_lengths=np.array([2, 2], np.int32))
    padded = batch.padded(pad_id=0, pad_value=-2)
    assert {name: array.tolist() for name, array in padded.items()} == {
        "pcpt_gene": [[9, 3], [9, 5]], "pcpt_expr": [[-2, 7], [-2, 3]],
        "pcpt_key_padding_mask": [[False, False], [False, False]], "gen_gene": [[4, 6], [7, 0]],
        "gen_expr_target": [[8, 2], [4, -2]], "gen_key_padding_mask": [[False, False], [False, True]]}
    assert padded["gen_gene"].dtype == np.int64


@pytest.mark.parametrize("task", ["pcpt", "gen"])
def test_the_parts_of_a_batch_are_the_batches_of_their_cells(task):
    cells, config = random_cells(12, longest=60), CollateConfig(40, task=task)
    whole = collate(cells, config, cls_id=CLS_ID, seed=2, epochs=0)
    parts = whole.split([5, 1, 6])
    for part, span in zip(parts, [range(5), range(5, 6), range(6, 12)], strict=True):
        alone = collate(cells.take(np.array(span, np.int64)), config, cls_id=CLS_ID, seed=2, epochs=0)
        for name in ("gene_ids", "values", "targets", "target_mask", "cu_seqlens", "cell_ids", "perception_lengths"):
            one, other = getattr(part, name), getattr(alone, name)
            np.testing.assert_array_equal(one, other)
            assert getattr(one, "dtype", None) == getattr(other, "dtype", None)
        assert part.max_seqlen == alone.max_seqlen
