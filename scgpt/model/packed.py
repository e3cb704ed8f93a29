"""PackedTensors: the cells of a batch joined end to end, as the models and their attention take them.

Cell i owns tokens [cu_seqlens[i], cu_seqlens[i + 1]); `<cls>` opens every cell, so no cell is empty. For generative
training each cell is [perception | generation]: its first tokens have values, the rest are to be generated.
"""
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from scgpt.model.attention import PackedLayout, check_cells


@dataclass(frozen=True, slots=True)
class PackedTensors:
    """Model input without a padded token. Shapes: `tokens` of all cells together, `keys` perception tokens."""

    gene_ids: Tensor                        # (tokens,) int64, vocabulary ids
    values: Tensor                          # (tokens,) float32, model inputs; not read at generation tokens
    cu_seqlens: Tensor                      # (cells + 1,) int32, starts at 0, ends at tokens
    max_seqlen: int                         # tokens of the longest cell
    batch_labels: Tensor | None = None      # (cells,) int64
    cu_perception: Tensor | None = None     # (cells + 1,) int32, over perception tokens only
    max_perception: int = 0                 # perception tokens of the longest perception part
    perception_index: Tensor | None = None  # (keys,) int64, which tokens are perception, ascending
    pert_flags: Tensor | None = None        # (tokens,) int64: 0, 1 perturbed, 2 padding; for TransformerGenerator

    def __post_init__(self) -> None:
        """Refuse what attention would read past, or mix up, with ValueError."""
        n_tokens = self.gene_ids.numel()
        check_cells(self.cu_seqlens, self.max_seqlen, n_tokens)
        for name, tensor, count in (("gene_ids", self.gene_ids, n_tokens), ("values", self.values, n_tokens),
                                    ("pert_flags", self.pert_flags, n_tokens),
                                    ("batch_labels", self.batch_labels, self.n_cells)):
            if tensor is not None and tensor.shape != (count,):
                raise ValueError(f"{name} must have the shape ({count},) for {n_tokens} tokens in {self.n_cells} cells,"
                                 f" not {tuple(tensor.shape)}")
        if self.cu_seqlens.device.type == "cpu" and not bool(self.cu_seqlens.diff().all()):
            raise ValueError("a cell has no token: `<cls>` opens every cell")

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedTensors":
        """A copy on `device` (or self's tensors, where they are there already)."""
        moved: dict[str, Any] = {field.name: value.to(device, non_blocking=non_blocking) for field in fields(self)
                 if isinstance(value := getattr(self, field.name), Tensor)}
        return replace(self, **moved)

    def split(self, perception_lengths: Tensor) -> "PackedTensors":
        """For generative training: the first `perception_lengths` (cells,) tokens of each cell are perception.

        Call it on the CPU, before `to`: the number of perception tokens is read.
        """
        if perception_lengths.shape != (self.n_cells,):
            raise ValueError(f"perception_lengths must be ({self.n_cells},), not {tuple(perception_lengths.shape)}")
        lengths = perception_lengths.to(torch.int32)
        if bool((lengths > self.cu_seqlens.diff()).any()) or bool((lengths < 0).any()):
            raise ValueError("perception_lengths must be between 0 and the number of tokens of each cell")
        starts = self.cu_seqlens[:-1]
        within = torch.arange(len(self.gene_ids), dtype=torch.int32, device=starts.device) - starts[self.cell_index]
        return replace(self, cu_perception=torch.nn.functional.pad(lengths.cumsum(0).to(torch.int32), (1, 0)),
                       max_perception=int(lengths.max()) if len(lengths) else 0,
                       perception_index=(within < lengths[self.cell_index]).nonzero().squeeze(1))

    @property
    def n_cells(self) -> int:
        """Cells of the batch."""
        return len(self.cu_seqlens) - 1

    @property
    def cell_index(self) -> Tensor:
        """(tokens,) int64: the cell of each token; computed on the tokens' device, without synchronisation."""
        cells = torch.arange(self.n_cells, device=self.cu_seqlens.device)
        return cells.repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.gene_ids))

    @property
    def is_generation(self) -> Tensor | None:
        """(tokens,) bool; None without a generation part."""
        if self.perception_index is None:
            return None
        mask = torch.ones(len(self.gene_ids), dtype=torch.bool, device=self.gene_ids.device)
        return mask.index_fill_(0, self.perception_index, value=False)

    def layout(self) -> PackedLayout:
        """Who attends to whom."""
        longest, cu_seqlens = torch.tensor(self.max_seqlen), self.cu_seqlens.int()
        if self.cu_perception is None:
            return PackedLayout(cu_seqlens, longest, cu_seqlens, longest)
        return PackedLayout(cu_seqlens, longest, self.cu_perception, torch.tensor(self.max_perception),
                            self.perception_index, self.is_generation)

    def pad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, ...) -> (cells, max_seqlen, ...) with zeros at padding, and the padding mask (cells, max_seqlen)."""
        cell = self.cell_index
        place = torch.arange(len(cell), device=cell.device) - self.cu_seqlens[:-1].long()[cell]
        padded = x.new_zeros(self.n_cells, self.max_seqlen, *x.shape[1:]).index_put((cell, place), x)
        columns = torch.arange(self.max_seqlen, device=cell.device)
        return padded, columns >= self.cu_seqlens.diff().unsqueeze(1)
