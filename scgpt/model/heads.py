"""What both models read from the hidden vectors of a batch: pooled cells, expression, MVC, ECS, CCE, samples.

Works on padded (batch, seq, d_model) and packed (tokens, d_model) vectors alike; a packed batch may ask for some
positions only.
"""
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn import functional as F  # noqa: N812 torch's own habit

from scgpt.model.decoders import MVCDecoder
from scgpt.model.packed import PackedTensors

POOLING_STYLES = ("cls", "avg-pool", "w-pool")


class Hidden(NamedTuple):
    """The encoder's output and what stands beside it."""

    output: Tensor                     # (batch, seq, d_model) or (tokens, d_model)
    gene_embs: Tensor                  # the same shape: the gene encoder's output
    packed: PackedTensors | None       # the packed batch; None for padded input
    chosen: "Chosen | None" = None     # where `output` holds some tokens only: which

    def at(self, positions: Tensor | None) -> "Hidden":
        """The chosen tokens of a packed batch (all where `positions` is None)."""
        if positions is None:
            return self
        if self.packed is None:
            raise ValueError("positions are indices of packed tokens: padded input computes every position")
        rows = positions if self.chosen is None else self.chosen.positions
        return Hidden(self.output.index_select(0, rows), self.gene_embs.index_select(0, positions), self.packed)

    def pooled(self, style: str, weights: Tensor | None) -> Tensor:
        """Cell embeddings, see `pool`."""
        if self.chosen is not None:   # then the style is "cls"
            return self.output.index_select(0, self.chosen.cells)
        return pool(self.output, style, weights, self.packed)


class Chosen(NamedTuple):
    """The tokens that are read after the last layer: the first of each cell, and the positions asked for."""

    tokens: Tensor      # (chosen,) int64, ascending, each once
    cells: Tensor       # (cells,) int64: where in `tokens` each cell's first token is
    positions: Tensor   # (positions,) int64: where each position is

    @classmethod
    def of(cls, packed: PackedTensors, positions: Tensor) -> "Chosen":
        """Of a packed batch; positions in any order, also twice, on its device.

        A GPU is waited for once: how many tokens there are decides shapes, and a cell with more queries than tokens
        would lie beyond the bound that kernels are given.
        """
        tokens, places = torch.cat([packed.cu_seqlens[:-1].long(), positions]).unique(return_inverse=True)
        return cls(tokens, places[:packed.n_cells], places[packed.n_cells:])


def spread(cells: Tensor, hidden: Hidden, positions: Tensor | None = None) -> Tensor:
    """One vector a cell (cells, d) beside each of its tokens: (batch, seq, d), or (tokens or positions, d) packed."""
    if hidden.packed is None:
        return cells.unsqueeze(1).expand(-1, hidden.output.shape[1], -1)
    index = hidden.packed.cell_index
    return cells.index_select(0, index if positions is None else index.index_select(0, positions))


def pool(output: Tensor, style: str, weights: Tensor | None, packed: PackedTensors | None) -> Tensor:
    """Cell embeddings (cells, d_model) of hidden vectors, by one of POOLING_STYLES.

    "cls" takes the first token. "avg-pool" is the mean: over all positions of a padded row, padding included, over the
    real tokens of a packed cell. "w-pool" adds up the vectors times `weights` and normalises (L2).
    """
    if style == "cls":
        return output[:, 0, :] if packed is None else output.index_select(0, packed.cu_seqlens[:-1])
    if style == "avg-pool":
        if packed is None:
            return output.mean(1)
        lengths = packed.cu_seqlens.diff().clamp(min=1).unsqueeze(1).to(output.dtype)
        return _sum_cells(output, packed) / lengths
    if weights is None:
        raise ValueError("cell_emb_style='w-pool' needs weights: the values of the tokens")
    if weights.shape != output.shape[:-1]:
        raise ValueError(f"weights have the shape {tuple(weights.shape)}, the tokens {tuple(output.shape[:-1])}")
    weighted = output * weights.unsqueeze(-1)
    return F.normalize(weighted.sum(1) if packed is None else _sum_cells(weighted, packed), p=2.0, dim=1)


def _sum_cells(x: Tensor, packed: PackedTensors) -> Tensor:
    return x.new_zeros(packed.n_cells, x.shape[1]).index_add(0, packed.cell_index, x)


def mean_nonzero(values: Tensor, packed: PackedTensors) -> Tensor:
    """Mean of the non-zero values of each token's cell: (tokens,) -> (tokens,); 0 where there are none."""
    both = torch.stack([values, (values != 0).to(values.dtype)], 1)
    sums = _sum_cells(both, packed)
    return (sums[:, 0] / sums[:, 1].clamp(min=1)).index_select(0, packed.cell_index)


def decode_mvc(decoder: MVCDecoder, cells: Tensor, hidden: Hidden, positions: Tensor | None) -> dict[str, Tensor]:
    """Expression from the cell: {"pred"} and maybe {"zero_probs"}, whatever the decoder's style returns."""
    if hidden.packed is not None:
        cells = spread(cells, hidden, positions)
    output = decoder(cells, hidden.at(positions).gene_embs)
    return output if isinstance(output, dict) else {"pred": output}


def sampled(decoded: dict[str, Tensor], *, do_sample: bool) -> Tensor:
    """The prediction; with `do_sample` and zero probabilities each value is kept with its probability, else 0."""
    if not do_sample or "zero_probs" not in decoded:
        return decoded["pred"]
    return torch.bernoulli(decoded["zero_probs"].detach()) * decoded["pred"]


def gather_cells(cells: Tensor) -> Tensor:
    """The cell embeddings of all ranks, in rank order; only this rank's carry a gradient. (cells x ranks, d_model)."""
    parts = [torch.zeros_like(cells) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, cells.contiguous())
    parts[distributed.get_rank()] = cells
    return torch.cat(parts)
