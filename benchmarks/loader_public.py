"""The public DataCollator's method (scgpt 0.2.4), written plainly: a torch tensor a cell, NumPy for its bins.

Stands in where the package is not at hand: each cell is binned by its own quantiles, sampled to the context and padded,
the batch stacked and masked. Steps, their order and what they run on are the package's.
"""
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

N_BINS, MASK_RATIO, PAD_VALUE, MASK_VALUE = 51, 0.4, -2.0, -1.0


class PublicCollator:
    """Examples {"genes", "expressions"}, `<cls>` first, to `gene`, `expr` and `masked_expr`, (cells, longest) each."""

    def __init__(self, pad_id: int, context: int) -> None:
        self._pad_id, self._context = pad_id, context

    def __call__(self, examples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
        """One batch."""
        length = min(self._context, max(len(example["genes"]) for example in examples))
        genes, expressions = [], []
        for example in examples:
            values = example["expressions"].clone()
            values[1:] = binned(values[1:])
            ids = example["genes"]
            if len(ids) > length:
                kept = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(len(ids) - 1)[:length - 1] + 1])
                ids, values = ids[kept], values[kept]
            room = length - len(ids)
            genes.append(torch.cat([ids, torch.full((room,), self._pad_id, dtype=ids.dtype)]))
            expressions.append(torch.cat([values, torch.full((room,), PAD_VALUE)]))
        expr = torch.stack(expressions)
        chances = torch.full(expr.shape, MASK_RATIO)
        chances[expr == PAD_VALUE] = 0
        chances[:, :1] = 0
        hidden = torch.bernoulli(chances).bool()
        return {"gene": torch.stack(genes), "expr": expr, "masked_expr": expr.masked_fill(hidden, MASK_VALUE)}


def binned(values: torch.Tensor) -> torch.Tensor:
    """Quantile bins of the values of one cell, ties drawn evenly; (values,) float32."""
    row = values.numpy()
    if not len(row):
        return values
    edges = np.quantile(row, np.linspace(0, 1, N_BINS - 1))
    upto, below = np.digitize(row, edges), np.digitize(row, edges, right=True)
    bins = np.ceil(np.random.default_rng().random(len(row)) * (below - upto) + upto)
    return torch.from_numpy(bins.astype(np.float32))
