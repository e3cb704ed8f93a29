"""What the real scgpt package and ours are both asked: random models, calls and batches, each drawn from its number.

Imports `scgpt` by name, so the process decides whose it is. An answer is name -> tensor; what a package refuses is left
out. Only real tokens count: what stands at padding is nobody's promise.
"""
import random
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

TRUE_OR_NOT = (True, False)
STYLES = ("inner product", "inner product, detach", "concat query", "sum query")
N_TOKENS, N_BINS = 20, 9


def answers(numbers: range) -> dict[str, Tensor]:
    """Answers to every question of these numbers: question/number/what -> tensor."""
    found: dict[str, Tensor] = {}
    for name, ask in {"model": ask_model, "generator": ask_generator, "batches": ask_batches}.items():
        for number in numbers:
            draw = random.Random(f"{name} {number}")
            torch.manual_seed(number)
            np.random.seed(number)  # noqa: NPY002 what both draw from
            told: dict[str, Tensor] = {}
            ask(draw, told.__setitem__)
            found |= {f"{name}/{number}/{what}": answer.detach().clone() for what, answer in told.items()}
    return found


Tell = Callable[[str, Tensor], None]


def ask_model(draw: random.Random, tell: Tell) -> None:
    """Outputs, gradients, running statistics of a TransformerModel, and all its other methods."""
    pick, n_heads = draw.choice, draw.choice([1, 2, 4])
    style, pooling, labels_for = pick(["continuous", "continuous", "category", "scaling"]), _pooling(draw), pick(
        [{}, {}, {"use_batch_labels": True}, {"domain_spec_batchnorm": True}, {"domain_spec_batchnorm": "batchnorm"},
         {"domain_spec_batchnorm": "do_affine"}, {"use_batch_labels": True, "domain_spec_batchnorm": "dsbn"}])
    options = {"d_model": 4 * n_heads, "nhead": n_heads, "nlayers_cls": pick([1, 3]), "n_cls": pick([1, 4]),
               "pad_value": N_BINS - 1 if style == "category" else pick([-2, 0]), "do_dab": pick(TRUE_OR_NOT),
               "num_batch_labels": 3, "input_emb_style": style, "n_input_bins": N_BINS, **labels_for}
    model = _built(draw, "model", "TransformerModel", options | _shared(draw, pooling))
    genes, values, padding = _cells(draw, pooling, model)
    if style == "category":
        values = values.abs().clamp(max=N_BINS - 1).trunc()
    labels = torch.randint(3, (len(genes),)) if labels_for else None
    flags = {flag: pick(TRUE_OR_NOT) for flag in ("CLS", "MVC", "ECS", "do_sample")} | {"CCE": pooling != "w-pool"}
    _tell_forward(model, (genes, values, padding), {"batch_labels": labels, **flags}, ~padding, tell)
    model.eval()
    with torch.no_grad():
        hidden = model._encode(genes, values, padding, labels)
        tell("hidden", hidden[~padding])
        tell("pooled", model._get_cell_emb_from_layer(hidden, values))
        tell("generated", model.generate(torch.randn(len(genes), model.d_model).to(hidden), genes,
                                         pick([values, None]), padding, 1, labels)[~padding])
        for how in ({"time_step": 0}, {"time_step": 0, "return_np": True}, {"output_to_cpu": False}):
            encoded = torch.as_tensor(model.encode_batch(genes, values, padding, 2, batch_labels=labels, **how))
            tell(f"encoded {how}", encoded if "time_step" in how else encoded[~padding])


def ask_generator(draw: random.Random, tell: Tell) -> None:
    """Outputs and gradients of a TransformerGenerator, and what it predicts of a perturbation."""
    pick, n_heads, pooling = draw.choice, draw.choice([1, 2]), _pooling(draw)
    options = {"d_model": 4 * n_heads, "nhead": n_heads, "nlayers_cls": 2, "n_cls": 3, "pad_value": 0,
               "pert_pad_id": pick([0, 2]), "decoder_activation": pick([None, "Softplus", "Tanh"]),
               "decoder_adaptive_bias": pick(TRUE_OR_NOT)}
    model = _built(draw, "generation_model", "TransformerGenerator", options | _shared(draw, pooling))
    genes, values, padding = _cells(draw, pooling, model)
    flags = {flag: pick(TRUE_OR_NOT) for flag in ("CLS", "MVC", "ECS", "do_sample")}
    _tell_forward(model, (genes, values.abs() + 1, torch.randint(3, genes.shape), padding), flags, ~padding, tell)
    before = torch.rand(3 * 7, 2)
    before[:, 0] *= torch.rand(3 * 7) < 0.5
    before[::7, 0] = 1.0   # a cell without any value has no mean, NaN there
    batch = SimpleNamespace(x=torch.cat([before[:, :1], torch.randint(3, (21, 1)).float()], 1), pert=["x"] * 3,
                            to=lambda device: None)
    gene_ids = np.array([draw.randrange(N_TOKENS) for _ in range(7)])
    with torch.no_grad():
        tell("perturbed", model.float().pred_perturb(batch, pick(["all", "batch-wise"]), gene_ids=gene_ids))


def ask_batches(draw: random.Random, tell: Tell) -> None:
    """Bins, collated and tokenized batches, masks and losses."""
    pick, counts = draw.choice, np.random.RandomState(draw.randrange(1 << 30))
    binning = import_module("scgpt.preprocess").binning
    for kind, row in {"counts": counts.poisson(1.5, 60), "normal": counts.randn(60).astype(np.float32)}.items():
        tell(f"bins of {kind}", torch.as_tensor(binning(row, pick([5, 51]))))
        tell(f"bins of tensor of {kind}", binning(torch.from_numpy(row + 0.5), n_bins=51))
    cells = [{"genes": torch.randint(40, (n,)), "expressions": torch.randint(0, 6, (n,)).float()} for n in (25, 6, 9)]
    collate = import_module("scgpt.data_collator").DataCollator(
        pad_token_id=0, pad_value=pick([-2, 0]), do_mlm=pick(TRUE_OR_NOT), do_binning=pick(TRUE_OR_NOT), max_length=12,
        mlm_probability=pick([0.15, 0.5]), sampling=pick(TRUE_OR_NOT), keep_first_n_tokens=pick([0, 1, 2]))
    for key, batch in collate(cells).items():
        tell(f"collated {key}", batch)
    tokenizer = import_module("scgpt.tokenizer.gene_tokenizer")
    how = {"append_cls": pick(TRUE_OR_NOT), "include_zero_gene": pick(TRUE_OR_NOT)}
    tokens = tokenizer.tokenize_and_pad_batch(counts.poisson(1.0, (3, 30)), np.arange(2, 32), pick([8, 40]),
                                              {"<pad>": 0, "<cls>": 1}, "<pad>", -2, **how)
    for key, batch in tokens.items():
        tell(f"tokenized {key}", batch)
    tell("masked", tokenizer.random_mask_value(tokens["values"], mask_ratio=0.4, pad_value=-2))
    loss = import_module("scgpt.loss")
    pred, target = torch.rand(2, 3, 8, dtype=torch.float64).clamp(0.01, 0.99)
    hidden = torch.rand(3, 8) < 0.5
    hidden[0, 0] = True
    for name in ("masked_mse_loss", "criterion_neg_log_bernoulli", "masked_relative_error"):
        tell(name, getattr(loss, name)(pred, target, hidden))
    tell("masked_mse_loss of weights", loss.masked_mse_loss(pred, target, torch.rand(3, 8)))


def _pooling(draw: random.Random) -> str:
    return draw.choice(["cls", "cls", "avg-pool", "w-pool"])


def _shared(draw: random.Random, pooling: str) -> dict[str, object]:
    style = draw.choice(STYLES)
    return {"ntoken": N_TOKENS, "d_hid": draw.choice([3, 16]), "nlayers": draw.choice([1, 2]), "dropout": 0.0,
            "vocab": {"<pad>": draw.randrange(N_TOKENS)}, "do_mvc": True, "cell_emb_style": pooling,
            "mvc_decoder_style": style, "ecs_threshold": draw.choice([0.0, 0.3]), "pre_norm": draw.choice(TRUE_OR_NOT),
            "explicit_zero_prob": draw.choice(TRUE_OR_NOT), "use_fast_transformer": draw.choice(TRUE_OR_NOT)}


def _built(draw: random.Random, module: str, name: str, options: dict[str, object]) -> torch.nn.Module:
    """A model with weights drawn name by name, in float64 or float32, training or not."""
    model = getattr(import_module(f"scgpt.model.{module}"), name)(**options)
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, dtype=torch.float64) + (0.5 if name.endswith("var") else -0.4))
    return model.to(draw.choice([torch.float64, torch.float32])).train(draw.choice(TRUE_OR_NOT))


def _cells(draw: random.Random, pooling: str, model: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Genes, values and padding (cells, tokens), two cells or more; without padding where pooling counts it."""
    shape = (draw.choice([2, 4]), draw.choice([1, 2, 7]))
    padding = (torch.rand(shape) < draw.choice([0.0, 0.5])) & (pooling == "cls")
    padding[:, 0] = False
    values = torch.randn(shape, dtype=torch.float64) * draw.choice([1, 3, 400])
    return torch.randint(N_TOKENS, shape), values.to(next(model.parameters())), padding


def _tell_forward(model: torch.nn.Module, arguments: tuple[Tensor, ...], options: dict[str, object], real: Tensor,
                  tell: Tell) -> None:
    """Outputs, running statistics, and the gradients of a random weighing of the outputs."""
    if model.mvc_decoder.arch_style.endswith("query"):
        options = options | {"MVC": False}   # upstream takes the tensor that this decoder returns for a dictionary
    output = model(*arguments, **options)
    loss = torch.zeros((), dtype=torch.float64)
    for name, answer in sorted(output.items()):
        chosen = answer[real] if answer.shape == real.shape else answer
        tell(name, chosen)
        loss = loss + (chosen * torch.rand(chosen.shape).to(chosen)).sum()
    loss.backward()
    for name, weight in model.named_parameters():
        tell(f"gradient of {name}", torch.zeros_like(weight) if weight.grad is None else weight.grad)
    for name, statistic in model.named_buffers():
        tell(f"statistic {name}", statistic)
