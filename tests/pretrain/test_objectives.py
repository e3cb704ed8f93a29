import numpy as np
import pytest
import torch

from pretrain.config import ObjectiveConfig
from pretrain.data import to_tensors
from pretrain.objectives import loss_sums, metric_names, weighted
from scgpt.collate import CollateConfig, collate
from scgpt.model.build import build_model
from scgpt.model.config import ModelConfig
from tests.scgpt.data.cells import N_TOKENS, random_cells

CONFIG = CollateConfig(context_length=20, mask_ratio=(0.5,))
VOCAB = {token: i for i, token in enumerate([*(f"g{i}" for i in range(N_TOKENS - 3)), "<pad>", "<cls>", "<eoc>"])}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(ModelConfig(n_layers=1, d_model=8, n_heads=2, d_hid=8, dropout=0.0), VOCAB)


def batch_of(cells, *, mask=True):
    return to_tensors(collate(cells, CONFIG, cls_id=VOCAB["<cls>"], seed=0, epochs=0, mask=mask), "cpu")


@pytest.mark.parametrize("mvc", [True, False])
def test_the_terms_are_the_errors_at_hidden_positions_summed_one_by_one(model, mvc):
    batch = batch_of(random_cells([5, 18, 30]))
    sums = loss_sums(model, batch, ObjectiveConfig(mvc=mvc))
    with torch.no_grad():
        output = model(batch.inputs, MVC=True)
    names = {"loss_expression": "mlm_output", "loss_mvc": "mvc_output"}
    assert list(sums.terms) == list(names)[:1 + mvc]
    for term, name in names.items():
        if term in sums.terms:
            expected = sum((float(output[name][i]) - float(batch.targets[i])) ** 2
                           for i in range(len(batch.targets)) if batch.target_mask[i])
            assert sums.terms[term].item() == pytest.approx(expected, rel=1e-5)
    assert len(sums.detached()) == len(metric_names(ObjectiveConfig(mvc=mvc)))


def test_parts_of_a_batch_add_up_to_the_whole_in_loss_and_gradient(model):
    """However a global batch is cut up: the mean of the parts' scaled losses has the gradient of the whole's mean."""
    cells = random_cells([5, 18, 30, 2])
    objective, count = ObjectiveConfig(), int(batch_of(cells).target_mask.sum())

    def gradient(parts):
        model.zero_grad()
        for part in parts:
            sums = loss_sums(model, batch_of(cells.take(np.array(part))), objective)
            (sums.scaled(count=count, copies=len(parts)) / len(parts)).backward()   # DeepSpeed's mean over parts
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradient([[0, 1, 2, 3]])
    assert whole.abs().max() > 1
    assert torch.allclose(gradient([[0], [1, 3], [2]]), whole, rtol=1e-4, atol=1e-4)


def test_a_batch_that_hides_nothing_teaches_nothing_but_runs_every_module(model):
    model.zero_grad()
    sums = loss_sums(model, batch_of(random_cells([5, 6]), mask=False), ObjectiveConfig())
    loss = sums.scaled(count=0, copies=2)
    assert loss.item() == 0.0
    loss.backward()
    assert float(model.decoder.fc[0].weight.grad.abs().max()) == 0.0


def test_the_loss_of_a_step_is_the_sum_of_its_terms_without_the_relative_error():
    assert weighted({"loss_expression": 2.0, "loss_mvc": 3.0, "mre": 100.0}) == 5.0
