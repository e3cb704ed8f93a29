"""Linear attention equals its quadratic form, and sees no padding."""
import torch
from torch.nn import functional as F

from scgpt.model.linear_attention import FastTransformerEncoderWrapper, LinearSelfAttention


def test_attention_equals_normalised_products_of_feature_maps():
    attention = LinearSelfAttention(16, 2).double()
    x, is_key = torch.randn(2, 5, 16).double(), torch.tensor([[True] * 5, [True, True, False, False, False]])
    q, k, v = (projection(x).unflatten(-1, (2, 8)).transpose(1, 2) for projection in (
        attention.query_projection, attention.key_projection, attention.value_projection))
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2) * is_key[:, None, None]
    context = weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v
    want = attention.out_projection(context.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(attention(x, is_key), want)


def test_padding_does_not_reach_the_tokens():
    encoder = FastTransformerEncoderWrapper(16, 2, 12, 2, dropout=0.0).double()
    x, mask = torch.randn(1, 6, 16).double(), torch.tensor([[False] * 4 + [True] * 2])
    alone = encoder(x[:, :4], mask[:, :4])
    torch.testing.assert_close(encoder(x, mask)[:, :4], alone)
