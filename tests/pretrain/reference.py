"""Pretraining as one would write it in an afternoon: float64, one process, padded rows, the whole global batch at once.

Nothing of pretrain.objectives or pretrain.engine is used: what both compute is written down a second time.
"""
import torch

from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.data import Loader
from pretrain.engine import _seed
from pretrain.schedule import learning_rate
from scgpt.model.build import build_model
from scgpt.rng import PURPOSE_WEIGHTS
from scgpt.vocab import CLS, PAD

Tensors = dict[str, torch.Tensor]


def first_weights(config: TrainConfig, *, rounded: bool = False) -> torch.nn.Module:
    """The model that the engine begins with, in float64; `rounded` to bfloat16 first, as DeepSpeed keeps it."""
    torch.manual_seed(_seed(config.train.seed, 0, 0, PURPOSE_WEIGHTS))
    model = build_model(config.model, Corpus.open(config).vocab)
    return (model.bfloat16() if rounded else model).double()


def plain_loop(config: TrainConfig, steps: int, *, rounded: bool = False) -> dict[str, Tensors]:
    """{"weights" after the steps, "gradients" of the last one before clipping, "first" weights}."""
    corpus, model = Corpus.open(config), first_weights(config, rounded=rounded)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, eps=config.optimizer.eps,
                                  betas=config.optimizer.betas, weight_decay=config.optimizer.weight_decay)
    loader = Loader(corpus.train, config.objective.collate_config(), cls_id=corpus.vocab[CLS], seed=config.train.seed,
                    global_batch_size=config.batch.global_batch_size, micro_batch_size=config.batch.global_batch_size,
                    workers=0)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(steps):
        (packed,) = loader.load(step).micro_batches
        padded = {name: torch.from_numpy(array) for name, array in packed.padded(corpus.vocab[PAD], -2).items()}
        optimizer.zero_grad()
        loss_of(model, padded, config, step).backward()
        for parameter in model.parameters():   # a part that is not trained still decays
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, lr=config.optimizer.lr, schedule=config.schedule, total_steps=steps)
        optimizer.step()
    return {"weights": dict(model.state_dict()), "gradients": gradients, "first": first}


def loss_of(model: torch.nn.Module, padded: Tensors, config: TrainConfig, step: int) -> torch.Tensor:
    """The loss of a padded batch in upstream's own words."""
    targets, masked = padded["expr"].double(), padded["masked_expr"].double()
    is_padding = targets.eq(-2)   # by value: the made-up cells may hold the gene with the id of `<pad>`
    is_padding[:, 0] = False      # `<cls>` has the same value
    output = model(padded["gene"], masked, is_padding, MVC=True)
    hidden = masked.eq(-1)
    return sum((output[name][hidden] - targets[hidden]).square().mean() for name in ("mlm_output", "mvc_output"))
