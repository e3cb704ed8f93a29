"""Read the weights of a checkpoint from DeepSpeed's shards, of any ZeRO stage and rank count, without running a pickle.

Files are mapped and opened with `weights_only=True`; the few classes of DeepSpeed's that they name are replaced by
empty stand-ins, so DeepSpeed is not even imported, and its own readers (which run whatever a file says) see none of it.
A tensor is put together when it is asked for: memory is bounded by the largest one, not by the model.

    stage 0  mp_rank_00_model_states.pt: `module`, whole; of half-precision runs also the float32 weights, parameter by
             parameter in the same order
    1, 2     zero_pp_rank_R_..._optim_states.pt: rank R's part of the flat float32 weights, and what lies where in it
    3        the same files, parameters in the order of `param_shapes`, each spread over all ranks in equal parts
"""
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scgpt.errors import CheckpointError

_MODEL_STATES = "*model_states.pt"
_OPTIMIZER_STATES = "*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
_NAMES = ("deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.runtime.fp16.loss_scaler.LossScaler",
          "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler")
_FIX = "take another checkpoint"
_SLICE_NAME = "deepspeed.utils.tensor_fragment.fragment_address"


class _StandIn:
    """In the place of an object that is of no interest here."""

    def __init__(self, *args: object) -> None:
        pass


class _Slice:
    """A parameter's place in a flat partition; unpickling sets both."""

    numel: int
    start: int


class Shards:
    """The weights in a checkpoint's folder: names, shapes, and each one read on demand, in float32.

    Raises CheckpointError where the folder does not hold what the stage asks for, or a file holds more than data.
    """

    def __init__(self, folder: Path, *, stage: int, world_size: int) -> None:
        self._folder, self._stage, self._world_size = folder, stage, world_size
        states = _open(_only(folder, _MODEL_STATES if stage < 3 else "zero_pp_rank_0_mp_rank_00_model_states.pt"))
        self._module: dict[str, Tensor] = states["module"]
        self._groups: list[dict[str, torch.Size]] = states["param_shapes"] or []
        self._partitions = [_open(_only(folder, _OPTIMIZER_STATES.format(rank=rank)))["optimizer_state_dict"]
                            for rank in range(world_size if stage else 0)]
        parameters = [name for name in self._module if name not in states["buffer_names"]]
        masters = [tensor for group in (states.get("optimizer") or {}).get("fp32_groups", []) for tensor in group]
        self._masters = dict(zip(parameters, masters, strict=True)) if masters else {}
        in_groups = {name: torch.Size(shape) for group in self._groups for name, shape in group.items()}
        self.shapes = {name: in_groups.get(name, tensor.shape) for name, tensor in self._module.items()}

    def read(self, name: str) -> Tensor:
        """One tensor of the model: a parameter in float32 from the master weights, or a buffer as it is."""
        for number, group in enumerate(self._groups if self._stage else ()):
            if name in group:
                flat = self._join_slices(name, number) if self._stage < 3 else self._join_parts(name, number)
                if flat.numel() != math.prod(group[name]):
                    raise CheckpointError(f"the shards hold {flat.numel()} values of '{name}', its shape is "
                                          f"{tuple(group[name])}", where=str(self._folder), fix=_FIX)
                return flat.view(torch.Size(group[name]))
        tensor: Tensor = self._masters.get(name, self._module[name]).detach()
        return tensor.float() if tensor.is_floating_point() else tensor

    def _join_slices(self, name: str, number: int) -> Tensor:
        """Stages 1 and 2: a parameter may cross the border between two ranks' partitions."""
        parts = []
        for partition in self._partitions:
            place = partition["param_slice_mappings"][number].get(name)
            if place is not None:
                flat = partition["single_partition_of_fp32_groups"][number]
                parts.append(flat[place.start:place.start + place.numel])
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()

    def _join_parts(self, name: str, number: int) -> Tensor:
        """Stage 3: every rank has the same share of every parameter, the last one padded."""
        group = self._groups[number]
        shares = {other: math.ceil(math.prod(shape) / self._world_size) for other, shape in group.items()}
        before = list(shares)[:list(shares).index(name)]
        start = sum(shares[other] for other in before)
        parts = [partition["fp32_flat_groups"][number][start:start + shares[name]] for partition in self._partitions]
        return torch.cat(parts)[:math.prod(group[name])]


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise CheckpointError(f"{len(found)} files '{pattern}', there should be one", where=str(folder),
                              fix=_FIX)
    return found[0]


def _open(path: Path) -> dict[str, Any]:
    stand_ins = [(type(name.rpartition(".")[2], (_StandIn,), {}), name) for name in _NAMES]
    try:
        with torch.serialization.safe_globals([*stand_ins, (_Slice, _SLICE_NAME)]):
            content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"not a file of tensors and numbers: {reason}", where=str(path), fix=_FIX) from error
    return content
