"""Losses: parts of a batch add up to the whole; edges give numbers, not NaN."""
import pytest
import torch

from scgpt.loss import (
    bernoulli_nll_sum,
    criterion_neg_log_bernoulli,
    cross_entropy_sum,
    elastic_cell_similarity,
    masked_mse_loss,
    masked_relative_error,
    relative_error_sum,
    squared_error_sum,
)

MEANS = [(masked_mse_loss, squared_error_sum), (masked_relative_error, relative_error_sum),
         (criterion_neg_log_bernoulli, bernoulli_nll_sum)]


def batch(n: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pred = torch.rand(n, generator=generator)
    return pred, torch.randint(0, 4, (n,), generator=generator).float(), torch.rand(n, generator=generator) < 0.3


@pytest.mark.parametrize(("mean", "total"), MEANS)
def test_unequal_parts_add_up_to_the_mean_of_the_whole(mean, total):
    pred, target, mask = batch()
    parts = [total(pred[part], target[part], mask[part]) for part in (slice(0, 3), slice(3, 30), slice(30, 40))]
    loss = sum(part[0] for part in parts) / sum(part[1] for part in parts)
    torch.testing.assert_close(loss, mean(pred, target, mask))


@pytest.mark.parametrize(("mean", "total"), MEANS)
def test_an_empty_mask_gives_zero_with_a_gradient_of_zero(mean, total):
    pred, target, mask = batch()
    pred.requires_grad_()
    loss = mean(pred, target, torch.zeros_like(mask))
    loss.backward()
    assert loss == 0
    assert not pred.grad.any()
    assert total(pred, target, torch.zeros_like(mask))[1] == 0


@pytest.mark.parametrize("total", [total for _, total in MEANS])
def test_no_mask_counts_every_value(total):
    pred, target, mask = batch()
    everything = total(pred, target, torch.ones_like(mask))
    assert all(torch.equal(one, other) for one, other in zip(total(pred, target), everything, strict=True))


def test_what_the_mask_hides_may_be_infinite():
    pred, target = torch.tensor([1.0, torch.inf]), torch.tensor([2.0, 1.0])
    assert masked_mse_loss(pred, target, torch.tensor([True, False])) == 1


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_certain_prediction_costs_a_finite_amount(probability):
    probs = torch.full((2,), probability, requires_grad=True)
    loss, count = bernoulli_nll_sum(probs, torch.tensor([0.0, 3.0]))
    loss.backward()
    assert loss.isfinite()
    assert loss > 10
    assert count == 2
    assert probs.grad.isfinite().all()


def test_classes_without_label_are_not_counted():
    logits = torch.randn(4, 3)
    loss, count = cross_entropy_sum(logits, torch.tensor([0, -100, 2, -100]))
    assert count == 2
    want = torch.nn.functional.cross_entropy(logits[[0, 2]], torch.tensor([0, 2]), reduction="sum")
    torch.testing.assert_close(loss, want)


def test_similarity_written_out_pair_by_pair():
    cells, total = torch.randn(4, 6).double(), 0.0
    for i in range(4):
        for j in range(4):
            cosine = float(torch.nn.functional.cosine_similarity(cells[i], cells[j], dim=0))
            total += 1 - ((max(0.0, cosine) if i != j else 0.0) - 0.3) ** 2
    assert float(elastic_cell_similarity(cells, 0.3)) == pytest.approx(total / 16)


def test_weights_in_a_mask_count_as_upstream_counts_them():
    prediction, target, weights = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.25])
    assert float(masked_mse_loss(prediction, target, weights)) == pytest.approx((0.25 + 0.25) / 0.75)
