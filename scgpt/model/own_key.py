"""A generation token's own key, merged into an attention over its cell's perception keys through the log-sum-exp.

With l the log-sum-exp over perception keys and s the own logit: L = log(e^l + e^s), and the output is e^(l-L) times
that over perception plus e^(s-L) times the own value. The backward hands (output, L) to the kernel, as ring attention
does, and adds the own key's term: p = e^(s-L), ds = p (grad . v_own - grad . output). With dropout the same holds, the
own probability being dropped like any other.

Shapes: q, own_k, own_v, out (queries, heads, head_size); lse (queries, heads); is_own (queries,) bool.
"""
import torch
from torch import Tensor


def draw_kept(lse: Tensor, dropout_p: float, seed: Tensor) -> Tensor | float:
    """What each query's probability of its own key is multiplied with: 0 or 1 / (1 - p), (queries, heads)."""
    if dropout_p == 0.0:
        return 1.0
    generator = torch.Generator(lse.device).manual_seed(int(seed) + 1)
    draws = torch.rand(lse.shape, generator=generator, device=lse.device)
    return (draws >= dropout_p).to(lse.dtype) / (1.0 - dropout_p)


def _logits(q: Tensor, own_k: Tensor, is_own: Tensor, dtype: torch.dtype) -> Tensor:
    logits: Tensor = (q.to(dtype) * own_k.to(dtype)).sum(-1) * float(q.shape[-1] ** -0.5)
    return logits.masked_fill(~is_own.unsqueeze(-1), -torch.inf)


def merge(out: Tensor, lse: Tensor, q: Tensor, own_k: Tensor, own_v: Tensor, is_own: Tensor,
          kept: Tensor | float) -> tuple[Tensor, Tensor]:
    """Add each generation query's own key to an attention over its cell's perception keys."""
    logits = _logits(q, own_k, is_own, lse.dtype)
    merged = torch.logaddexp(lse, logits)
    empty = merged == -torch.inf  # neither a perception key nor an own one
    others, own = ((x - merged).exp().masked_fill(empty, 0.0) for x in (lse, logits))
    total = others.unsqueeze(-1) * out.to(lse.dtype) + (own * kept).unsqueeze(-1) * own_v.to(lse.dtype)
    return total.to(out.dtype), merged


def differentiate(grad: Tensor, q: Tensor, own_k: Tensor, own_v: Tensor, out: Tensor, lse: Tensor, is_own: Tensor,
                  kept: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """The own key's share of the gradients of q, k and v."""
    dtype = lse.dtype
    logits = _logits(q, own_k, is_own, dtype)
    probability = (logits - lse).exp().masked_fill(~is_own.unsqueeze(-1), 0.0)
    grad_, q_, k_, v_, out_ = (x.to(dtype) for x in (grad, q, own_k, own_v, out))
    grad_logits = probability * (kept * (grad_ * v_).sum(-1) - (grad_ * out_).sum(-1)) * q.shape[-1] ** -0.5
    grad_v = (probability * kept).unsqueeze(-1) * grad_
    return ((grad_logits.unsqueeze(-1) * k_).to(q.dtype), (grad_logits.unsqueeze(-1) * q_).to(q.dtype),
            grad_v.to(q.dtype))
