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

    A generation token's context skips `out_proj`, as in upstream's pretraining branch.
    """

    _padding_attends = False  # flash kernels leave padding at zero

    def __init__(self, d_model: int, nhead: int, dropout: float, *, backend: str = "auto",
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if d_model % nhead:
            raise ValueError(f"d_model ({d_model}) must be a multiple of the number of heads ({nhead})")
        self.nhead, self.dropout, self.backend = nhead, dropout, backend
        self.deterministic = False
        self._build(d_model, {"device": device, "dtype": dtype})

    def _build(self, d_model: int, options: dict[str, Any]) -> None:
        self.Wqkv = nn.Linear(d_model, 3 * d_model, **options)
        self.out_proj = nn.Linear(d_model, d_model, **options)

    def _project(self, src: Tensor) -> Tensor:
        projected: Tensor = self.Wqkv(src)
        return projected

    def forward(self, src: Tensor, layout: Layout) -> Tensor:
        """(..., d_model) -> (..., d_model), the leading shape as `layout` says."""
        q, k, v = self._project(src).unflatten(-1, (3, self.nhead, -1)).unbind(-3)
        context = attend(q, k, v, layout, dropout_p=self.dropout if self.training else 0.0, backend=self.backend,
                         deterministic=self.deterministic, all_queries=self._padding_attends).flatten(-2)
        projected: Tensor = self.out_proj(context)
        if layout.is_generation is not None:
            projected = torch.where(layout.is_generation.unsqueeze(-1), context, projected)
        return projected


class TorchSelfAttention(FlashSelfAttention):
    """The same with the names and the initialisation of `torch.nn.MultiheadAttention`."""

    _padding_attends = True  # torch's layer lets padding look at the tokens

    def _build(self, d_model: int, options: dict[str, Any]) -> None:
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model, **options))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model, **options))
        self.out_proj = nn.Linear(d_model, d_model, **options)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def _project(self, src: Tensor) -> Tensor:
        return F.linear(src, self.in_proj_weight, self.in_proj_bias)


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

    _attention: type[FlashSelfAttention] = FlashSelfAttention

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 activation: str = "relu", layer_norm_eps: float = 1e-5, batch_first: bool = True,  # noqa: FBT001, FBT002 upstream
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None, norm_scheme: str = "post",
                 *, attention_dropout: float | None = None, attention_backend: str = "auto") -> None:
        super().__init__()
        if not batch_first:
            raise ValueError("batch_first=False is not supported: give (batch, seq, d_model)")
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
            raise ValueError("FlashTransformerEncoderLayer takes no src_mask: every token sees its whole cell")
        layout: Layout | None = kwargs.get("layout")
        if layout is None:
            layout = padded_layout(src, src_key_padding_mask)
        if self.norm_scheme == "pre":
            src = self.norm1(src)
            src = self.norm2(src + self.dropout1(self.self_attn(src, layout)))
            added: Tensor = src + self.dropout2(self._feed_forward(src))
            return added
        src = self.norm1(src + self.dropout1(self.self_attn(src, layout)))
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
        self.recompute = False
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(num_layers)])

    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None, *,
                layout: Layout | None = None) -> Tensor:
        """As the layers: `layout` is computed once for all of them."""
        if layout is None:
            layout = padded_layout(src, src_key_padding_mask)
        recompute = self.recompute and torch.is_grad_enabled()
        for layer in self.layers:
            src = checkpoint(layer, src, layout=layout, use_reentrant=False) if recompute else layer(src, layout=layout)
        return src


def padded_layout(src: Tensor, src_key_padding_mask: Tensor | None) -> PaddedLayout:
    """The layout of padded rows; None: no padding. The mask is True at padding."""
    if src_key_padding_mask is None:
        return PaddedLayout(torch.ones(src.shape[:2], dtype=torch.bool, device=src.device))
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


def run_encoder(encoder: nn.Module, embs: Tensor, layout: Layout, packed: PackedTensors | None) -> Tensor:
    """Send embeddings through the layers; linear attention knows padded rows only, so packed cells are padded."""
    output: Tensor
    if not isinstance(encoder, FastTransformerEncoderWrapper):
        output = encoder(embs, layout=layout)
    elif packed is not None:
        padded, padding = packed.pad(embs)
        output = encoder(padded, padding)[~padding]
    elif isinstance(layout, PaddedLayout):
        output = encoder(embs, ~layout.is_key)
    return output
