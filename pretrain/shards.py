"""Read weights and optimizer state from DeepSpeed's shards, of any ZeRO stage and rank count, without running a pickle.

Files are mapped and opened with `weights_only=True`; the few classes of DeepSpeed's that they name are replaced by
empty stand-ins, so DeepSpeed is not even imported, and its own readers (which run whatever a file says) see none of it.
A tensor is put together when it is asked for: memory is bounded by the largest one, not by the model. Its parts are
views of the files, so a rank that needs a range of values reads no other.

    stage 0  mp_rank_00_model_states.pt: `module`, whole; of half-precision runs also the float32 weights, parameter by
             parameter in the same order; the optimizer's state in that order too
    1, 2     zero_pp_rank_R_..._optim_states.pt: rank R's part of the flat float32 weights, and what lies where in it;
             moments lie as the weights do
    3        the same files, parameters in the order of `param_shapes`, each spread over all ranks in equal parts
"""
import math
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class _Part(NamedTuple):
    """Where some consecutive values of a parameter lie."""

    weights: Tensor          # flat, float32
    state: dict[str, Any]    # of the optimizer: moments as long as `weights`, and `step`
    start: int               # in the flat tensors
    numel: int


class Shards:
    """The weights and optimizer state in a checkpoint's folder: names, shapes, and each tensor read on demand.

    Raises CheckpointError where the folder does not hold what the stage asks for, or a file holds more than data.
    """

    def __init__(self, folder: Path, *, stage: int, world_size: int) -> None:
        self._folder, self._stage, self._world_size = folder, stage, world_size
        states = _open(_only(folder, _MODEL_STATES if stage < 3 else "zero_pp_rank_0_mp_rank_00_model_states.pt"))
        self._module: dict[str, Tensor] = states["module"]
        self._groups: list[dict[str, torch.Size]] = (states["param_shapes"] or []) if stage else []
        self._partitions = [_open(_only(folder, _OPTIMIZER_STATES.format(rank=rank)))["optimizer_state_dict"]
                            for rank in range(world_size if stage else 0)]
        self._whole = {} if stage else self._whole_parameters(states)
        in_groups = {name: torch.Size(shape) for group in self._groups for name, shape in group.items()}
        self.shapes = {name: in_groups.get(name, tensor.shape) for name, tensor in self._module.items()}

    def _whole_parameters(self, states: dict[str, Any]) -> dict[str, _Part]:
        """Stage 0: name -> the whole parameter, float32 where the file has it so."""
        optimizer = states.get("optimizer") or {}
        found = optimizer.get("optimizer_state_dict", optimizer).get("state", {})
        names = [name for name in self._module if name not in states["buffer_names"]]
        masters = [tensor for group in optimizer.get("fp32_groups", []) for tensor in group]
        masters = masters or [self._module[name] for name in names]
        return {name: _Part(master.detach().flatten(), found.get(number, {}), 0, master.numel())
                for number, (name, master) in enumerate(zip(names, masters, strict=True))}

    def read(self, name: str) -> Tensor:
        """One tensor of the model: a parameter in float32 from the master weights, or a buffer as it is."""
        parts = self.parts(name)
        flat = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
        return (flat.float() if flat.is_floating_point() else flat).view(self.shapes[name])

    def parts(self, name: str, moment: str | None = None) -> list[Tensor]:
        """The values of a parameter, of one of its moments or of a buffer: flat views of the files, one after another.

        Raises CheckpointError where their number is not that of the shape, or the moment is not there.
        """
        numel = math.prod(self.shapes[name])
        if not self._is_parameter(name):
            return [self._module[name].detach().flatten()]
        try:
            tensors = [((part.weights if moment is None else part.state[moment].detach().flatten()), part)
                       for part in self._parts(name)]
        except KeyError as error:
            raise CheckpointError(f"the optimizer state of '{name}' lacks {moment}", where=str(self._folder),
                                  fix=_FIX) from error
        parts = [flat[part.start:part.start + part.numel] for flat, part in tensors]
        if (found := sum(part.numel() for part in parts)) != numel:
            raise CheckpointError(f"the shards hold {found} values of '{name}', its shape is "
                                  f"{tuple(self.shapes[name])}", where=str(self._folder), fix=_FIX)
        return parts

    def moments(self, name: str) -> list[str]:
        """Names of the optimizer's tensors that a parameter has a value in for each of its own."""
        state = next(self._parts(name)).state
        return [key for key, value in state.items() if isinstance(value, Tensor) and value.dim()]

    def step(self, name: str) -> float:
        """Updates that a parameter has had."""
        return float(next(self._parts(name)).state.get("step", 0))

    def _is_parameter(self, name: str) -> bool:
        return name in self._whole or any(name in group for group in self._groups)

    def _parts(self, name: str) -> Iterator[_Part]:
        if not self._stage:
            yield self._whole[name]
            return
        number = next(number for number, group in enumerate(self._groups) if name in group)
        yield from self._slices(name, number) if self._stage < 3 else self._shares(name, number)

    def _slices(self, name: str, number: int) -> Iterator[_Part]:
        """Stages 1 and 2: a parameter may cross the border between two ranks' partitions."""
        for partition in self._partitions:
            place = partition["param_slice_mappings"][number].get(name)
            if place is not None:
                yield _Part(partition["single_partition_of_fp32_groups"][number].detach(),
                            partition["base_optimizer_state"]["state"].get(number, {}), place.start, place.numel)

    def _shares(self, name: str, number: int) -> Iterator[_Part]:
        """Stage 3: every rank has the same share of every parameter, the last one padded."""
        group = self._groups[number]
        shares = {other: math.ceil(math.prod(shape) / self._world_size) for other, shape in group.items()}
        start = sum(share for _, share in zip(range(list(shares).index(name)), shares.values(), strict=False))
        for rank, partition in enumerate(self._partitions):
            numel = min(shares[name], math.prod(group[name]) - rank * shares[name])
            if numel > 0:
                yield _Part(partition["fp32_flat_groups"][number].detach(),
                            partition["optimizer_state_dict"]["state"].get(number, {}), start, numel)


def copy_range(parts: Sequence[Tensor], start: int, into: Tensor) -> None:
    """Fill the flat `into` with the values from `start` on of flat parts that follow one another."""
    begin = 0
    for part in parts:
        first, last = max(start, begin), min(start + into.numel(), begin + part.numel())
        if first < last:
            into[first - start:last - start].copy_(part[first - begin:last - begin])
        begin += part.numel()


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
