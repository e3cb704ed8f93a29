"""TransformerGenerator beyond the golden vectors: packed equals padded, what upstream cannot run."""
import copy
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from scgpt.model.generation_model import AffineExprDecoder, TransformerGenerator
from tests.scgpt.model.packs import N_TOKENS, VOCAB, cells, padded

ALL = {"CLS": True, "MVC": True, "ECS": True}
PER_TOKEN = ("mlm_output", "mvc_output", "mlm_zero_probs", "mvc_zero_probs")


def build(**options) -> TransformerGenerator:
    torch.manual_seed(2)
    settings = {"dropout": 0.0, "do_mvc": True, "pad_value": 0, "use_fast_transformer": True} | options
    return TransformerGenerator(N_TOKENS, 16, 2, 12, 2, 2, 4, VOCAB, **settings).double()


@pytest.mark.parametrize("options", [
    {}, {"use_fast_transformer": False}, {"fast_transformer_backend": "linear"}, {"cell_emb_style": "w-pool"},
    {"decoder_adaptive_bias": True, "decoder_activation": "Softplus"}, {"explicit_zero_prob": True},
    {"n_input_bins": 9, "pad_value": 0}], ids=str)
def test_packed_equals_padded_with_gradients(options):
    packed, model = cells([6, 1, 4]), build(**options)
    if "n_input_bins" in options:  # distinct values, no cell of one: no tie is drawn
        packed = replace(cells([6, 2, 4]), values=torch.arange(1, 13).double())
    genes, values, mask = padded(packed, 0)
    flags = packed.pad(packed.pert_flags)[0].masked_fill(mask, 2)
    want = model(genes, values, flags, mask, **ALL)
    want = {key: x[~mask] if key in PER_TOKEN else x for key, x in want.items()}
    got = model(packed, **ALL)
    assert set(got) == set(want)
    for key in want:
        torch.testing.assert_close(got[key], want[key])
    for one, other in zip(gradients(model, got), gradients(model, want), strict=True):
        torch.testing.assert_close(one, other)


def gradients(model, out):
    loss = sum((x * torch.arange(1, x.numel() + 1).view_as(x)).sum() for x in out.values())
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)


def test_positions_choose_what_the_decoders_compute():
    packed, model = cells([6, 3]), build(decoder_adaptive_bias=True)
    positions = torch.tensor([1, 5, 7])
    whole, chosen = model(packed, MVC=True), model(packed, MVC=True, positions=positions)
    for key in ("mlm_output", "mvc_output"):
        torch.testing.assert_close(chosen[key], whole[key][positions])


def test_eval_mode_samples_zero_probabilities_of_packed_cells():
    packed, model = cells([400, 300]), build(explicit_zero_prob=True).eval()
    out = model(packed)
    zeros = (out["mlm_output"] == 0).double()
    expected = 1 - out["mlm_zero_probs"]
    assert (zeros.sum() - expected.sum()).abs() < 6 * (expected * (1 - expected)).sum().sqrt()


def test_a_row_without_values_has_no_adaptive_bias():
    decoder = AffineExprDecoder(8, adaptive_bias=True)
    pred = decoder(torch.randn(2, 3, 8), torch.tensor([[0.0, 0, 0], [1, 2, 0]]))["pred"]
    assert torch.equal(pred[0], torch.zeros(3))


def test_encode_batch_takes_flags():
    packed, model = cells([5, 3, 4]), build()
    genes, values, mask = padded(packed, 0)
    flags = packed.pad(packed.pert_flags)[0]
    out = model.encode_batch(genes, values, mask, 2, input_pert_flags=flags)
    torch.testing.assert_close(out, model._encode(genes, values, flags, mask).float().detach())
    assert not torch.equal(out, model.encode_batch(genes, values, mask, 2))


def test_prediction_of_genes_that_no_cell_expresses_stays_zero():
    model = build().float()
    x = torch.tensor([[0.0, 0], [2, 1], [0, 0], [3, 0], [1, 0], [0, 0]])  # two cells, three genes
    moved = []
    batch = types.SimpleNamespace(x=x, pert=["a", "b"], to=moved.append)
    out = model.pred_perturb(batch, gene_ids=np.array([5, 6, 7]))
    assert out.shape == (2, 3)
    assert not out[:, 2].any()
    assert out[:, :2].all()
    assert moved == [torch.device("cpu")]
    assert not model.training


@pytest.mark.parametrize(("arguments", "error"), [
    ({"include_zero_gene": "none", "gene_ids": [1]}, ValueError), ({}, AssertionError)])
def test_prediction_refuses_what_it_cannot_read(arguments, error):
    with pytest.raises(error, match="gene"):
        build().pred_perturb(types.SimpleNamespace(), **arguments)


def test_refusals_say_why():
    packed = cells([3])
    with pytest.raises(ValueError, match="do_mvc"):
        build(do_mvc=False)(packed, MVC=True)
    with pytest.raises(ValueError, match="pert_flags"):
        build()(packed.__class__(packed.gene_ids, packed.values, packed.cu_seqlens, 3))
    with pytest.raises(ValueError, match="input_pert_flags"):
        build()(packed.gene_ids[None], None, None, None)
    with pytest.raises(ValueError, match="activation"):
        build(decoder_activation="Nothing")
    with pytest.raises(ValueError, match="without sizes"):
        build(decoder_activation="Linear")
    with pytest.raises(ValueError, match="cell_emb_style"):
        build(cell_emb_style="max")


def test_a_subclass_can_replace_how_cells_are_encoded_and_a_training_model_can_be_copied():
    class Louder(TransformerGenerator):
        def _encode(self, *args, **kwargs):
            return 2 * super()._encode(*args, **kwargs)

    model, (genes, values, mask) = build(), padded(cells([3, 2]), 0)
    batch = genes, values, torch.zeros_like(genes), mask
    louder = Louder(N_TOKENS, 16, 2, 12, 2, 2, 4, VOCAB, dropout=0.0, pad_value=0, use_fast_transformer=True).double()
    louder.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("mvc")})
    torch.testing.assert_close(louder(*batch)["mlm_output"], model.decoder(2 * model._encode(*batch), values)["pred"])
    want = model(*batch, MVC=True)
    assert torch.equal(copy.deepcopy(model)(*batch, MVC=True)["mvc_output"], want["mvc_output"])
    cell_emb = model._get_cell_emb_from_layer(model._encode(*batch))
    torch.testing.assert_close(model.mvc_decoder(cell_emb, model.cur_gene_token_embs)["pred"], want["mvc_output"])
