"""A program of the tests of elastic resume: parts of a run, for several configurations in one group of ranks.

    elastic.py CASES.json     CASES: [{"settings": [...], "folder": DIR, "resume": true, "until": 4, "out": FILE}, ...]

A case begins anew, or loads the newest checkpoint of `folder`, learns up to step `until`, and saves there where it
began anew. Rank 0 writes {"losses": of each step, "digests", "changed", "loss_scale", "statistics": of batch norms} to
`out`, or {"error"}.
"""
import json
import sys
from pathlib import Path
from typing import Any

import torch

from pretrain import checkpoint
from pretrain.checkpoint import RunState, newest_valid
from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.data import Loader, to_tensors
from pretrain.deepspeed_package import quiet_deepspeed
from pretrain.engine import Engine
from pretrain.fragments import digests, loss_scale
from pretrain.schedule import learning_rate
from pretrain.world import World, join_world
from scgpt.config import load_config
from scgpt.errors import ScgptError
from scgpt.process import end_process


def main(cases: Path) -> None:
    """Run every case."""
    with join_world(timeout_s=120) as world:
        for case in json.loads(cases.read_text()):
            try:
                found = run(case, load_config(TrainConfig, "demo", case["settings"], kind="pretrain"), world)
            except ScgptError as error:
                found = {"error": str(error)}
            if world.is_first:
                Path(case["out"]).write_text(json.dumps(found))


def run(case: dict[str, Any], config: TrainConfig, world: World) -> dict[str, Any]:
    """One case."""
    quiet_deepspeed(world.device)
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True   # DeepSpeed refuses what CPUs compute slowly
    corpus, folder = Corpus.open(config), Path(case["folder"])
    engine, state, changed = Engine(config, corpus.vocab, world), RunState(), []
    if case["resume"]:
        state = world.of_first(lambda: newest_valid(folder)[0])
        changed = checkpoint.load(engine, folder, state, world)
    loader = Loader.of_run(config, corpus, rank=world.rank, world_size=world.world_size)
    losses = [step(engine, loader, number, config, world) for number in range(state.step, case["until"])]
    if not case["resume"]:
        state.step, state.world_size, state.precision = case["until"], world.world_size, engine.precision
        world.of_first(lambda: folder.mkdir(exist_ok=True))
        checkpoint.save(engine, folder, state, world, keep_last=1)
    return {"losses": losses, "digests": digests(engine, world), "changed": changed, "loss_scale": loss_scale(engine),
            "statistics": {name: buffer.tolist() for name, buffer in engine.deepspeed.module.named_buffers()}}


def step(engine: Engine, loader: Loader, number: int, config: TrainConfig, world: World) -> float:
    """The loss of one step, over all ranks."""
    part = loader.load(number)
    counts = world.sum(torch.tensor(engine.objective.counts(part.micro_batches, step=number))).tolist()
    lr = learning_rate(number + 1, lr=config.optimizer.lr, schedule=config.schedule, total_steps=100)
    sums = [engine.train(to_tensors(batch, world.device), step=number, micro_batch=j, counts=counts, lr=lr)
            for j, batch in zip(part.numbers, part.micro_batches, strict=True)]
    return engine.objective.means(world.sum(torch.stack(sums).sum(0).cpu()).tolist(), counts)["loss"]


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
    end_process(0)
