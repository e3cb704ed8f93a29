"""PackedBatch: the cells of a micro-batch joined end to end; no padded token exists from here to the attention kernel.

Cell i owns tokens [cu_seqlens[i], cu_seqlens[i + 1]), the layout that variable-length attention kernels take.
"""
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """What one forward pass sees and must predict."""

    gene_ids: NDArray[np.int32]     # (tokens,)     vocabulary ids; `<cls>` opens every cell
    values: NDArray[np.float32]     # (tokens,)     the model's input: `mask_value` where hidden, `cls_value` at `<cls>`
    targets: NDArray[np.float32]    # (tokens,)     the same before masking
    target_mask: NDArray[np.bool_]  # (tokens,)     True = hidden, counted in the loss; never at `<cls>`
    cu_seqlens: NDArray[np.int32]   # (cells + 1,)  starts at 0, ends at tokens
    max_seqlen: int                 # tokens of the longest cell
    cell_ids: NDArray[np.uint64]    # (cells,)

    def __len__(self) -> int:
        return len(self.cell_ids)

    @property
    def n_tokens(self) -> int:
        """Tokens of all cells, `<cls>` included."""
        return len(self.gene_ids)

    @property
    def n_targets(self) -> int:
        """Positions that count in the loss."""
        return int(np.count_nonzero(self.target_mask))

    def padded(self, pad_id: int, pad_value: float) -> dict[str, NDArray[np.generic]]:
        """Upstream's batch, every cell padded at its end to `max_seqlen`: the keys of its collator.

        `gene` (cells, max_seqlen) int64; `expr` (the target) and `masked_expr` (the input), the same shape, float32.
        """
        lengths = np.diff(self.cu_seqlens)
        is_token = np.arange(self.max_seqlen) < lengths[:, None]
        gene = np.full(is_token.shape, pad_id, np.int64)
        expr = np.full(is_token.shape, pad_value, np.float32)
        masked_expr = expr.copy()
        gene[is_token], expr[is_token], masked_expr[is_token] = self.gene_ids, self.targets, self.values
        return {"gene": gene, "expr": expr, "masked_expr": masked_expr}
