"""TransformerModel beyond the golden vectors: packed equals padded, generative equals a dense mask, refusals."""
import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scgpt.model.decoders import MVCDecoder
from scgpt.model.model import TransformerModel
from tests.scgpt.model.packs import N_TOKENS, PAD_ID, VOCAB, cells, padded, sees

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=5)
PER_TOKEN = ("mlm_output", "mvc_output", "mlm_zero_probs", "mvc_zero_probs")
ALL = {"CLS": True, "MVC": True, "ECS": True, "CCE": True}
OPTIONS = {
    "flash": {},
    "torch": {"use_fast_transformer": False},
    "linear": {"fast_transformer_backend": "linear"},
    "pre_norm": {"pre_norm": True},
    "category": {"input_emb_style": "category", "n_input_bins": 11, "pad_value": 9},
    "scaling": {"input_emb_style": "scaling"},
    "labels": {"use_batch_labels": True, "num_batch_labels": 3, "do_dab": True, "explicit_zero_prob": True},
    "w-pool": {"cell_emb_style": "w-pool", "pad_value": 0},
    "concat query": {"mvc_decoder_style": "concat query"},
    "sum query": {"mvc_decoder_style": "sum query"},
    "detach": {"mvc_decoder_style": "inner product, detach"},
}


def build(model_type=TransformerModel, **options) -> TransformerModel:
    torch.manual_seed(1)
    settings_ = {"use_fast_transformer": True, "dropout": 0.0, "do_mvc": True, "n_cls": 3, "vocab": VOCAB,
                 "pad_value": -2} | options
    return model_type(N_TOKENS, 16, 2, 12, 2, **settings_).double()


def labels_of(options, packed):
    wants = options.get("use_batch_labels") or options.get("domain_spec_batchnorm")
    return packed.batch_labels if wants else None


def loss_of(out: dict[str, torch.Tensor]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for _, x in sorted(out.items()))


def gradients(model, out) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(out).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-10,
                                   msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=6, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_packed_equals_padded_with_gradients(name, lengths, seed):
    options = OPTIONS[name]
    packed, model = cells(lengths, seed=seed, n_labels=3), build(**options)
    packed_labels = labels_of(options, packed)
    genes, values, mask = padded(packed, options.get("pad_value", -2))
    want = model(genes, values, mask, batch_labels=packed_labels, **ALL)
    want = {key: x[~mask] if key in PER_TOKEN else x for key, x in want.items()}
    want_gradients = gradients(model, want)
    if packed_labels is None:
        packed = cells(lengths, seed=seed)
    got = model(packed, **ALL)
    assert_same(got, want)
    assert_same(gradients(model, got), want_gradients)


def test_packed_average_is_that_of_the_real_tokens():
    packed, model = cells([4, 1, 6]), build(cell_emb_style="avg-pool")
    genes, values, mask = padded(packed)
    hidden = model._encode(genes, values, mask)
    want = torch.stack([row[~padding].mean(0) for row, padding in zip(hidden, mask, strict=True)])
    torch.testing.assert_close(model(packed)["cell_emb"], want)


@pytest.mark.parametrize("style", ["dsbn", "batchnorm"])
def test_batch_norm_of_packed_cells_counts_real_tokens_only(style):
    """Without padding both forms see the same tokens: same output, same running statistics."""
    packed = cells([5, 5, 5], n_labels=3)
    genes, values, mask = padded(packed)
    assert not mask.any()
    first, second = (build(domain_spec_batchnorm=style, num_batch_labels=3) for _ in range(2))
    want = second(genes, values, mask, batch_labels=packed.batch_labels)
    got = first(packed)
    torch.testing.assert_close(got["mlm_output"], want["mlm_output"][~mask])
    assert_same(dict(first.named_buffers()), dict(second.named_buffers()))


@pytest.mark.parametrize("options", [{}, {"explicit_zero_prob": True}, {"mvc_decoder_style": "concat query"}], ids=str)
def test_positions_choose_what_the_decoders_compute(options):
    packed, model = cells([6, 2, 9], n_labels=3), build(use_batch_labels=not options, num_batch_labels=3, **options)
    packed = packed if not options else cells([6, 2, 9])
    positions = torch.tensor([1, 2, 7, 16])
    whole, chosen = model(packed, MVC=True), model(packed, MVC=True, positions=positions)
    per_token = [key for key in PER_TOKEN if key in whole]
    assert_same({key: chosen[key] for key in per_token}, {key: whole[key][positions] for key in per_token})
    assert_same({"cell_emb": chosen["cell_emb"]}, {"cell_emb": whole["cell_emb"]})


@given(name=st.sampled_from(sorted(OPTIONS)), lengths=LENGTHS, seed=st.integers(0, 99), recompute=st.booleans(),
       data=st.data())
@example(name="category", lengths=[2, 2], seed=0, recompute=False, data=None)
@settings(max_examples=100, deadline=None)
def test_what_positions_leave_out_changes_no_output_and_no_gradient(name, lengths, seed, recompute, data):
    """The last layer attends at the cells' first tokens and at the positions only: any order, also twice."""
    model, packed = build(**OPTIONS[name]), cells(lengths, seed=seed, n_labels=3 if name == "labels" else 0)
    if hasattr(model.transformer_encoder, "recompute"):
        model.transformer_encoder.recompute = recompute
    drawn = [0, 0] if data is None else data.draw(st.lists(st.integers(0, sum(lengths) - 1), max_size=8))
    positions = torch.tensor(drawn, dtype=torch.long)
    whole = model(packed, **ALL)
    whole = {key: x.index_select(0, positions) if key in PER_TOKEN else x for key, x in whole.items()}
    want = gradients(model, whole)
    chosen = model(packed, **ALL, positions=positions)
    assert_same(chosen, whole)
    assert_same(gradients(model, chosen), want)


def test_the_last_layer_computes_nothing_else():
    model, packed = build(), cells([5, 7])
    seen = []
    model.transformer_encoder.layers[-1].linear1.register_forward_hook(lambda *x: seen.append(len(x[1][0])))
    model(packed, MVC=True, positions=torch.tensor([6, 2, 11]))
    assert seen == [2 + 3]


def test_no_position_is_no_output_and_no_gradient_but_all_modules_run():
    packed, model = cells([3, 2]), build()
    out = model(packed, MVC=True, positions=torch.zeros(0, dtype=torch.long))
    (out["mlm_output"].sum() + out["mvc_output"].sum()).backward()
    assert all(p.grad is not None for p in model.decoder.parameters())


def parts(packed):
    """A split packed batch as upstream's five padded tensors."""
    perception, generation = [], []
    for i, (start, end) in enumerate(itertools.pairwise(packed.cu_seqlens.tolist())):
        n = int(packed.cu_perception.diff()[i])
        perception.append(slice(start, start + n))
        generation.append(slice(start + n, end))

    def stack(rows, x, fill):
        width = max(row.stop - row.start for row in rows)
        return torch.stack([torch.nn.functional.pad(x[row], (0, width - (row.stop - row.start)), value=fill)
                            for row in rows])

    genes, gen_genes = stack(perception, packed.gene_ids, PAD_ID), stack(generation, packed.gene_ids, PAD_ID)
    real = torch.ones_like(packed.gene_ids)
    masks = [stack(rows, real, 0) == 0 for rows in (perception, generation)]
    return genes, stack(perception, packed.values, -2), masks[0], gen_genes, masks[1]


@pytest.mark.parametrize("options", [{}, {"pre_norm": True}, {"explicit_zero_prob": True}], ids=str)
@pytest.mark.parametrize("prompted", [False, True])
@settings(max_examples=6, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_generative_packed_equals_padded_with_gradients(options, prompted, lengths, seed):
    whole = cells(lengths, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    packed = whole.split(torch.tensor([int(torch.randint(1, n + 1, (), generator=generator)) for n in lengths]))
    model = build(use_generative_training=True, **options)
    prompt = torch.randn(len(lengths), 16, generator=generator, dtype=torch.float64) if prompted else None
    genes, values, mask, gen_genes, gen_mask = parts(packed)
    out = model(genes, values, mask, gen_genes, gen_mask, None, True, False, True, input_cell_emb=prompt,
                generative_training=True)
    real = torch.cat([~mask, ~gen_mask], 1)
    joined = {"mlm_output": torch.cat([out["pcpt_preds"], out["gen_preds"]], 1)[real],
              "mvc_output": out["mvc_output"][real], "cell_emb": out["cell_emb"], "cls_output": out["cls_output"]}
    if "zero_probs" in out:
        joined |= {"mlm_zero_probs": out["zero_probs"][real], "mvc_zero_probs": out["mvc_zero_probs"][real]}
    want_gradients = gradients(model, joined)
    got = model(packed, CLS=True, MVC=True, input_cell_emb=prompt)
    assert_same(got, joined)
    assert_same(gradients(model, got), want_gradients)


def test_generative_model_equals_a_dense_masked_transformer():
    """One layer written out with a dense mask: out_proj for perception only, own key for generation."""
    packed = cells([6, 3, 5]).split(torch.tensor([4, 1, 5]))
    model = build(use_generative_training=True)
    model.transformer_encoder.layers = model.transformer_encoder.layers[:1]
    layer, generation = model.transformer_encoder.layers[0], packed.is_generation
    embs = model.encoder(packed.gene_ids) + torch.where(
        generation[:, None], model.flag_encoder.weight[1], model.value_encoder(packed.values))
    q, k, v = (x.unflatten(-1, (2, 8)) for x in layer.self_attn.Wqkv(embs).chunk(3, -1))
    logits = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
    context = torch.einsum("hqk,khd->qhd", logits.masked_fill(~sees(packed), -torch.inf).softmax(-1), v).flatten(1)
    attended = torch.where(generation[:, None], context, layer.self_attn.out_proj(context))
    hidden = layer.norm1(embs + attended)
    hidden = layer.norm2(hidden + layer.linear2(layer.linear1(hidden).relu()))
    torch.testing.assert_close(model(packed)["mlm_output"], model.decoder(hidden)["pred"])


def test_generative_model_runs_the_masked_forward_too():
    packed, model = cells([5, 3]), build(use_generative_training=True)
    genes, values, mask = padded(packed)
    want = model(genes, values, mask, None, None, generative_training=True)
    got = model(genes, values, mask, generative_training=False)
    torch.testing.assert_close(got["mlm_output"][~mask], want["pcpt_preds"][~mask])
    assert model.generate(torch.randn(2, 16).double(), genes).shape == genes.shape
    assert model.encode_batch(genes, values, mask, batch_size=1).dtype == torch.float32


@pytest.mark.parametrize("style", ["dsbn", "do_affine"])
def test_generative_batch_norm_runs_over_both_parts_in_turn(style):
    packed = cells([4, 4], n_labels=3).split(torch.tensor([2, 2]))
    first, second = (build(use_generative_training=True, domain_spec_batchnorm=style, num_batch_labels=3)
                     for _ in range(2))
    genes, values, mask, gen_genes, gen_mask = parts(packed)
    want = second(genes, values, mask, gen_genes, gen_mask, batch_labels=packed.batch_labels, generative_training=True)
    got = first(packed)["mlm_output"].unflatten(0, (2, 4))
    torch.testing.assert_close(got, torch.cat([want["pcpt_preds"], want["gen_preds"]], 1))
    assert_same(dict(first.named_buffers()), dict(second.named_buffers()))


def test_padding_of_a_row_without_perception_is_finite():
    genes, values = torch.tensor([[2, 3], [4, 5]]), torch.ones(2, 2).double()
    mask = torch.tensor([[True, True], [False, True]])
    out = build(use_generative_training=True)(genes, values, mask, genes, torch.tensor([[False, True], [True, True]]),
                                              generative_training=True)
    assert all(x.isfinite().all() for x in out.values())


def test_contrast_compares_two_views_with_dropout():
    packed, model = cells([5, 4, 6]), build(dropout=0.3)
    torch.manual_seed(0)
    noisy = model(packed, CCE=True)["loss_cce"]
    exact = model.eval()(packed, CCE=True)["loss_cce"]
    assert noisy != exact
    views = model(packed)["cell_emb"]
    cosine = torch.nn.functional.cosine_similarity(views[:, None], views[None], dim=-1) / 0.5
    torch.testing.assert_close(exact, torch.nn.functional.cross_entropy(cosine, torch.arange(3)))


@pytest.mark.parametrize(("options", "arguments", "word"), [
    ({}, {"positions": torch.tensor([0])}, "packed"),
    ({"do_mvc": False}, {"MVC": True}, "do_mvc"),
    ({}, {"generative_training": True}, "use_generative_training"),
    ({"use_generative_training": True, "n_cls": 1}, {"CLS": True}, "n_cls"),
    ({"use_generative_training": True, "cell_emb_style": "w-pool"}, {"generative_training": True}, "w-pool"),
    ({"use_generative_training": True, "input_emb_style": "scaling"}, {"generative_training": True}, "scaling"),
    ({"mvc_decoder_style": "sum query", "use_batch_labels": True, "num_batch_labels": 2},
     {"MVC": True, "batch_labels": torch.tensor([0, 1])}, "batch labels"),
])
def test_a_call_that_cannot_be_is_refused_with_the_reason(options, arguments, word):
    genes, values, mask = padded(cells([3, 2]))
    with pytest.raises(ValueError, match=word):
        build(**options)(genes, values, mask, **arguments)


@pytest.mark.parametrize(("options", "word"), [
    ({"vocab": None}, "vocab"), ({"domain_spec_batchnorm": True}, "num_batch_labels"),
    ({"do_dab": True}, "num_batch_labels"), ({"cell_emb_style": "max"}, "cell_emb_style"),
    ({"input_emb_style": "category"}, "n_input_bins"), ({"input_emb_style": "other"}, "input_emb_style"),
    ({"fast_transformer_backend": "other"}, "fast_transformer_backend"),
    ({"mvc_decoder_style": "other"}, "MVC decoder"),
    ({"use_generative_training": True, "fast_transformer_backend": "linear"}, "softmax"),
])
def test_an_option_that_cannot_be_is_refused_with_the_reason(options, word):
    with pytest.raises(ValueError, match=word):
        build(**options)


def test_padding_row_is_drawn_like_the_rest_and_never_trained():
    model = build()
    assert model.encoder.embedding.weight.abs().max() <= 0.1
    assert model.encoder.embedding.weight[PAD_ID].abs().max() > 0
    genes, values, mask = padded(cells([3, 1]))
    model(genes, values, mask)["mlm_output"].sum().backward()
    assert not model.encoder.embedding.weight.grad[PAD_ID].any()


def test_layers_start_as_copies_of_one():
    first, second = build().transformer_encoder.layers
    assert_same(first.state_dict(), second.state_dict())
    assert first.linear1.weight is not second.linear1.weight


def test_query_style_decoder_keeps_upstreams_return_type():
    assert isinstance(MVCDecoder(8, "concat query")(torch.zeros(2, 8), torch.zeros(2, 3, 8)), torch.Tensor)


@pytest.mark.parametrize(("options", "labels_wanted"), [
    ({"mvc_decoder_style": "sum query", "explicit_zero_prob": True}, False),
    ({"mvc_decoder_style": "concat query", "use_batch_labels": True, "num_batch_labels": 2}, True),
    ({"domain_spec_batchnorm": "batchnorm"}, True), ({"domain_spec_batchnorm": "do_affine"}, True)], ids=str)
def test_what_upstream_builds_and_runs_is_built_and_run(options, labels_wanted):
    genes, values, mask = padded(cells([3, 2]))
    labels = torch.zeros(2, dtype=torch.long) if labels_wanted else None
    assert build(**options)(genes, values, mask, labels)["mlm_output"].isfinite().all()


def test_a_subclass_can_replace_how_padded_cells_are_encoded():
    class Louder(TransformerModel):
        def _encode(self, *args, **kwargs):
            return 2 * super()._encode(*args, **kwargs)

    plain, louder = build(), build(Louder)
    batch = padded(cells([3, 2]))
    torch.testing.assert_close(louder(*batch)["cell_emb"], 2 * plain(*batch)["cell_emb"])
    assert_same(louder(*batch, MVC=True), louder(*batch, batch_labels=None, MVC=True))


def test_parts_of_the_forward_give_what_the_forward_gives():
    model, (genes, values, mask) = build(cell_emb_style="w-pool", pad_value=0), padded(cells([3, 2]))
    want = model(genes, values, mask, MVC=True)
    hidden = model._encode(genes, values, mask)
    cell_emb = model._get_cell_emb_from_layer(hidden, values)
    assert_same({"mlm_output": model.decoder(hidden)["pred"], "cell_emb": cell_emb,
                 "mvc_output": model.mvc_decoder(cell_emb, model.cur_gene_token_embs)["pred"]}, want)


def test_a_model_that_is_training_can_be_copied_and_pickled():
    model, batch = build(), padded(cells([3, 2]))
    want = model(*batch)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(again(*batch), want)


def test_generation_takes_one_embedding_for_all_cells_and_ignores_labels_it_has_no_use_for():
    model, (genes, values, mask) = build(), padded(cells([3, 2]))
    one = torch.randn(16, dtype=torch.float64)
    want = model.generate(one.repeat(2, 1), genes, values, mask)
    assert torch.equal(model.generate(one, genes, values, mask), want)
    with pytest.warns(UserWarning, match="not used"):
        assert torch.equal(model.generate(one[None], genes, values, mask, batch_labels=torch.tensor([0, 1])), want)


def test_encode_batch_of_no_cells_is_empty():
    nothing = torch.zeros(0, 3)
    out = build().encode_batch(nothing.long(), nothing.double(), nothing.bool(), 4)
    assert out.shape == (0, 3, 16)
