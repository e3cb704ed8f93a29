"""Batch norm whose statistics may be float32 where its weights are of half precision: DeepSpeed keeps buffers so."""
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norm(x: Tensor, norm: _BatchNorm, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What `norm(x)` is with these weights, in the type of `x`; moves its statistics in training."""
    factor = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        factor = 1.0 / float(norm.num_batches_tracked) if factor is None else factor
    mean, variance = norm.running_mean, norm.running_var
    if mean is not None and weight is not None and bias is not None:   # torch wants one type for all four
        weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
    updated = norm.track_running_stats or not norm.training
    return torch.nn.functional.batch_norm(
        x, mean if updated else None, variance if updated else None, weight, bias, norm.training or mean is None,
        factor or 0.0, norm.eps)


class BatchNorm1d(nn.BatchNorm1d):
    """torch's, in mixed types too."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, num_features) or (batch, num_features, length) -> the same."""
        self._check_input_dim(input)
        return batch_norm(input, self, self.weight, self.bias)
