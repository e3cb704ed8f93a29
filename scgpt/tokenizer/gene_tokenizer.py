"""Upstream's batches for fine-tuning: rows of a cells x genes matrix -> ids and values, padded, some masked.

Draws come from NumPy's global generator in upstream's order, so `numpy.random.seed` gives upstream's batches. Our own
training collates in `scgpt.collate`. The vocabulary of this import path lives in `scgpt.vocab`. torch is imported when
tensors are made.
"""
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scgpt.vocab import CLS, PAD, GeneVocab

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GeneVocab", "pad_batch", "random_mask_value", "tokenize_and_pad_batch", "tokenize_batch"]

Row = NDArray[Any]
Tokens = tuple[Any, Any, Any]  # ids (n,), values (n,), modality ids (n,) or None; tensors or arrays


def tokenize_batch(data: Row, gene_ids: Row, return_pt: bool = True, append_cls: bool = True,  # noqa: FBT001, FBT002 upstream
                   include_zero_gene: bool = False, cls_id: int | str = CLS, mod_type: Row | None = None,  # noqa: FBT001, FBT002 upstream
                   cls_id_mod_type: int | None = None) -> list[Tokens]:
    """The non-zero genes of each row: (ids, values, modality ids or None).

    Args:
        data: (cells, genes).
        gene_ids: (genes,) vocabulary ids of the columns.
        return_pt: int64, float32 and int64 tensors; False: arrays of the given dtypes.
        append_cls: put `cls_id` in front, with value 0.
        include_zero_gene: all genes of every row.
        cls_id: vocabulary id of `<cls>`.
        mod_type: (genes,) modality ids of the columns.
        cls_id_mod_type: modality id of `<cls>`.

    Raises ValueError when `gene_ids` or `mod_type` lack entries for columns, or `cls_id_mod_type` is missing.
    """
    for name, columns in (("gene_ids", gene_ids), ("mod_type", mod_type)):
        if columns is not None and len(columns) != data.shape[1]:
            raise ValueError(f"data has {data.shape[1]} genes, {name} has {len(columns)} entries")
    if mod_type is not None and append_cls and cls_id_mod_type is None:
        raise ValueError("mod_type with append_cls needs cls_id_mod_type, the modality id of <cls>")
    batch = []
    for row in data:
        chosen = slice(None) if include_zero_gene else np.flatnonzero(row)
        ids, values = np.asarray(gene_ids)[chosen], row[chosen]
        modalities = None if mod_type is None else mod_type[chosen]
        if append_cls:
            ids, values = np.insert(ids, 0, cls_id), np.insert(values, 0, 0)
            modalities = None if modalities is None else np.insert(modalities, 0, cls_id_mod_type or 0)
        batch.append(_tensors(ids, values, modalities) if return_pt else (ids, values, modalities))
    return batch


def _tensors(ids: Row, values: Row, modalities: Row | None) -> Tokens:
    import torch

    return (torch.as_tensor(ids).long(), torch.as_tensor(values).float(),
            None if modalities is None else torch.as_tensor(modalities).long())


def pad_batch(batch: Sequence[Tokens], max_len: int, vocab: Mapping[str, int], pad_token: str = PAD,
              pad_value: int = 0, cls_appended: bool = True,  # noqa: FBT001, FBT002 upstream
              vocab_mod: Mapping[str, int] | None = None) -> dict[str, "Tensor"]:
    """Rows of one length: {"genes", "values"} and, with modalities, "mod_types", each (cells, length).

    Args:
        batch: what `tokenize_batch` gives.
        max_len: a longer cell is sampled without replacement; shorter ones are padded to the longest.
        vocab: holds `pad_token`.
        pad_token: its id fills up the genes.
        pad_value: fills up the values.
        cls_appended: the first token is kept when a cell is sampled.
        vocab_mod: the same for modality ids.
    """
    import torch

    length = min(max(len(tokens[0]) for tokens in batch), max_len)
    fill = (vocab[pad_token], pad_value, None if vocab_mod is None else vocab_mod[pad_token])
    rows: list[list[Tensor]] = []
    for tokens in batch:
        chosen = _sampled(len(tokens[0]), length, keep=int(cls_appended))
        parts = [torch.as_tensor(x)[chosen] for x in tokens if x is not None]
        rows.append([torch.nn.functional.pad(x, (0, length - len(x)), value=value)
                     for x, value in zip(parts, fill, strict=False)])
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    return dict(zip(("genes", "values", "mod_types"), stacked, strict=False))


def _sampled(n_tokens: int, length: int, *, keep: int) -> slice | NDArray[np.int64]:
    """Which tokens stay: all, or the first `keep` and a draw of the others."""
    if n_tokens <= length:
        return slice(None)
    drawn = np.random.choice(n_tokens - keep, length - keep, replace=False) + keep  # noqa: NPY002 upstream's generator
    return np.concatenate([np.arange(keep), drawn])


def tokenize_and_pad_batch(data: Row, gene_ids: Row, max_len: int, vocab: Mapping[str, int], pad_token: str,
                           pad_value: int, append_cls: bool = True, include_zero_gene: bool = False,  # noqa: FBT001, FBT002 upstream
                           cls_token: str = CLS, return_pt: bool = True, mod_type: Row | None = None,  # noqa: FBT001, FBT002 upstream
                           vocab_mod: Mapping[str, int] | None = None) -> dict[str, "Tensor"]:
    """`tokenize_batch`, then `pad_batch`; `cls_token` is looked up in both vocabularies."""
    cls_id_mod_type = None if mod_type is None or vocab_mod is None else vocab_mod[cls_token]
    batch = tokenize_batch(data, gene_ids, return_pt=return_pt, append_cls=append_cls,
                           include_zero_gene=include_zero_gene, cls_id=vocab[cls_token], mod_type=mod_type,
                           cls_id_mod_type=cls_id_mod_type)
    return pad_batch(batch, max_len, vocab, pad_token, pad_value, cls_appended=append_cls, vocab_mod=vocab_mod)


def random_mask_value(values: "Tensor | Row", mask_ratio: float = 0.15, mask_value: int = -1,
                      pad_value: int = 0) -> "Tensor":
    """A float32 copy of `values` (cells, length) with `mask_value` at a random share of each row's tokens.

    int(tokens x `mask_ratio`) of a row's tokens are masked; a value that equals `pad_value` is no token. `<cls>` is one
    where its value differs, as upstream.
    """
    import torch

    masked = np.copy(values if isinstance(values, np.ndarray) else values.detach().cpu().numpy())
    for row in masked:
        tokens = np.flatnonzero(row - pad_value)
        row[np.random.choice(tokens, int(len(tokens) * mask_ratio), replace=False)] = mask_value  # noqa: NPY002
    return torch.from_numpy(masked).float()
