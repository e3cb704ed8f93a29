"""A program of the gradient gate: real steps of the engine, for several configurations in one group of ranks.

    gate.py CASES.json     CASES: [{"words": [CONFIG, key=value, ...], "steps": 3, "out": FILE}, ...]

Rank 0 writes to each FILE the weights after the steps and the whole gradient of the last one, before clipping, both in
float32 by name; the loss of each step, and how many graphs had been compiled after each; the norm of the last gradient
as the engine tells it, and the loss scale.
"""
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils

from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.data import Loader, to_tensors
from pretrain.deepspeed_package import quiet_deepspeed
from pretrain.engine import Engine
from pretrain.schedule import learning_rate
from pretrain.world import World, join_world
from scgpt.config import load_config
from scgpt.process import end_process


def main(cases: Path) -> None:
    """Run every case."""
    with join_world(timeout_s=120) as world:
        for case in json.loads(cases.read_text()):
            name, *settings = case["words"]
            found = run(load_config(TrainConfig, name, settings, kind="pretrain"), case["steps"], world)
            if world.is_first:
                torch.save(found, case["out"])


def run(config: TrainConfig, steps: int, world: World) -> dict[str, Any]:
    """{"weights", "gradients", "losses", "graphs", "grad_norm", "loss_scale"} of a case."""
    quiet_deepspeed(world.device)
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    if config.train.precision == "fp16":   # DeepSpeed refuses what CPUs compute slowly; its arithmetic is the same
        get_accelerator().is_fp16_supported = lambda: True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    corpus = Corpus.open(config)
    engine = Engine(config, corpus.vocab, world)
    named = dict(engine.deepspeed.module.named_parameters())
    gradients: dict[str, torch.Tensor] = {}
    update = engine.deepspeed.step

    def scale() -> float:
        return float(engine.deepspeed.optimizer.loss_scale) if config.train.precision == "fp16" else 1.0

    def step() -> None:
        if engine.deepspeed.is_gradient_accumulation_boundary():
            for name, parameter in named.items():
                gradient = safe_get_full_grad(parameter)
                gradients[name] = torch.zeros(parameter.shape) if gradient is None else gradient.float() / scale()
        update()

    engine.deepspeed.step = step
    loader = Loader.of_run(config, corpus, rank=world.rank, world_size=world.world_size)
    losses: list[float] = []
    graphs: list[int] = []
    for number in range(steps):
        part = loader.load(number)
        counts = world.sum(torch.tensor(engine.objective.counts(part.micro_batches, step=number))).tolist()
        lr = learning_rate(number + 1, lr=config.optimizer.lr, schedule=config.schedule, total_steps=steps)
        sums = [engine.train(to_tensors(batch, world.device), step=number, micro_batch=j, counts=counts, lr=lr)
                for j, batch in zip(part.numbers, part.micro_batches, strict=True)]
        losses.append(engine.objective.means(world.sum(torch.stack(sums).sum(0)).tolist(), counts)["loss"])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    masters = [tensor for group in getattr(engine.deepspeed.optimizer, "fp32_groups", []) for tensor in group]
    if not masters:   # ZeRO 1 to 3 spread them; in ZeRO 0 with float32 they are the parameters
        masters = [parameter if (full := safe_get_full_fp32_param(parameter)) is None else full
                   for parameter in named.values()]
    weights = {name: master.detach().float().clone() for name, master in zip(named, masters, strict=True)}
    return {"weights": weights, "gradients": gradients, "losses": losses, "graphs": graphs,
            "grad_norm": engine.grad_norm, "loss_scale": scale()}


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
    end_process(0)
