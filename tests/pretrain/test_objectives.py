import numpy as np
import pytest
import torch

from pretrain.config import TrainConfig
from pretrain.data import to_tensors
from pretrain.objectives import Objective
from scgpt.collate import collate
from scgpt.config import load_config
from scgpt.errors import ConfigError
from scgpt.model.build import build_model
from tests.pretrain.reference import loss_of
from tests.scgpt.data.cells import N_TOKENS, random_cells

VOCAB = {token: i for i, token in enumerate([*(f"g{i}" for i in range(N_TOKENS - 3)), "<pad>", "<cls>", "<eoc>"])}
SMALL = ("data.corpus=none", "model.n_layers=1", "model.d_model=8", "model.n_heads=2", "model.d_hid=8",
         "objective.context_length=20", "objective.mask_ratio=0.5")
GENERATIVE = ("model.generative=true", "objective.task=both", "objective.cell_prompt_after=0")
LABELS = ("data.batch_column=donor", "model.n_batch_labels=3")
CASES = {
    "masked": (), "masked without MVC": ("objective.mvc=false",),
    "generative": ("model.generative=true", "objective.task=gen"), "prompted by the cell": GENERATIVE,
    "generative without MVC, averaged": (*GENERATIVE, "objective.mvc=false", "model.cell_emb_style=avg-pool"),
    "zero probabilities": ("model.explicit_zero_prob=true", "objective.weights.zero_prob=30"),
    "generative zero probabilities": (*GENERATIVE, "model.explicit_zero_prob=true", "objective.weights.zero_prob=30"),
    "classes": ("objective.weights.cls=50", "model.n_cls=4", "data.class_column=cell_type"),
    "similarity": ("objective.weights.ecs=100", "model.ecs_threshold=0.8"),
    "contrast": ("objective.weights.cce=100",),
    "generative contrast": (*GENERATIVE, "objective.weights.cce=100", "objective.weights.ecs=100"),
    "domains": (*LABELS, "model.dab=true", "objective.weights.dab=50"),
    "batch labels": (*LABELS, "model.use_batch_labels=true"),
    "generative batch labels": (*LABELS, *GENERATIVE, "model.use_batch_labels=true"),
    "batch norm": (*LABELS, "model.domain_spec_batchnorm=batchnorm"),
    "domain norm": (*LABELS, "model.domain_spec_batchnorm=dsbn"),
    "generative domain norm": (*LABELS, *GENERATIVE, "model.domain_spec_batchnorm=do_affine"),
    "torch's names": ("model.layers=torch",),
    "linear attention": ("model.layers=linear",),
    "inner product, detach": ("model.mvc_decoder_style='inner product, detach'", "objective.weights.mvc=3"),
    "concat query": ("model.mvc_decoder_style='concat query'",),
    "sum query": ("model.mvc_decoder_style='sum query'",),
    "generative concat query": (*GENERATIVE, "model.mvc_decoder_style='concat query'"),
    "generative sum query": (*GENERATIVE, "model.mvc_decoder_style='sum query'"),
    "weighted pooling": ("model.cell_emb_style=w-pool",),
    "categories": ("model.input_emb_style=category", "model.n_input_bins=53"),
    "generative categories": (*GENERATIVE, "model.input_emb_style=category", "model.n_input_bins=53"),
    "scaling": ("model.input_emb_style=scaling",),
    "pre-norm": ("model.pre_norm=true",),
    "generator": ("model.kind=generator",),
    "generator, averaged, with classes": ("model.kind=generator", "model.cell_emb_style=avg-pool", "model.n_cls=4",
                                          "objective.weights.cls=50", "data.class_column=cell_type"),
    "generator with zero probabilities": ("model.kind=generator", "model.explicit_zero_prob=true",
                                          "model.decoder_adaptive_bias=true"),
}
# Upstream's padded rows count padding in these: cells that fill the context have none.
COUNTS_PADDING = ("avg-pool", "w-pool", "batchnorm", "adaptive_bias")


def config_of(*settings: str) -> TrainConfig:
    return load_config(TrainConfig, "demo", [*SMALL, *settings], kind="pretrain")


def packed_of(config, cells, *, mask=True):
    packed = collate(cells, config.collate_config(), cls_id=VOCAB["<cls>"], seed=0, epochs=0, mask=mask)
    ids = cells.columns["cell_id"].astype(np.int64)
    classes = np.where(ids % 5 == 3, -1, ids % 4).astype(np.int32)   # some unknown
    return type(packed)(**{name: getattr(packed, name) for name in packed.__slots__}
                        | {"class_labels": classes, "batch_labels": (ids % 3).astype(np.int32)})


def model_of(config):
    torch.manual_seed(0)
    return build_model(config.model, VOCAB).double()


def double(batch):
    batch = to_tensors(batch, "cpu")
    inputs = type(batch.inputs)(**{name: getattr(batch.inputs, name) for name in batch.inputs.__slots__}
                                | {"values": batch.inputs.values.double()})
    return type(batch)(**{name: getattr(batch, name) for name in batch.__slots__} | {"inputs": inputs})


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_are_those_of_a_padded_float64_loss(case):
    """One micro-batch: what is normalised over the global batch, is so over it."""
    config = config_of(*CASES[case])
    even = any(word in " ".join(CASES[case]) for word in COUNTS_PADDING)
    cells = random_cells([25, 30, 19, 22] if even else [5, 18, 30, 2, 12, 25, 9])
    batch, model, objective = packed_of(config, cells), model_of(config), Objective.of(config)
    sums = objective.sums(model, double(batch), step=5)
    found = sums.scaled(counts=objective.counts([batch], step=5), copies=1)
    gradients = gradient_of(model, found)
    padded = {name: torch.from_numpy(array) for name, array
              in batch.padded(VOCAB["<pad>"], config.collate_config().pad_value).items()}
    padded |= {"class_labels": torch.from_numpy(batch.class_labels).long(),
               "batch_labels": torch.from_numpy(batch.batch_labels).long()}
    expected = loss_of(model, padded, config, 5)
    assert found.item() == pytest.approx(expected.item(), rel=2e-6)   # sums are float32
    reference = gradient_of(model, expected)
    whole = torch.cat([gradient.flatten() for gradient in reference.values()]).norm()
    assert gradients.keys() >= reference.keys()
    for name, gradient in gradients.items():
        difference = gradient - reference.get(name, torch.zeros_like(gradient))
        assert float(difference.norm()) < 1e-5 * float(whole), name


@pytest.mark.parametrize("case", CASES)
def test_every_term_moves_the_weights(case):
    """A term of weight 0 gives another gradient: none is left out in silence."""
    config = config_of(*CASES[case])
    batch, model, objective = packed_of(config, random_cells([5, 18, 30, 2])), model_of(config), Objective.of(config)
    terms = objective.sums(model, double(batch), step=5).terms
    assert set(terms) == set(objective.weights)
    for name, term in terms.items():
        model.zero_grad()
        term.backward(retain_graph=True)
        assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) > 1e-6, name


@pytest.mark.parametrize("settings", [(), GENERATIVE, CASES["zero probabilities"], CASES["classes"], CASES["domains"]],
                         ids=["masked", "generative", "zero", "classes", "domains"])
def test_parts_of_a_batch_add_up_to_the_whole_in_loss_and_gradient(settings):
    """However a global batch is cut up: the mean of the parts' scaled losses has the gradient of the whole's mean."""
    config = config_of(*settings)
    model, objective, cells = model_of(config), Objective.of(config), random_cells([5, 18, 30, 2])
    counts = objective.counts([packed_of(config, cells)], step=9)

    def gradient(parts):
        model.zero_grad()
        for part in parts:
            sums = objective.sums(model, double(packed_of(config, cells.take(np.array(part)))), step=9)
            (sums.scaled(counts=counts, copies=len(parts)) / len(parts)).backward()   # DeepSpeed's mean over parts
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradient([[0, 1, 2, 3]])
    assert whole.abs().max() > 1
    assert torch.allclose(gradient([[0], [1, 3], [2]]), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [(), GENERATIVE], ids=["masked", "generative"])
def test_a_batch_that_hides_nothing_teaches_nothing_but_runs_every_module(settings):
    config = config_of(*settings)
    model, objective = model_of(config), Objective.of(config)
    batch = packed_of(config, random_cells([5, 6]), mask=False)
    loss = objective.sums(model, double(batch), step=5).scaled(counts=objective.counts([batch], step=5), copies=2)
    assert loss.item() == 0.0
    loss.backward()
    assert float(model.decoder.fc[0].weight.grad.abs().max()) == 0.0


def test_generation_is_prompted_by_the_cell_only_after_the_set_number_of_steps_and_never_in_evaluation():
    config = config_of(*GENERATIVE[:2], "objective.cell_prompt_after=7")
    objective, model = Objective.of(config), model_of(config)
    batch = packed_of(config, random_cells([5, 18]))
    for step, prompts in ((0, False), (6, False), (7, True), (8, True), (None, False)):
        sums = objective.sums(model, double(batch), step=step)
        assert ("loss_prompted" in sums.terms) == prompts == objective.prompts(step)
        counts = objective.counts([batch], step=step)
        means = objective.means(sums.detached().tolist(), counts)
        assert ("loss_prompted" in means) == prompts
        assert len(sums.detached()) == len(objective.names)


def test_no_gradient_flows_through_the_prompt():
    """The first pass's parameters that only the cell embedding touches get nothing from the prompted term."""
    config = config_of(*GENERATIVE, "objective.mvc=false")
    objective, model = Objective.of(config), model_of(config)
    term = objective.sums(model, double(packed_of(config, random_cells([5, 18]))), step=0).terms["loss_prompted"]
    model.zero_grad()
    term.backward()
    cls_row = model.encoder.embedding.weight.grad[VOCAB["<cls>"]]
    assert float(cls_row.abs().max()) == 0.0   # its embedding is replaced by the prompt, which is detached
    assert float(model.flag_encoder.weight.grad[1].abs().max()) > 0


def test_the_loss_of_a_step_is_the_weighted_sum_of_its_terms_without_the_relative_error():
    objective = Objective({"loss_expression": 1.0, "loss_mvc": 2.0})
    assert objective.weighted({"loss_expression": 2.0, "loss_mvc": 3.0, "mre": 100.0}) == 8.0
    means = objective.means([4.0, 6.0, 200.0], [2])
    assert means == {"loss": 8.0, "loss_expression": 2.0, "loss_mvc": 3.0, "mre": 100.0}


@pytest.mark.parametrize(("settings", "says"), [
    (("objective.task=both",), "needs a generative model"),
    ((*GENERATIVE, "model.input_emb_style=scaling"), "no value to scale"),
    ((*GENERATIVE, "model.cell_emb_style=w-pool"), "no value to weigh by"),
    (("model.mvc=false",), "needs the model's MVC decoder"),
    (("objective.weights.cls=1",), "needs classes"),
    (("model.dab=true", "model.n_batch_labels=2"), "set data.batch_column"),
    (("model.kind=generator", "objective.weights.cce=1"), "no cell embedding"),
    (("model.input_emb_style=category", "model.n_input_bins=51"), "n_input_bins=53"),
    (("model.layers=linear", "train.recompute=true"), "cannot be computed again"),
    (("model.mvc_decoder_style='sum query'", "model.explicit_zero_prob=true"), "set it to 'inner product'"),
])
def test_what_does_not_go_together_is_refused_in_one_sentence(settings, says):
    with pytest.raises(ConfigError) as caught:
        config_of(*settings)
    assert says in str(caught.value)
