"""PackedBatch: the cells of a micro-batch joined end to end; no padded token exists from here to the attention kernel.

Cell i owns tokens [cu_seqlens[i], cu_seqlens[i + 1]), the layout that variable-length attention kernels take.
"""
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """What one forward pass sees and must predict.

    With `perception_lengths` each cell is [perception | generation], and its generation part is what is hidden.
    """

    gene_ids: NDArray[np.int32]     # (tokens,)     vocabulary ids; `<cls>` opens every cell
    values: NDArray[np.float32]     # (tokens,)     the model's input: `mask_value` where hidden, `cls_value` at `<cls>`
    targets: NDArray[np.float32]    # (tokens,)     the same before masking
    target_mask: NDArray[np.bool_]  # (tokens,)     True = hidden, counted in the loss; never at `<cls>`
    cu_seqlens: NDArray[np.int32]   # (cells + 1,)  starts at 0, ends at tokens
    max_seqlen: int                 # tokens of the longest cell
    cell_ids: NDArray[np.uint64]    # (cells,)
    perception_lengths: NDArray[np.int32] | None = None   # (cells,) `<cls>` included; None: hidden in place
    class_labels: NDArray[np.int32] | None = None         # (cells,) class of a cell, -1: unknown; None: not asked for
    batch_labels: NDArray[np.int32] | None = None         # (cells,) batch or domain of a cell; None: not asked for

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

    def split(self, counts: Sequence[int]) -> list["PackedBatch"]:
        """Batches of the first counts[0] cells, the next counts[1], ..., each 1 or more; tokens are shared."""
        if len(counts) == 1:
            return [self]
        ends = list(itertools.accumulate(counts, initial=0))
        cuts = self.cu_seqlens[ends].tolist()
        longest = np.maximum.reduceat(np.diff(self.cu_seqlens), ends[:-1]).tolist()
        return [self._part(slice(*cells), slice(*tokens), longest_cell) for cells, tokens, longest_cell
                in zip(itertools.pairwise(ends), itertools.pairwise(cuts), longest, strict=True)]

    def _part(self, cells: slice, tokens: slice, max_seqlen: int) -> "PackedBatch":
        return PackedBatch(self.gene_ids[tokens], self.values[tokens], self.targets[tokens], self.target_mask[tokens],
                           self.cu_seqlens[cells.start:cells.stop + 1] - tokens.start, max_seqlen, self.cell_ids[cells],
                           *(None if column is None else column[cells] for column in (
                               self.perception_lengths, self.class_labels, self.batch_labels)))

    def padded(self, pad_id: int, pad_value: float) -> dict[str, NDArray[np.generic]]:
        """Upstream's batch, every row padded at its end to the longest: the keys of its collator.

        Hidden in place: `gene` (cells, max_seqlen) int64; `expr` (the target) and `masked_expr` (the input), the same
        shape, float32. In two parts, each as long as its longest: `pcpt_gene`, `pcpt_expr`, `pcpt_key_padding_mask`
        (bool, True = padding), `gen_gene`, `gen_expr_target`, `gen_key_padding_mask`.
        """
        if self.perception_lengths is None:
            gene, expr, masked_expr = _rows(np.diff(self.cu_seqlens), (self.gene_ids, pad_id, np.int64),
                                            (self.targets, pad_value, np.float32), (self.values, pad_value, np.float32))
            return {"gene": gene, "expr": expr, "masked_expr": masked_expr}
        batch: dict[str, NDArray[np.generic]] = {}
        seen, lengths = ~self.target_mask, self.perception_lengths
        for part, expr_key, tokens, part_lengths in (
            ("pcpt", "pcpt_expr", seen, lengths),
            ("gen", "gen_expr_target", ~seen, np.diff(self.cu_seqlens) - lengths),
        ):
            batch[f"{part}_gene"], batch[expr_key] = _rows(part_lengths, (self.gene_ids[tokens], pad_id, np.int64),
                                                           (self.targets[tokens], pad_value, np.float32))
            longest = part_lengths.max(initial=0)
            batch[f"{part}_key_padding_mask"] = np.arange(longest) >= part_lengths[:, None]
        return batch


def _rows(lengths: NDArray[np.integer],
          *columns: tuple[NDArray[np.generic], float, type[np.generic]]) -> list[NDArray[np.generic]]:
    """Columns of tokens (values, padding, type) as rows of equal length, (cells, longest) each."""
    is_token = np.arange(lengths.max(initial=0)) < lengths[:, None]
    rows = []
    for values, padding, kind in columns:
        row = np.full(is_token.shape, padding, kind)
        row[is_token] = values
        rows.append(row)
    return rows
