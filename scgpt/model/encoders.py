"""What becomes of one token's gene, value, category, batch and position: a vector of d_model.

Every encoder takes any leading shape, (batch, seq) padded or (tokens,) packed, and appends d_model. All but
PositionalEncoding (not used by the models, kept for users) end in a LayerNorm.
"""
import math

import torch
from torch import Tensor, nn


class _EmbeddingEncoder(nn.Module):
    """Embedding, then LayerNorm."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_embeddings, embedding_dim, padding_idx=padding_idx)
        self.enc_norm = nn.LayerNorm(embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Integer ids (...) -> (..., embedding_dim)."""
        normed: Tensor = self.enc_norm(self.embedding(x))
        return normed


class GeneEncoder(_EmbeddingEncoder):
    """Gene ids -> vectors; the row of `padding_idx` starts at zero and is never trained."""


class BatchLabelEncoder(_EmbeddingEncoder):
    """Batch labels -> vectors."""


class CategoryValueEncoder(_EmbeddingEncoder):
    """Expression bins as categories -> vectors; floats are cut to integers, towards zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Bins (...), integer or float -> (..., embedding_dim)."""
        return super().forward(x.long())


class ContinuousValueEncoder(nn.Module):
    """Expression values -> vectors through two layers; values are cut at `max_value` from above only."""

    def __init__(self, d_model: int, dropout: float = 0.1, max_value: int = 512) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear1 = nn.Linear(1, d_model)
        self.activation = nn.ReLU()
        self.linear2 = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.max_value = max_value

    def forward(self, x: Tensor) -> Tensor:
        """Values (...) float -> (..., d_model)."""
        x = x.unsqueeze(-1).clamp(max=self.max_value)
        x = self.norm(self.linear2(self.activation(self.linear1(x))))
        dropped: Tensor = self.dropout(x)
        return dropped


class PositionalEncoding(nn.Module):
    """Adds sines and cosines of the position (Vaswani et al. 2017) to (seq, batch, d_model); d_model must be even."""

    def __init__(self, d_model: int, dropout: float = 0.1, max_len: int = 5000) -> None:
        super().__init__()
        if d_model % 2:
            raise ValueError(f"d_model must be even for sine and cosine pairs, not {d_model}")
        self.dropout = nn.Dropout(dropout)
        angle = torch.arange(max_len).unsqueeze(1) * torch.exp(torch.arange(0, d_model, 2) * (-math.log(1e4) / d_model))
        self.pe: Tensor
        self.register_buffer("pe", torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(max_len, 1, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(seq, batch, d_model), seq at most max_len -> the same."""
        dropped: Tensor = self.dropout(x + self.pe[: x.shape[0]])
        return dropped
