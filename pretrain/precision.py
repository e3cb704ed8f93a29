"""Half precision under DeepSpeed: which one a device trains in, and faults of DeepSpeed's, mended from outside."""
from collections.abc import Mapping
from typing import Any

import torch


def resolve_precision(precision: str, device: torch.device) -> str:
    """What `auto` means on this device: bf16 on a GPU that has it, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


@torch.no_grad()
def undo_first_update(optimizer: Any) -> None:
    """Take back an update with gradients of 0, which DeepSpeed's half-precision optimizer of ZeRO 0 begins with.

    It would decay the weights once, and count as Adam's first step ever after.
    """
    for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        for master, weight in zip(masters, weights, strict=True):
            master.copy_(weight)
            for tensor in optimizer.optimizer.state[master].values():
                tensor.zero_()


def grow_scale_after_update(optimizer: Any) -> None:
    """Let the loss scale of float16 grow after a step's gradients were divided by it.

    DeepSpeed (any stage, 0.19) doubles it before: of each step at which it grows, the gradients come out halved. ZeRO 0
    tells the norm of the gradients times the scale, besides.
    """
    update_scale, step = optimizer._update_scale, optimizer.step

    def only_shrink(overflow: bool) -> None:  # noqa: FBT001 DeepSpeed's signature
        if overflow:
            update_scale(overflow)

    def step_then_grow(*args: Any, **options: Any) -> Any:
        tells_scaled, scale = hasattr(optimizer, "loss_scale_config"), float(optimizer.loss_scale)
        result = step(*args, **options)
        if not optimizer.overflow:
            if tells_scaled:
                optimizer._global_grad_norm /= scale
            update_scale(False)  # noqa: FBT003
        return result

    optimizer._update_scale, optimizer.step = only_shrink, step_then_grow


def outlast_smallest_scale(optimizer: Any) -> None:
    """Do not let DeepSpeed (ZeRO 1 to 3) raise where float16 overflows at the smallest scale: the loop counts these."""
    if hasattr(optimizer, "loss_scaler"):
        optimizer.loss_scaler.raise_error_at_min_scale = False


def can_scale_down(optimizer: Any, settings: Mapping[str, Any]) -> bool:
    """Whether the loss scale is found by trial and can still go down; `settings`: "fp16" of DeepSpeed's JSON."""
    return bool(settings["loss_scale"] == 0 and optimizer.loss_scale > settings["min_loss_scale"])
