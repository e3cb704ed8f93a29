"""Linear attention: softmax replaced by the feature map elu(x) + 1, cost linear in the length of a cell.

Katharopoulos, Vyas, Pappas, Fleuret: Transformers are RNNs (ICML 2020), non-causal form. Names of parameters are those
of the package pytorch-fast-transformers, which upstream's "linear" backend wraps; nothing of it is needed here.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 torch's own habit

_EPS = 1e-6  # keeps a row without any key from dividing by zero; the published value


class LinearSelfAttention(nn.Module):
    """Multi-head attention with phi(q) (phi(k)^T v) / (phi(q) sum phi(k)), phi = elu + 1."""

    def __init__(self, d_model: int, nhead: int) -> None:
        super().__init__()
        if d_model % nhead:
            raise ValueError(f"d_model ({d_model}) must be a multiple of the number of heads ({nhead})")
        self.nhead = nhead
        self.query_projection = nn.Linear(d_model, d_model)
        self.key_projection = nn.Linear(d_model, d_model)
        self.value_projection = nn.Linear(d_model, d_model)
        self.out_projection = nn.Linear(d_model, d_model)

    def forward(self, src: Tensor, is_key: Tensor) -> Tensor:
        """(batch, seq, d_model), keys where `is_key` (batch, seq) -> (batch, seq, d_model)."""
        heads = (self.nhead, -1)
        q = F.elu(self.query_projection(src).unflatten(-1, heads)) + 1
        k = (F.elu(self.key_projection(src).unflatten(-1, heads)) + 1) * is_key[:, :, None, None]
        v = self.value_projection(src).unflatten(-1, heads)
        key_values = torch.einsum("nshd,nshm->nhmd", k, v)
        norm = torch.einsum("nlhd,nhd->nlh", q, k.sum(1)) + _EPS
        context = torch.einsum("nlhd,nhmd->nlhm", q, key_values) / norm.unsqueeze(-1)
        projected: Tensor = self.out_projection(context.flatten(-2))
        return projected


class LinearEncoderLayer(nn.Module):
    """Post-norm layer with GELU; dropout after the activation and after the second projection, as published."""

    def __init__(self, d_model: int, nhead: int, d_hid: int, dropout: float) -> None:
        super().__init__()
        self.attention = LinearSelfAttention(d_model, nhead)
        self.linear1 = nn.Linear(d_model, d_hid)
        self.linear2 = nn.Linear(d_hid, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, src: Tensor, is_key: Tensor) -> Tensor:
        """(batch, seq, d_model) -> the same."""
        src = self.norm1(src + self.dropout(self.attention(src, is_key)))
        hidden = self.dropout(F.gelu(self.linear1(src)))
        normed: Tensor = self.norm2(src + self.dropout(self.linear2(hidden)))
        return normed


class LinearEncoder(nn.Module):
    """Layers, then one more norm."""

    def __init__(self, d_model: int, nhead: int, d_hid: int, nlayers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([LinearEncoderLayer(d_model, nhead, d_hid, dropout) for _ in range(nlayers)])
        self.norm = nn.LayerNorm(d_model)

    def forward(self, src: Tensor, is_key: Tensor) -> Tensor:
        """(batch, seq, d_model) -> the same."""
        for layer in self.layers:
            src = layer(src, is_key)
        normed: Tensor = self.norm(src)
        return normed


class FastTransformerEncoderWrapper(nn.Module):
    """Upstream's "linear" encoder; padding must stand at the end of a row (ValueError)."""

    def __init__(self, d_model: int, nhead: int, d_hid: int, nlayers: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.fast_transformer_encoder = LinearEncoder(d_model, nhead, d_hid, nlayers, dropout)

    def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        """(batch, seq, d_model) and a bool mask (batch, seq), True at padding -> (batch, seq, d_model)."""
        if src_key_padding_mask.shape != src.shape[:2]:
            raise ValueError(f"src_key_padding_mask has the shape {tuple(src_key_padding_mask.shape)}, "
                             f"src begins with {tuple(src.shape[:2])}")
        if src_key_padding_mask.dtype != torch.bool:
            raise ValueError(f"src_key_padding_mask must be bool (True = padding), not {src_key_padding_mask.dtype}")
        if bool((src_key_padding_mask[:, :-1] & ~src_key_padding_mask[:, 1:]).any()):
            raise ValueError("padding stands before a token: the linear backend takes padding at the end of a row only")
        encoded: Tensor = self.fast_transformer_encoder(src, ~src_key_padding_mask)
        return encoded
