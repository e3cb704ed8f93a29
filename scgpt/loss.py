"""Pure losses. Upstream's means, and the same as (sum, count) for a mean over a global batch.

A step's loss is the sum of the `sum`s over all micro-batches and ranks, divided by the sum of the `count`s: no rank
with few targets weighs more than another. Importing this module imports torch.
"""
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 torch's own habit

SumCount = tuple[Tensor, Tensor]  # () of the predictions' dtype, () of the same dtype


def squared_error_sum(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> SumCount:
    """Sum of squared errors over `mask` (bool or 0/1, all where None), and how many values that is. Any shape."""
    return _masked((pred - target).square(), mask)


def bernoulli_nll_sum(probs: Tensor, target: Tensor, mask: Tensor | None = None) -> SumCount:
    """Sum of -log P(target > 0) under `probs`, the probabilities of a non-zero value, over `mask`, and its count.

    Probabilities are kept an epsilon of their dtype away from 0 and 1, so a certain prediction that is wrong costs a
    finite amount.
    """
    return _masked(_bernoulli_nll(probs, (target > 0).to(probs.dtype)), mask)


def _bernoulli_nll(probs: Tensor, positive: Tensor) -> Tensor:
    eps = torch.finfo(probs.dtype).eps
    probs = probs.clamp(eps, 1 - eps)
    return F.binary_cross_entropy_with_logits(probs.log() - (-probs).log1p(), positive, reduction="none")


def relative_error_sum(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> SumCount:
    """Sum of |pred - target| / (target + 1e-6) over `mask`, and its count."""
    return _masked((pred - target).abs() / (target + 1e-6), mask)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> SumCount:
    """Sum of the cross entropies of (cells, classes) logits, and the number of cells; label -100 is not counted."""
    count = (labels != -100).sum().to(logits.dtype)
    return F.cross_entropy(logits, labels, reduction="sum"), count


def _masked(losses: Tensor, mask: Tensor | None) -> SumCount:
    if mask is None:
        return losses.sum(), losses.new_tensor(losses.numel())
    weights = mask.to(losses.dtype)
    # where, not a product: an infinite loss outside the mask must not become 0 x inf
    return (torch.where(mask.bool(), losses, 0.0) * weights).sum(), weights.sum()


def _mean(total: SumCount) -> Tensor:
    return total[0] / (total[1] + (total[1] == 0))


def masked_mse_loss(input: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over `mask`; 0 where the mask is empty (upstream: NaN).

    A mask of weights multiplies the errors before they are squared, and their sum is what is divided by, as upstream.
    """
    weights = mask.float()
    return _mean((_masked((input - target).square() * weights, weights)[0], weights.sum()))


def criterion_neg_log_bernoulli(input: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of (target > 0) under `input`, over `mask`; 0 where the mask is empty.

    float32 whatever the inputs, as upstream's float32 indicator makes it.
    """
    return _mean(_masked(_bernoulli_nll(input, (target > 0).float()), mask))


def masked_relative_error(input: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean of |input - target| / (target + 1e-6) over `mask`; 0 where the mask is empty."""
    return _mean(relative_error_sum(input, target, mask))


def elastic_cell_similarity(cell_emb: Tensor, threshold: float) -> Tensor:
    """ECS: mean over all pairs of 1 - (relu(cosine) - threshold)^2, a cell's pair with itself counted as cosine 0.

    (cells, d_model) -> ().
    """
    normed = F.normalize(cell_emb, p=2.0, dim=1)
    cosine = (normed @ normed.t()).fill_diagonal_(0.0)
    return (1 - (F.relu(cosine) - threshold).square()).mean()
