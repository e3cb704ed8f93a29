"""The contrastive term (CCE): each cell's second view is to be found among those of all cells, on whatever rank.

It is the one term that the number of ranks changes: more ranks, more cells to choose from.
"""
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F  # noqa: N812 torch's own habit

TEMPERATURE = 0.5   # upstream's


class _Gather(torch.autograd.Function):
    """The rows of all ranks, in rank order; each rank's rows get the gradients that all ranks have for them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """(rows, d) -> (rows x ranks, d); as many rows on each rank."""
        ctx.n_rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        """Add up over ranks, take the own rows."""
        total = grad_outputs[0].contiguous().clone()
        distributed.all_reduce(total)
        first = distributed.get_rank() * ctx.n_rows
        return total[first:first + ctx.n_rows]


def contrast_sum(first: Tensor, second: Tensor) -> Tensor:
    """Sum over this rank's cells of the cross entropy of their second views among those of all ranks, ().

    (cells, d_model) twice, as many cells on each rank. Summed over ranks and divided by all cells it is upstream's loss
    (SimCSE: Gao et al., 2021) with its whole gradient; upstream drops the part through other ranks' views.
    """
    everyone, before = second, 0
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        everyone = _Gather.apply(second)  # type: ignore[no-untyped-call]
        before = distributed.get_rank() * len(second)
    cosine = F.cosine_similarity(first.unsqueeze(1), everyone.unsqueeze(0), dim=-1) / TEMPERATURE
    labels = before + torch.arange(len(first), device=first.device)
    return F.cross_entropy(cosine, labels, reduction="sum")
