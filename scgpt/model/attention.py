"""Attention within cells, behind one function: backends are chosen by device, dtype and dropout, or by name.

Two custom operators hide the choice and everything whose shape depends on the data (lengths, padding, empty cells), so
a compiled layer holds one opaque call and needs no new compilation for new lengths. Price: the backward cannot be
differentiated again. Rejected: FlexAttention (a block mask for every batch costs more than the attention) and nested
tensors (20x slower on a CPU).

The generative rule needs no mask: every query attends to the perception keys of its cell in one rectangular unmasked
attention, and a generation query's own key is merged afterwards (`scgpt.model.own_key`).
"""
import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from scgpt.errors import ConfigError
from scgpt.model import own_key
from scgpt.model.attention_kernels import (
    Kernel,
    MathKernel,
    Saved,
    SdpaKernel,
    Segments,
    lse_dtype,
)
from scgpt.model.flash_kernels import FLASH_KERNELS

# In the order of preference. "reference" computes in float64 and is only ever chosen by name.
_IN_ORDER: tuple[Kernel, ...] = (*FLASH_KERNELS, SdpaKernel(), MathKernel("math"),
                                 MathKernel("reference", torch.float64))
KERNELS = {kernel.name: kernel for kernel in _IN_ORDER}
BACKENDS = ("auto", "flash", *KERNELS)


class PackedLayout(NamedTuple):
    """Which tokens attend to which, for cells joined end to end.

    With `is_generation`, each cell is [perception | generation], keys are the perception tokens only, and a generation
    token also sees itself; without, the keys are the cell's tokens. The maxima are CPU scalars, so that torch.compile
    does not specialise on them.
    """

    cu_seqlens: Tensor               # (cells + 1,) int32
    max_seqlen: Tensor               # () int64, CPU
    cu_keys: Tensor                  # (cells + 1,) int32
    max_keys: Tensor                 # () int64, CPU
    key_index: Tensor | None = None      # (keys,) int64: which tokens are keys; None: all
    is_generation: Tensor | None = None  # (tokens,) bool
    query_index: Tensor | None = None    # (queries,) int64, ascending: which tokens attend; None: all

    def of_queries(self, index: Tensor) -> "PackedLayout":
        """The layout in which only the tokens `index` (queries,), ascending and distinct, attend: others are keys."""
        bounds = torch.searchsorted(index, self.cu_seqlens.to(index.dtype)).to(self.cu_seqlens.dtype)
        return self._replace(cu_seqlens=bounds, query_index=index)   # max_seqlen bounds them still


def check_cells(cu_seqlens: Tensor, max_seqlen: int, n_tokens: int) -> None:
    """Refuse boundaries that kernels would read past: ValueError. Values are read on a CPU only, where that is free.

    Args:
        cu_seqlens: must be (cells + 1,) int32 or int64, from 0 to `n_tokens` without descending.
        max_seqlen: must not be below the longest cell.
        n_tokens: tokens of all cells.
    """
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be (cells + 1,) int32, not {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lengths = cu_seqlens.diff()
    first, last, shortest = int(cu_seqlens[0]), int(cu_seqlens[-1]), int(lengths.min()) if len(lengths) else 0
    if first != 0 or last != n_tokens or shortest < 0:
        raise ValueError(f"cu_seqlens must ascend from 0 to the number of tokens, {n_tokens}, not {first} to {last}"
                         + (" with a step back" if shortest < 0 else ""))
    if len(lengths) and int(lengths.max()) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but a cell has {int(lengths.max())} tokens")


class PaddedLayout(NamedTuple):
    """The same for rows of equal length. A token that is neither key nor generation is padding."""

    is_key: Tensor                       # (batch, seq) bool
    is_generation: Tensor | None = None  # (batch, seq) bool


def explain_backends(device: torch.device, dtype: torch.dtype, head_size: int,
                     dropout_p: float = 0.0) -> dict[str, str | None]:
    """Backend -> why it cannot attend so, None where it can; the first None is what "auto" takes."""
    return {name: kernel.refusal(device, dtype, head_size, dropout_p) for name, kernel in KERNELS.items()}


@functools.cache
def choose_backend(device: torch.device, dtype: torch.dtype, head_size: int, dropout_p: float = 0.0,
                   requested: str = "auto") -> str:
    """Name of the kernel that will attend: the first of KERNELS that can, or the one asked for.

    "flash" asks for the first flash kernel that can. Raises ConfigError with the reasons when none can.
    """
    if requested not in BACKENDS:
        raise ConfigError(f"there is no attention backend '{requested}'", fix=f"choose one of: {', '.join(BACKENDS)}")
    groups = {"auto": tuple(KERNELS), "flash": tuple(kernel.name for kernel in FLASH_KERNELS)}
    reasons = explain_backends(device, dtype, head_size, dropout_p)
    candidates = groups.get(requested, (requested,))
    for name in candidates:
        if reasons[name] is None:
            return name
    raise ConfigError(f"attention backend '{requested}' cannot be used here "
                      f"({'; '.join(f'{name}: {reasons[name]}' for name in candidates)})",
                      fix="choose 'auto', or attention_dropout 0 if it is the dropout")


def _kernel(q: Tensor, dropout_p: float, requested: str) -> Kernel:
    return KERNELS[choose_backend(q.device, q.dtype, q.shape[-1], dropout_p, requested)]


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | Tensor, *,
                     dropout_p: float = 0.0, backend: str = "auto", deterministic: bool = False) -> Tensor:
    """Each token attends to all tokens of its cell: q, k, v and result are (tokens, heads, head_size).

    Args:
        q: queries; k, v likewise.
        k: keys.
        v: values.
        cu_seqlens: (cells + 1,) int32; cell i owns rows [cu_seqlens[i], cu_seqlens[i + 1]).
        max_seqlen: tokens of the longest cell.
        dropout_p: share of attention probabilities dropped.
        backend: one of BACKENDS.
        deterministic: ask the kernel for a deterministic backward.

    Raises ValueError when shapes, dtypes or boundaries do not fit each other.
    """
    alike = q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
    if not alike or q.dim() != 3 or not q.dtype.is_floating_point:
        told = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, v))
        raise ValueError(f"q, k and v must be (tokens, heads, head_size) of one shape and floating dtype, not {told}")
    check_cells(cu_seqlens, int(max_seqlen), len(q))
    longest = torch.as_tensor(max_seqlen, dtype=torch.int64)
    cu_seqlens = cu_seqlens.int()  # what flash kernels take
    layout = PackedLayout(cu_seqlens, longest, cu_seqlens, longest)
    return attend(q, k, v, layout, dropout_p=dropout_p, backend=backend, deterministic=deterministic)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout | PaddedLayout, *, dropout_p: float = 0.0,
           backend: str = "auto", deterministic: bool = False, all_queries: bool = False) -> Tensor:
    """Attention by the rule of `layout`: (tokens, heads, head_size) packed, (batch, seq, heads, head_size) padded.

    At padding the result is zero, as the flash kernels leave it; with `all_queries` padding attends too, as torch's own
    layer lets it.
    """
    seed = torch.randint(2**62, ()) if dropout_p > 0 else torch.zeros((), dtype=torch.int64)
    if isinstance(layout, PaddedLayout):
        return _first(_padded(q, k, v, layout.is_key, layout.is_generation, seed, all_queries, dropout_p,
                              backend, deterministic))
    keys, values = k, v
    if layout.key_index is not None:
        keys, values = k.index_select(0, layout.key_index), v.index_select(0, layout.key_index)
    own = (None, None) if layout.is_generation is None else (k, v)
    return _first(_packed(q, keys, values, *own, layout.is_generation, layout.cu_seqlens, layout.cu_keys,
                          layout.max_seqlen, layout.max_keys, seed, dropout_p, backend, deterministic))


def _first(outputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return outputs[0]


@torch.library.custom_op("scgpt::packed_attention", mutates_args=())
def _packed(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None, is_own: Tensor | None,
            cu_q: Tensor, cu_k: Tensor, max_q: Tensor, max_k: Tensor, seed: Tensor, dropout_p: float, backend: str,
            deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:  # noqa: FBT001 an operator has no keyword-only arguments
    cells = Segments(cu_q, cu_k, int(max_q), int(max_k))
    out, lse, rng = _kernel(q, dropout_p, backend).forward(q, k, v, cells, dropout_p, seed)
    if own_k is not None and own_v is not None and is_own is not None:
        out, lse = own_key.merge(out, lse, q, own_k, own_v, is_own, own_key.draw_kept(lse, dropout_p, seed))
    return out, lse, rng


@_packed.register_fake
def _(q: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=lse_dtype(q.dtype)), q.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("scgpt::packed_attention_backward", mutates_args=())
def _packed_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None,
                     is_own: Tensor | None, out: Tensor, lse: Tensor, rng: Tensor, cu_q: Tensor, cu_k: Tensor,
                     max_q: Tensor, max_k: Tensor, seed: Tensor, dropout_p: float, backend: str,
                     deterministic: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # noqa: FBT001
    cells = Segments(cu_q, cu_k, int(max_q), int(max_k))
    grads = _kernel(q, dropout_p, backend).backward(grad, Saved(q, k, v, out, lse, rng, seed), cells, dropout_p,
                                                    deterministic=deterministic)
    if own_k is None or own_v is None or is_own is None:
        return *grads, q.new_empty(0), q.new_empty(0)
    own = own_key.differentiate(grad, q, own_k, own_v, out, lse, is_own, own_key.draw_kept(lse, dropout_p, seed))
    return grads[0] + own[0], grads[1], grads[2], own[1], own[2]


@_packed_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor | None, own_v: Tensor | None,
      *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    own = [q.new_empty(0) if x is None else torch.empty_like(x) for x in (own_k, own_v)]
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), own[0], own[1]


def _save_packed(ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, own_k, own_v, is_own, cu_q, cu_k, max_q, max_k, seed, *ctx.options = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(q, k, v, own_k, own_v, is_own, *output, cu_q, cu_k, max_q, max_k, seed)  # type: ignore[arg-type]


def _differentiate_packed(ctx: FunctionCtx, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    saved: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
    grads = _packed_backward(grad, *saved, *ctx.options)  # type: ignore[attr-defined]
    own = grads[3:] if saved[3] is not None else (None, None)
    return *grads[:3], *own, *(None,) * 9


_packed.register_autograd(_differentiate_packed, setup_context=_save_packed)


@torch.library.custom_op("scgpt::padded_attention", mutates_args=())
def _padded(q: Tensor, k: Tensor, v: Tensor, is_key: Tensor, is_own: Tensor | None, seed: Tensor, all_queries: bool,  # noqa: FBT001
            dropout_p: float, backend: str, deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:  # noqa: FBT001
    rows = _Rows.of(is_key, is_own, all_queries)
    query = rows.queries(q)
    out, lse, rng = _kernel(q, dropout_p, backend).forward(query, rows.keys(k), rows.keys(v), rows.cells, dropout_p,
                                                           seed)
    if rows.is_own is not None:
        out, lse = own_key.merge(out, lse, query, rows.queries(k), rows.queries(v), rows.is_own,
                                 own_key.draw_kept(lse, dropout_p, seed))
    return rows.spread(out, q), rows.spread(lse, q), rng


@_padded.register_fake
def _(q: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse, q.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("scgpt::padded_attention_backward", mutates_args=())
def _padded_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, is_key: Tensor, is_own: Tensor | None, out: Tensor,
                     lse: Tensor, rng: Tensor, seed: Tensor, all_queries: bool, dropout_p: float, backend: str,  # noqa: FBT001
                     deterministic: bool) -> tuple[Tensor, Tensor, Tensor]:  # noqa: FBT001
    rows = _Rows.of(is_key, is_own, all_queries)
    query, query_grad = rows.queries(q), rows.queries(grad)
    saved = Saved(query, rows.keys(k), rows.keys(v), rows.queries(out), rows.queries(lse), rng, seed)
    grads = _kernel(q, dropout_p, backend).backward(query_grad, saved, rows.cells, dropout_p,
                                                    deterministic=deterministic)
    grad_q, grad_k, grad_v = rows.spread(grads[0], q), rows.spread_keys(grads[1], k), rows.spread_keys(grads[2], v)
    if rows.is_own is not None:
        own = own_key.differentiate(query_grad, query, rows.queries(k), rows.queries(v), saved.out, saved.lse,
                                    rows.is_own, own_key.draw_kept(saved.lse, dropout_p, seed))
        grad_q, grad_k, grad_v = (whole + rows.spread(part, whole)
                                  for whole, part in zip((grad_q, grad_k, grad_v), own, strict=True))
    return grad_q, grad_k, grad_v


@_padded_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (torch.empty_like(q, memory_format=contiguous), torch.empty_like(k, memory_format=contiguous),
            torch.empty_like(v, memory_format=contiguous))


def _save_padded(ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, is_key, is_own, seed, *ctx.options = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(q, k, v, is_key, is_own, *output, seed)  # type: ignore[arg-type]


def _differentiate_padded(ctx: FunctionCtx, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    saved: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
    return *_padded_backward(grad, *saved, *ctx.options), *(None,) * 7  # type: ignore[attr-defined]


_padded.register_autograd(_differentiate_padded, setup_context=_save_padded)


class _Rows(NamedTuple):
    """Where queries and keys stand in a padded batch, flattened to (batch x seq) rows; None: every row, no copy."""

    query_index: Tensor | None
    key_index: Tensor | None
    is_own: Tensor | None  # (queries,) bool
    cells: Segments

    @classmethod
    def of(cls, is_key: Tensor, is_own: Tensor | None, all_queries: bool) -> "_Rows":  # noqa: FBT001 private
        is_query = torch.ones_like(is_key) if all_queries else is_key if is_own is None else is_key | is_own
        cells = Segments(_cumulative(is_query), _cumulative(is_key), _longest(is_query), _longest(is_key))
        query_index, key_index = (None if bool(x.all()) else x.flatten().nonzero().squeeze(1)
                                  for x in (is_query, is_key))
        own = None if is_own is None else _select(is_own.unsqueeze(-1), query_index).squeeze(-1)
        return cls(query_index, key_index, own, cells)

    def queries(self, x: Tensor) -> Tensor:
        return _select(x, self.query_index)

    def keys(self, x: Tensor) -> Tensor:
        return _select(x, self.key_index)

    def spread(self, rows: Tensor, like: Tensor) -> Tensor:
        return _spread(rows, self.query_index, like)

    def spread_keys(self, rows: Tensor, like: Tensor) -> Tensor:
        return _spread(rows, self.key_index, like)


def _cumulative(is_row: Tensor) -> Tensor:
    counts = is_row.sum(1).cumsum(0).to(torch.int32)
    return torch.nn.functional.pad(counts, (1, 0))


def _longest(is_row: Tensor) -> int:
    return int(is_row.sum(1).max()) if is_row.numel() else 0


def _select(x: Tensor, index: Tensor | None) -> Tensor:
    flat = x.flatten(0, 1)
    return flat if index is None else flat.index_select(0, index)


def _spread(rows: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """Rows back to (batch, seq, ...), zeros elsewhere."""
    if index is not None:
        whole = rows.new_zeros(like.shape[0] * like.shape[1], *rows.shape[1:])
        rows = whole.index_copy_(0, index, rows)
    return rows.reshape(*like.shape[:2], *rows.shape[1:]).contiguous()
