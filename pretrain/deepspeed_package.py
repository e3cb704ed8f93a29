"""DeepSpeed itself: imported without a word, and asked which keys its JSON may have."""
import functools
import logging
import os
import warnings
from typing import Any

import torch

# Of DeepSpeed's mesh of ranks: it asks for them only once the ranks know each other.
_ASKED_LATER = ("sequence_parallel_size", "data_parallel_size")


def quiet_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed without its banner, and on a CPU without anything that is compiled at run time."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # Of the names by which DeepSpeed calls torch.
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class _Asked(dict[str, Any]):
    """A JSON that notes which of its keys somebody asks for, there or not; shallow copies note in the same place."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.keys_asked: set[object] = set()

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def keys(self) -> "_Asked":  # type: ignore[override]   # DeepSpeed only asks what is in them
        return self


@functools.cache
def known_keys(device: torch.device) -> frozenset[str]:
    """The keys that the installed DeepSpeed reads at the top of its JSON, those it refuses as removed among them.

    It has no list of them, and passes over all others in silence: it is given a JSON with next to nothing in it, and
    what it asks for is noted.
    """
    quiet_deepspeed(device)
    from deepspeed.runtime.config import DeepSpeedConfig

    least = _Asked({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    DeepSpeedConfig(least)
    return frozenset([*map(str, least.keys_asked), *_ASKED_LATER])
