"""A program of the tests: how far DeepSpeed's Muon in ZeRO 1 to 3 is from that of ZeRO 0, on one rank.

    muon.py FILE     FILE: {CLIPPING: {STAGE: distance of the weights after three steps, relative to the weights}}
"""
import json
import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"   # its orthogonalisation would be compiled at first use, which takes g++

import torch

from pretrain.deepspeed_package import quiet_deepspeed
from pretrain.world import join_world
from scgpt.process import end_process

CLIPPING = (0.0, 0.1)   # not at all; to far less than the gradient's norm


def weights_after(stage: int, clipping: float, *, steps: int = 3) -> torch.Tensor:
    """(parameters,) of a small network that Muon has trained, biases by Adam as Muon leaves them."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    inputs, targets = torch.randn(4, 6), torch.randn(4, 4)
    for parameter in model.parameters():
        parameter.use_muon = parameter.ndim > 1
    settings = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": clipping,
                "optimizer": {"type": "Muon", "params": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.0}},
                "zero_optimization": {"stage": stage, "reduce_scatter": False}, "steps_per_print": 10**9}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings,
                                      dist_init_required=False)
    for _ in range(steps):
        engine.backward(10 * (engine(inputs) - targets).square().mean())
        engine.step()
    return torch.cat([(parameter if stage == 0 else safe_get_full_fp32_param(parameter)).detach().flatten().clone()
                      for parameter in engine.module.parameters()])


def distances(clipping: float) -> dict[int, float]:
    """Stage -> distance."""
    plain = weights_after(0, clipping)
    return {stage: float((weights_after(stage, clipping) - plain).norm() / plain.norm()) for stage in (1, 2, 3)}


if __name__ == "__main__":
    with join_world(timeout_s=120) as world:
        quiet_deepspeed(world.device)
        import deepspeed

        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        Path(sys.argv[-1]).write_text(json.dumps({clipping: distances(clipping) for clipping in CLIPPING}))
    end_process(0)
