"""Pretraining as one would write it in an afternoon: float64, one process, padded rows, the whole global batch at once.

Nothing of pretrain.objectives or pretrain.engine is used: what both compute is written down a second time.
"""
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.data import Loader
from pretrain.first_model import torch_seed
from pretrain.schedule import learning_rate
from scgpt.model.build import build_model
from scgpt.rng import PURPOSE_WEIGHTS
from scgpt.vocab import CLS, PAD

Tensors = dict[str, torch.Tensor]


def first_weights(config: TrainConfig, *, rounded: bool = False) -> torch.nn.Module:
    """The model that the engine begins with, in float64; `rounded` to bfloat16 first, as DeepSpeed keeps it."""
    torch.manual_seed(torch_seed(config.train.seed, 0, 0, PURPOSE_WEIGHTS))
    model = build_model(config.model, Corpus.open(config).vocab)
    return (model.bfloat16() if rounded else model).double()


def plain_loop(config: TrainConfig, steps: int, *, rounded: bool = False) -> dict[str, Any]:
    """{"weights" after the steps, "gradients" of the last one before clipping, "first" weights, number of "updates"}.

    A step whose loss no float32 holds is left out.
    """
    corpus, model = Corpus.open(config), first_weights(config, rounded=rounded)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, eps=config.optimizer.eps,
                                  betas=config.optimizer.betas, weight_decay=config.optimizer.weight_decay)
    loader = Loader(corpus.train, config.collate_config(), cls_id=corpus.vocab[CLS], seed=config.train.seed,
                    global_batch_size=config.batch.global_batch_size, micro_batch_size=config.batch.global_batch_size,
                    workers=0, labels=corpus.train_labels)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    updates = 0
    for step in range(steps):
        (packed,) = loader.load(step).micro_batches
        padded = {name: torch.from_numpy(array) for name, array in packed.padded(corpus.vocab[PAD], -2).items()}
        padded |= {name: torch.from_numpy(labels).long() for name in ("class_labels", "batch_labels")
                   if (labels := getattr(packed, name)) is not None}
        optimizer.zero_grad()
        loss = loss_of(model, padded, config, step)
        if not loss.float().isfinite():
            continue
        loss.backward()
        for parameter in model.parameters():   # a part that is not trained still decays
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, lr=config.optimizer.lr, schedule=config.schedule, total_steps=steps)
        optimizer.step()
        updates += 1
    return {"weights": dict(model.state_dict()), "gradients": gradients, "first": first, "updates": updates}


def loss_of(model: torch.nn.Module, padded: Tensors, config: TrainConfig, step: int) -> torch.Tensor:
    """The loss of a padded batch in upstream's own words, term by term."""
    weights, asked = config.objective.weights, config.objective
    flags = {"MVC": asked.mvc, "CLS": weights.cls > 0, "ECS": weights.ecs > 0}
    inputs = masked_inputs(padded, config) if asked.task == "pcpt" else generative_inputs(padded)
    predict = partial(forward, model, padded, config, inputs)
    output = predict(**flags)
    targets, where = inputs.targets[inputs.where], inputs.where
    loss = (output["predictions"][where] - targets).square().mean()
    if asked.mvc:
        loss = loss + weights.mvc * (output["mvc_output"][where] - targets).square().mean()
    if config.model.explicit_zero_prob:   # every target is above 0
        loss = loss - weights.zero_prob * output["zero_probs"][where].log().mean()
        if asked.mvc:
            loss = loss - weights.mvc * weights.zero_prob * output["mvc_zero_probs"][where].log().mean()
    if asked.task == "both" and step >= asked.cell_prompt_after:
        prompted = predict(input_cell_emb=output["cell_emb"].detach())["predictions"]
        loss = loss + weights.prompted * (prompted[where] - targets).square().mean()
    if weights.cls:
        known = padded["class_labels"] >= 0
        loss = loss + weights.cls * F.cross_entropy(output["cls_output"][known], padded["class_labels"][known])
    if config.model.dab:
        loss = loss + weights.dab * F.cross_entropy(output["dab_output"], padded["batch_labels"])
    if weights.ecs:
        loss = loss + weights.ecs * output["loss_ecs"]
    if weights.cce:
        first, second = output["cell_emb"], predict()["cell_emb"]
        cosine = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / 0.5
        loss = loss + weights.cce * F.cross_entropy(cosine, torch.arange(len(first)))
    return loss


class Inputs(NamedTuple):
    """What enters the model, and what it must predict where, over [perception, generation] in generative training."""

    arguments: tuple[torch.Tensor, ...]
    targets: torch.Tensor   # (cells, seq) float64
    where: torch.Tensor     # (cells, seq) bool


def masked_inputs(padded: Tensors, config: TrainConfig) -> Inputs:
    """Genes, values and padding mask; hidden positions are known by their value."""
    collating = config.collate_config()
    targets, masked = padded["expr"].double(), padded["masked_expr"].double()
    is_padding = targets.eq(collating.pad_value)   # by value: the made-up cells may hold the gene with `<pad>`'s id
    is_padding[:, 0] = False                       # `<cls>` has the same value
    return Inputs((padded["gene"], masked, is_padding), targets, masked.eq(collating.mask_value))


def generative_inputs(padded: Tensors) -> Inputs:
    """Perception genes, values and mask, generation genes and mask."""
    seen, to_generate = padded["pcpt_key_padding_mask"], ~padded["gen_key_padding_mask"]
    targets = torch.cat([padded["pcpt_expr"], padded["gen_expr_target"]], 1).double()
    return Inputs((padded["pcpt_gene"], padded["pcpt_expr"].double(), seen, padded["gen_gene"], ~to_generate), targets,
                  torch.cat([torch.zeros_like(seen), to_generate], 1))


def forward(model: torch.nn.Module, padded: Tensors, config: TrainConfig, inputs: Inputs, **options: Any) -> Tensors:
    """One pass, with "predictions" and "zero_probs" over all positions."""
    arguments = inputs.arguments
    if config.model.kind == "generator":
        genes, values, mask = arguments
        arguments = (genes, values, torch.zeros_like(genes), mask)
    elif config.model.use_batch_labels or config.model.domain_spec_batchnorm:
        options["batch_labels"] = padded["batch_labels"]
    if config.objective.task != "pcpt":
        output = model(*arguments, generative_training=True, **options)
        return output | {"predictions": torch.cat([output["pcpt_preds"], output["gen_preds"]], 1)}
    output = model(*arguments, **options)
    return output | {"predictions": output["mlm_output"], "zero_probs": output.get("mlm_zero_probs")}
