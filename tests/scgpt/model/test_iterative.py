"""Generation in rounds: one round is the forward, more rounds settle the surest first."""
import pytest
import torch

from scgpt.model.iterative import generate_iteratively
from scgpt.model.model import TransformerModel
from tests.scgpt.model.packs import N_TOKENS, VOCAB, cells


def build(**options) -> TransformerModel:
    torch.manual_seed(1)
    settings = {"do_mvc": True, "use_generative_training": True, "dropout": 0.0, "pad_value": -2} | options
    return TransformerModel(N_TOKENS, 16, 2, 12, 1, vocab=VOCAB, **settings).double().eval()


def test_one_round_is_the_plain_forward():
    packed, model = cells([6, 4, 1]).split(torch.tensor([2, 4, 1])), build()
    got = generate_iteratively(model, packed, 1)
    want = torch.where(packed.is_generation, model(packed)["mlm_output"], packed.values)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("options", [{}, {"explicit_zero_prob": True}], ids=str)
def test_two_rounds_written_out(options):
    """One cell, one perception token, four unknown: the surest two are settled, then the others see them."""
    packed, model = cells([5]).split(torch.tensor([1])), build(**options)
    out = model(packed, MVC=True)
    sure = (out["mlm_zero_probs"] - 0.5).abs() if options else -(out["mlm_output"] - out["mvc_output"]).abs()
    first = sure[1:].argsort(descending=True)[:2] + 1
    rest = torch.tensor([i for i in range(1, 5) if i not in first])
    order = torch.cat([torch.tensor([0]), first, rest])
    values = packed.values.clone()
    values[first] = out["mlm_output"][first].detach()
    second = packed.__class__(packed.gene_ids[order], values[order], packed.cu_seqlens, 5).split(torch.tensor([3]))
    values[rest] = model(second)["mlm_output"][3:].detach()
    torch.testing.assert_close(generate_iteratively(model, packed, 2), values)


def test_perception_values_stay_and_every_gene_is_settled():
    packed, model = cells([9, 3, 7]).split(torch.tensor([2, 3, 1])), build()
    got = generate_iteratively(model, packed, 3, input_cell_emb=torch.randn(3, 16).double())
    generation = packed.is_generation
    assert torch.equal(got[~generation], packed.values[~generation])
    assert not torch.equal(got[generation], packed.values[generation])
    assert got.isfinite().all()


def test_category_values_are_categories():
    packed = cells([9]).split(torch.tensor([2]))
    model = build(input_emb_style="category", n_input_bins=12, pad_value=10)
    got = generate_iteratively(model, packed, 2)
    assert torch.equal(got, got.round())
    assert got.min() >= 0


def test_refusals_say_why():
    with pytest.raises(ValueError, match="split"):
        generate_iteratively(build(), cells([3]))
    packed = cells([3]).split(torch.tensor([1]))
    with pytest.raises(ValueError, match="n_rounds"):
        generate_iteratively(build(), packed, 0)
    with pytest.raises(ValueError, match="do_mvc"):
        generate_iteratively(build(do_mvc=False), packed)
