"""Transformer layers: softmax attention under flash or torch names, post-norm or upstream's "pre", packed or padded.

A layer takes (tokens, d_model) with a PackedLayout or (batch, seq, d_model) with a PaddedLayout; the layout comes as
the keyword `layout` (or, as upstream, as `src_key_padding_mask`). Both name schemes hold the same numbers:
`self_attn.Wqkv.weight` is `self_attn.in_proj_weight`.
"""
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 torch's own habit
from torch.utils.checkpoint import checkpoint

from scgpt.model.attention import PackedLayout, PaddedLayout, attend
from scgpt.model.linear_attention import FastTransformerEncoderWrapper
from scgpt.model.packed import PackedTensors

Layout = PackedLayout | PaddedLayout
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class FlashSelfAttention(nn.Module):
    """Multi-head self-attention with upstream's flash names: `Wqkv`, `out_proj`.

    The layers call it with a layout. Called as flash-attn's FlashMHA, `(x, key_padding_mask)` with True at tokens, it
    returns (output, None), as that does.
    """

    def __init__(self, d_model: int, nhead: int, dropout: float, *, backend: str = "auto",
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim, self.batch_first = d_model, nhead, d_model // nhead, True
        self.dropout, self.backend, self.deterministic = dropout, backend, False
        self.Wqkv = nn.Linear(d_model, 3 * d_model, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_model, d_model, device=device, dtype=dtype)

    def forward(self, x: Tensor, key_padding_mask: Layout | Tensor | None = None,
                need_weights: bool = False) -> Tensor | tuple[Tensor, None]:  # noqa: FBT001, FBT002 FlashMHA's
        """(..., d_model) -> (..., d_model), the leading shape as the layout says."""
        if isinstance(key_padding_mask, (PackedLayout, PaddedLayout)):
            return _self_attend(self, self.Wqkv(x), key_padding_mask)
        if need_weights:
            raise ValueError("flash attention keeps no attention weights: load them into a model built with "
                             "use_fast_transformer=False, whose layers are torch's")
        layout = padded_layout(x, None if key_padding_mask is None else key_padding_mask.logical_not())
        return _self_attend(self, self.Wqkv(x), layout), None


class TorchSelfAttention(nn.MultiheadAttention):
    """torch's own module, with its names and initialisation; the layers call it with a layout, and our kernels attend.

    Called as torch's, `(query, key, value, key_padding_mask=..., need_weights=True)`, it is torch's, weights and all.
    """

    def __init__(self, d_model: int, nhead: int, dropout: float, *, backend: str = "auto",
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(d_model, nhead, dropout=dropout, batch_first=True, device=device, dtype=dtype)
        self.backend, self.deterministic = backend, False

    def forward(self, query: Tensor, key: Layout | Tensor, *others: Any, **options: Any) -> Any:
        """(..., d_model) and a layout -> (..., d_model); padding attends to the tokens, as in torch's layer."""
        if isinstance(key, (PackedLayout, PaddedLayout)):
            qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            return _self_attend(self, qkv, key, padding_attends=True)
        return super().forward(query, key, *others, **options)


def _self_attend(module: FlashSelfAttention | TorchSelfAttention, qkv: Tensor, layout: Layout, *,
                 padding_attends: bool = False) -> Tensor:
    """Projected tokens (..., 3 x d_model) -> (..., d_model). Flash kernels leave padding at zero before `out_proj`.

    A generation token's context skips `out_proj`, as in upstream's pretraining branch.
    """
    q, k, v = qkv.unflatten(-1, (3, module.num_heads, -1)).unbind(-3)
    q = _queries(q, layout)
    context = attend(q, k, v, layout, dropout_p=module.dropout if module.training else 0.0, backend=module.backend,
                     deterministic=module.deterministic, all_queries=padding_attends).flatten(-2)
    projected: Tensor = module.out_proj(context)
    if layout.is_generation is None:
        return projected
    return torch.where(layout.is_generation.unsqueeze(-1), context, projected)


def _queries(x: Tensor, layout: Layout) -> Tensor:
    """The tokens that attend, (queries, ...) of (tokens, ...)."""
    index = layout.query_index if isinstance(layout, PackedLayout) else None
    return x if index is None else x.index_select(0, index)


class FlashTransformerEncoderLayer(nn.Module):
    """One encoder layer with upstream's flash names, on any device.

    `norm_scheme="pre"` is upstream's: the input is normalised first, and the residual is added to the *normalised*
    input, in both halves. `src_mask` is refused with ValueError.

    Args:
        d_model: width of a token.
        nhead: heads; must divide d_model.
        dim_feedforward: width of the hidden layer.
        dropout: of the feed-forward and of both residual branches.
        activation: "relu" or "gelu".
        layer_norm_eps: epsilon of both norms.
        batch_first: must be True: attention here knows (batch, seq, d_model) only.
        device: of the parameters.
        dtype: of the parameters.
        norm_scheme: "post" or "pre".
        attention_dropout: of the attention probabilities; None: as `dropout`.
        attention_backend: one of `scgpt.model.attention.BACKENDS`.
    """

    _attention: type[FlashSelfAttention | TorchSelfAttention] = FlashSelfAttention

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 activation: str = "relu", layer_norm_eps: float = 1e-5, batch_first: bool = True,  # noqa: FBT001, FBT002 upstream
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None, norm_scheme: str = "post",
                 *, attention_dropout: float | None = None, attention_backend: str = "auto") -> None:
        super().__init__()
        if not batch_first:
            raise ValueError("batch_first=False is not supported: give (batch, seq, d_model)")
        if d_model % nhead:
            raise ValueError(f"d_model ({d_model}) must be a multiple of the number of heads ({nhead})")
        if activation not in _ACTIVATIONS:
            raise RuntimeError(f"activation should be relu/gelu, not {activation}")
        if norm_scheme not in ("pre", "post"):
            raise ValueError(f"norm_scheme must be 'pre' or 'post', not {norm_scheme!r}")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.self_attn = self._attention(d_model, nhead, dropout if attention_dropout is None else attention_dropout,
                                         backend=attention_backend, **options)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **options)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **options)
        self.norm1 = nn.LayerNorm(d_model, eps=layer_norm_eps, **options)
        self.norm2 = nn.LayerNorm(d_model, eps=layer_norm_eps, **options)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = _ACTIVATIONS[activation]
        self.norm_scheme = norm_scheme

    def forward(self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
                **kwargs: Any) -> Tensor:
        """(batch, seq, d_model) with padding True in `src_key_padding_mask`, or any shape with `layout=`."""
        if src_mask is not None:
            raise ValueError(f"{type(self).__name__} takes no src_mask: every token sees its whole cell")
        layout: Layout | None = kwargs.get("layout")
        if layout is None:
            layout = padded_layout(src, src_key_padding_mask)
        if self.norm_scheme == "pre":
            src = self.norm1(src)
            src = self.norm2(_queries(src, layout) + self.dropout1(self.self_attn(src, layout)))
            added: Tensor = src + self.dropout2(self._feed_forward(src))
            return added
        src = self.norm1(_queries(src, layout) + self.dropout1(self.self_attn(src, layout)))
        normed: Tensor = self.norm2(src + self.dropout2(self._feed_forward(src)))
        return normed

    def _feed_forward(self, src: Tensor) -> Tensor:
        hidden: Tensor = self.linear2(self.dropout(self.activation(self.linear1(src))))
        return hidden


class TorchTransformerEncoderLayer(FlashTransformerEncoderLayer):
    """The same layer with the names of `torch.nn.TransformerEncoderLayer`."""

    _attention = TorchSelfAttention


class TransformerEncoder(nn.Module):
    """A stack of copies of one layer: all start with the same weights, as upstream's do.

    Set `recompute` to True to keep only each layer's input for the backward, and compute the layer again there: memory
    for about a third more time.
    """

    def __init__(self, layer: FlashTransformerEncoderLayer, num_layers: int) -> None:
        super().__init__()
        self.recompute, self.num_layers, self.norm = False, num_layers, None
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(num_layers)])

    def forward(self, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
                is_causal: bool | None = None, *, layout: Layout | None = None,  # noqa: FBT001 torch's
                queries: Tensor | None = None) -> Tensor:
        """As the layers: `layout` is computed once for all of them; `mask` and `is_causal` are refused.

        With `queries` (n,) int64, ascending and distinct tokens of packed cells, the result is that of these tokens
        alone, (n, d_model): the last layer computes nothing else.
        """
        if mask is not None or is_causal:
            raise ValueError("the encoder takes no mask and is not causal: every token sees its whole cell")
        if layout is None:
            layout = padded_layout(src, src_key_padding_mask)
        recompute = self.recompute and torch.is_grad_enabled()
        for number, layer in enumerate(self.layers, 1):
            if number == len(self.layers) and queries is not None and isinstance(layout, PackedLayout):
                layout = layout.of_queries(queries)
            src = checkpoint(layer, src, layout=layout, use_reentrant=False) if recompute else layer(src, layout=layout)
        return src


def padded_layout(src: Tensor, src_key_padding_mask: Tensor | None) -> PaddedLayout:
    """The layout of padded rows: True in the mask is padding, None is none. Another shape is a ValueError."""
    if src_key_padding_mask is None:
        return PaddedLayout(torch.ones(src.shape[:2], dtype=torch.bool, device=src.device))
    if src_key_padding_mask.shape != src.shape[:2]:
        raise ValueError(f"src_key_padding_mask has the shape {tuple(src_key_padding_mask.shape)}, "
                         f"the tokens {tuple(src.shape[:2])}")
    return PaddedLayout(src_key_padding_mask.logical_not())


def build_encoder(d_model: int, nhead: int, d_hid: int, nlayers: int, dropout: float, *, backend: str | None,
                  norm_scheme: str, attention_dropout: float | None,
                  attention_backend: str) -> TransformerEncoder | FastTransformerEncoderWrapper:
    """The layers of a model: `backend` "flash" or "linear", or None for torch's names (always post-norm)."""
    if backend == "linear":
        return FastTransformerEncoderWrapper(d_model, nhead, d_hid, nlayers, dropout)
    if backend not in (None, "flash"):
        raise ValueError(f"unknown fast_transformer_backend '{backend}': use 'flash' or 'linear'")
    layer_type = TorchTransformerEncoderLayer if backend is None else FlashTransformerEncoderLayer
    layer = layer_type(d_model, nhead, d_hid, dropout, norm_scheme="post" if backend is None else norm_scheme,
                       attention_dropout=attention_dropout, attention_backend=attention_backend)
    return TransformerEncoder(layer, nlayers)


def run_encoder(encoder: nn.Module, embs: Tensor, layout: Layout, packed: PackedTensors | None,
                queries: Tensor | None = None) -> Tensor:
    """Send embeddings through the layers; linear attention knows padded rows only, so packed cells are padded.

    `queries` is for softmax layers: see TransformerEncoder.
    """
    output: Tensor
    if not isinstance(encoder, FastTransformerEncoderWrapper):
        output = encoder(embs, layout=layout) if queries is None else encoder(embs, layout=layout, queries=queries)
    elif packed is not None:
        padded, padding = packed.pad(embs)
        output = encoder(padded, padding)[~padding]
    elif isinstance(layout, PaddedLayout):
        output = encoder(embs, ~layout.is_key)
    return output
