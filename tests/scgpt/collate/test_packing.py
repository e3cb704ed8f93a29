import numpy as np

from scgpt.collate import PackedBatch


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
