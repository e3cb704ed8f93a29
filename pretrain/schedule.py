"""Learning rate of a step: linear warmup, then half a cosine to 0 (Loshchilov, Hutter: SGDR, 2017), constant, or steps.

Steps are upstream's choice without warmup: the rate is multiplied with `factor` after every `interval` steps.
"""
import math

from pretrain.config import ScheduleConfig


def learning_rate(step: int, *, lr: float, schedule: ScheduleConfig, total_steps: int) -> float:
    """The rate with which optimizer step `step` (counted from 1) is made.

    Warmup ends with `lr` at step `warmup_steps`; the first step after it still has `lr`, and the step after the last
    one would have 0. (Upstream's first step has rate 0, ours lr / warmup_steps.)
    """
    if step <= schedule.warmup_steps:
        return lr * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return lr
    if schedule.kind == "step":
        return lr * schedule.factor ** ((step - 1 - schedule.warmup_steps) // schedule.interval)
    done = (step - 1 - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
    return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
