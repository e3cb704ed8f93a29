"""Domain-specific batch normalisation: one set of statistics a domain (Chang et al., CVPR 2019)."""
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scgpt.model.batch_norm import batch_norm


class _DomainSpecificBatchNorm(nn.Module):
    """One batch norm a domain; a call names the domain of its whole input.

    `cur_domain` is the domain of the last call (None before the first).
    """

    _norm: type[nn.BatchNorm1d] | type[nn.BatchNorm2d]

    def __init__(self, num_features: int, num_domains: int, eps: float = 1e-5, momentum: float = 0.1,
                 affine: bool = True, track_running_stats: bool = True) -> None:  # noqa: FBT001, FBT002 upstream
        super().__init__()
        self._cur_domain: int | None = None
        self.num_domains = num_domains
        self.bns = nn.ModuleList(
            [self._norm(num_features, eps, momentum, affine, track_running_stats) for _ in range(num_domains)])

    @property
    def cur_domain(self) -> int | None:
        """Domain of the last call."""
        return self._cur_domain

    @cur_domain.setter
    def cur_domain(self, domain_label: int | None) -> None:
        self._cur_domain = domain_label

    def reset_running_stats(self) -> None:
        """Forget the statistics of every domain."""
        for bn in self.bns:
            bn.reset_running_stats()  # type: ignore[operator]

    def reset_parameters(self) -> None:
        """Reset weights and statistics of every domain."""
        for bn in self.bns:
            bn.reset_parameters()  # type: ignore[operator]

    def _check_input_dim(self, x: Tensor) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor, domain_label: int) -> Tensor:
        """Normalise `x` (batch, num_features, ...) with the norm of `domain_label`; ValueError for an unknown label."""
        self._check_input_dim(x)
        if not 0 <= domain_label < self.num_domains:
            raise ValueError(f"domain label {domain_label} is not one of the {self.num_domains} domains "
                             f"(0 to {self.num_domains - 1})")
        self._cur_domain = domain_label
        return self._normed(x, cast(_BatchNorm, self.bns[domain_label]), domain_label)

    def _normed(self, x: Tensor, norm: _BatchNorm, domain_label: int) -> Tensor:
        """As `norm(x)`, but whichever domain it is, the same module runs and every domain's weights get a gradient.

        Ranks that train on different domains at a time would otherwise reduce the gradients of different weights
        together, or wait for each other's modules (ZeRO).
        """
        weight = bias = None
        if norm.affine:
            weight, bias = (torch.stack([getattr(each, name) for each in self.bns])[domain_label]
                            for name in ("weight", "bias"))
        return batch_norm(x, norm, weight, bias)


class DomainSpecificBatchNorm1d(_DomainSpecificBatchNorm):
    """Input (batch, num_features) or (batch, num_features, length)."""

    _norm = nn.BatchNorm1d

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() > 3:
            raise ValueError(f"expected at most 3 dimensions, got {x.dim()}")


class DomainSpecificBatchNorm2d(_DomainSpecificBatchNorm):
    """Input (batch, num_features, height, width)."""

    _norm = nn.BatchNorm2d

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() != 4:
            raise ValueError(f"expected 4 dimensions, got {x.dim()}")
