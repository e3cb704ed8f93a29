"""Gradient reversal for adversarial heads (Ganin, Lempitsky: Domain adaptation by backpropagation, ICML 2015)."""
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


class GradReverse(Function):
    """Identity forward; the gradient is multiplied with -lambd."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, lambd: float) -> Tensor:
        """Return `x`."""
        ctx.lambd = lambd  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """Reverse the gradient."""
        return grad_outputs[0] * -ctx.lambd, None  # type: ignore[attr-defined]

def grad_reverse(x: Tensor, lambd: float = 1.0) -> Tensor:
    """`x`, whose gradient arrives at its producer times -lambd."""
    reversed_: Tensor = GradReverse.apply(x, lambd)
    return reversed_

__all__ = ["GradReverse", "grad_reverse", "torch"]
