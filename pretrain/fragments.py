"""What this rank holds of each parameter, in any ZeRO stage: float32 weights and optimizer state, to read and to set.

    stage 0  everything: the parameters themselves, or the float32 copies of half-precision ones
    1, 2     the pieces of parameters that lie in the rank's flat partition
    3        an equal share of every parameter, the last one shorter, or nothing

A fragment says which values of its parameter it is, so that whoever has the whole parameter (a checkpoint of another
shape, a release) can fill it, and whoever adds up over ranks sees every value once.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.engine import Engine
from pretrain.world import World

_HASHED_AT_ONCE = 1 << 20   # values; bounds the memory of a digest
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")   # what moves in an fp16 loss scaler


@dataclass(frozen=True, slots=True)
class Fragment:
    """Consecutive values of one parameter that this rank's optimizer updates."""

    name: str        # of the parameter
    start: int       # place of the first value in the flattened parameter
    owner: Tensor    # what the optimizer knows: a parameter, or a flat partition of many
    place: int       # of the first value in the flattened `owner`
    numel: int

    @property
    def weights(self) -> Tensor:
        """(numel,) a view of the weights that the optimizer updates, float32."""
        return self.within(self.owner)

    def within(self, tensor: Tensor) -> Tensor:
        """(numel,) a view of this fragment's part of a tensor that lies like `owner`, as its moments do."""
        return tensor.detach().view(-1).narrow(0, self.place, self.numel)


def fragments(engine: Engine) -> Iterator[Fragment]:
    """Every fragment of this rank, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in engine.deepspeed.module.named_parameters()}
    optimizer, stage = engine.deepspeed.optimizer, engine.zero_stage
    if stage == 3:
        yield from _shares(optimizer, names, engine.world.rank)
    elif stage:
        for group in getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups:
            for parameter in group:
                yield from _piece(optimizer, names[id(parameter)], parameter._hp_mapping)
    else:
        for owner, parameter in _whole(engine):
            yield Fragment(names[id(parameter)], 0, owner, 0, owner.numel())


def _whole(engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
    """Stage 0: (what the optimizer updates, the parameter), which are one but in half precision."""
    optimizer = engine.deepspeed.optimizer
    if engine.precision == "fp32":
        for group in optimizer.param_groups:
            yield from zip(group["params"], group["params"], strict=True)
        return
    for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        yield from zip(masters, parameters, strict=True)


def _piece(optimizer: Any, name: str, mapping: Any) -> Iterator[Fragment]:
    """Stages 1 and 2: where DeepSpeed says that a parameter meets this rank's partition, if it does."""
    if mapping is not None:
        flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
        address = mapping.get_hp_fragment_address()
        yield Fragment(name, mapping.lp_fragment_address.start, flats[mapping.param_group_index], address.start,
                       address.numel)


def _shares(optimizer: Any, names: dict[int, str], rank: int) -> Iterator[Fragment]:
    """Stage 3: parameters lie one after the other, each with the same (padded) share on every rank."""
    for group, owner in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        place = 0
        for parameter in group:
            share = parameter.partition_numel()
            numel = min(share, parameter.ds_numel - rank * share)
            if numel > 0:
                yield Fragment(names[id(parameter)], rank * share, owner, place, numel)
            place += share


def state_of(engine: Engine, owner: Tensor) -> dict[str, Any]:
    """The optimizer's state of an owner, which is made where there is none yet: moments by name, and `step`."""
    state: dict[str, Any] = engine.deepspeed.basic_optimizer.state[owner]
    return state


def set_step(engine: Engine, owner: Tensor, step: float) -> None:
    """Set the updates that an owner has had, in the form that the optimizer counts them in."""
    optimizer = engine.deepspeed.basic_optimizer
    if not isinstance(optimizer, torch.optim.Adam):   # DeepSpeed's own count in integers
        state_of(engine, owner)["step"] = int(step)
        return
    group = optimizer.param_groups[0]
    on_device = group["fused"] or group["capturable"]
    state_of(engine, owner)["step"] = torch.tensor(step, device=owner.device if on_device else "cpu")


@torch.no_grad()
def refresh_weights(engine: Engine) -> None:
    """Give the model the weights that the optimizers of all ranks hold. All ranks call it."""
    optimizer, stage = engine.deepspeed.optimizer, engine.zero_stage
    if stage == 3:
        _refresh_shares(optimizer)
    elif stage:
        optimizer.update_lp_params()
    else:
        for owner, parameter in _whole(engine):
            if owner is not parameter:
                parameter.copy_(owner)


def _refresh_shares(optimizer: Any) -> None:
    for half, full in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True):
        half.copy_(full)
    for group in range(len(optimizer.fp16_groups)):
        flat, parts = optimizer.fp16_partitioned_groups_flat[group], optimizer.fp16_partitioned_groups[group]
        for part, view in zip(parts, optimizer.unflatten(flat, parts), strict=True):
            part.data = view.data
    if optimizer.persistent_parameters:   # small ones are kept whole: let go of the old values, fetch the new ones
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()


def loss_scale(engine: Engine) -> dict[str, float]:
    """Where fp16's search for a loss scale is; empty in other precisions."""
    return {name: getattr(_scaler(engine), name) for name in _SCALER if hasattr(_scaler(engine), name)}


def set_loss_scale(engine: Engine, values: dict[str, float]) -> None:
    """Go on from there; nothing happens in other precisions."""
    for name, value in values.items():
        if hasattr(_scaler(engine), name):
            setattr(_scaler(engine), name, value)


def _scaler(engine: Engine) -> Any:
    if engine.precision != "fp16":
        return None
    optimizer = engine.deepspeed.optimizer
    return getattr(optimizer, "loss_scaler", None) or optimizer.loss_scale_config


@torch.no_grad()
def digests(engine: Engine, world: World) -> dict[str, str]:
    """name -> 64-bit digest of each parameter's weights, moments and step, and of each buffer: as hexadecimal.

    The same whatever the ranks, the stage and the precision of the model: it is a sum of one hash a value, of the value
    and its place. All ranks call it.
    """
    named = {name: 0 for name, _ in engine.deepspeed.module.named_parameters()}
    places = {name: place for place, name in enumerate(named)}
    sums = torch.zeros(len(named), dtype=torch.int64)
    for fragment in fragments(engine):
        state = state_of(engine, fragment.owner)
        sums[places[fragment.name]] += _hashed(fragment.weights, fragment.start, 0)
        moments = sorted(key for key, value in state.items() if isinstance(value, Tensor) and value.dim())
        for salt, key in enumerate(moments, start=1):
            sums[places[fragment.name]] += _hashed(fragment.within(state[key]), fragment.start, salt)
        if fragment.start == 0:
            sums[places[fragment.name]] += _hashed(torch.tensor([float(state.get("step", 0))]), 0, len(moments) + 1)
    if engine.zero_stage:
        sums = world.sum(sums)
    found = dict(zip(named, sums.tolist(), strict=True))
    for name, buffer in engine.deepspeed.module.named_buffers():
        found[name] = int(_hashed(buffer.flatten(), 0, 0))
    return {name: f"{value & (1 << 64) - 1:016x}" for name, value in found.items()}


def _hashed(values: Tensor, start: int, salt: int) -> Tensor:
    """() int64 on the CPU: the sum, modulo 2^64, of a mix of the bits and the place (and salt) of each value."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for offset in range(0, values.numel(), _HASHED_AT_ONCE):
        bits = values[offset:offset + _HASHED_AT_ONCE].double().view(torch.int64)
        place = torch.arange(len(bits), device=values.device) + (start + offset)
        mixed = (bits ^ (place * -0x61C8864680B583EB + salt)) * -0x4B47D0C5C4D2F8B5
        mixed = (mixed ^ (mixed >> 31)) * -0x6B2FB644ECCEEE15
        total += (mixed ^ (mixed >> 29)).sum()
    return total.cpu()
