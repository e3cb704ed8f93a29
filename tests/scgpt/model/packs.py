"""Small batches for the tests of the model: the same cells packed and padded; attention as a dense masked softmax."""
from collections.abc import Sequence

import torch
from torch import Tensor

from scgpt.model.packed import PackedTensors

PAD_ID, CLS_ID, N_TOKENS, PAD_VALUE = 0, 1, 60, -2
VOCAB = {"<pad>": PAD_ID, "<cls>": CLS_ID, **{f"g{i}": i for i in range(2, N_TOKENS)}}


def cells(lengths: Sequence[int], *, seed: int = 0, dtype: torch.dtype = torch.float64, n_labels: int = 0,
          values: str = "bins") -> PackedTensors:
    """Random cells of the given lengths, `<cls>` first, whole-number values."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    n_tokens = int(cu_seqlens[-1])
    genes = torch.randint(2, N_TOKENS, (n_tokens,), generator=generator)
    genes[cu_seqlens[:-1].long()] = CLS_ID
    drawn = torch.randint(0 if values == "bins" else 1, 9, (n_tokens,), generator=generator).to(dtype)
    labels = torch.randint(n_labels, (len(lengths),), generator=generator) if n_labels else None
    flags = torch.randint(2, (n_tokens,), generator=generator)
    return PackedTensors(genes, drawn, cu_seqlens, max(lengths), batch_labels=labels, pert_flags=flags)


def padded(packed: PackedTensors, pad_value: float = PAD_VALUE) -> tuple[Tensor, Tensor, Tensor]:
    """The same cells as genes, values, mask (True = padding), each (cells, max_seqlen)."""
    genes, mask = packed.pad(packed.gene_ids)
    values, _ = packed.pad(packed.values)
    return genes.masked_fill(mask, PAD_ID), values.masked_fill(mask, pad_value), mask


def sees(packed: PackedTensors) -> Tensor:
    """(tokens, tokens) bool: whether row attends to column, written out token by token."""
    cell = packed.cell_index.tolist()
    generation = packed.is_generation
    generates = [False] * len(cell) if generation is None else generation.tolist()
    return torch.tensor([[cell[i] == cell[j] and (not generates[j] or i == j) for j in range(len(cell))]
                         for i in range(len(cell))])


def dense_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention (tokens, heads, head_size) with a dense mask; a row without keys gives zeros."""
    logits = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~allowed, -torch.inf)
    probabilities = logits.softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", probabilities, v)
