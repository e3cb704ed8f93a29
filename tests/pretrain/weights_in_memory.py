"""A program of the tests: trainings, one after the other, and what was in memory when each wrote its checkpoint.

    weights_in_memory.py CASES.json     CASES: [[key=value, ..., "--out", RUN], ...]

Rank 0 writes the float32 weights that the optimizers of all ranks hold, and the buffers, to RUN/in_memory.pt.
"""
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from pretrain import checkpoint, loop
from pretrain.config import TrainConfig
from pretrain.engine import Engine
from pretrain.world import join_world
from scgpt.config import load_config
from scgpt.process import end_process


def in_memory(engine: Engine) -> dict[str, torch.Tensor]:
    """As DeepSpeed gathers it; it knows of no other copy in ZeRO 0."""
    from deepspeed.utils import safe_get_full_fp32_param

    module = engine.deepspeed.module
    masters = [tensor for group in getattr(engine.deepspeed.optimizer, "fp32_groups", []) for tensor in group]
    whole = masters or [parameter if engine.zero_stage == 0 else safe_get_full_fp32_param(parameter)
                        for parameter in module.parameters()]
    found = {name: tensor.detach().clone() for (name, _), tensor in zip(module.named_parameters(), whole, strict=True)}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


def main(cases: Path) -> None:
    """Train each case."""
    save = checkpoint.save

    def telling(engine: Engine, folder: Path, *args: Any, **options: Any) -> None:
        found = in_memory(engine)
        if engine.world.is_first:
            torch.save(found, folder.parent / "in_memory.pt")
        save(engine, folder, *args, **options)

    checkpoint.save = telling
    with join_world(timeout_s=120) as world:
        loop.join_world = lambda **options: nullcontext(world)   # joined once: its port serves no second time
        for *words, _, out in json.loads(cases.read_text()):
            loop.train(load_config(TrainConfig, "demo", words, kind="pretrain"), Path(out))


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
    end_process(0)
