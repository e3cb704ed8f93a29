"""Checkpoints of a run: written whole or not at all, validated before use, resumed by any number of ranks.

    RUN/checkpoints/step-00001000/   DeepSpeed's files of all ranks, state.json, SHA256SUMS (last)
    RUN/checkpoints/latest, best     names of the newest and of the best one, moved after everything is durable

A checkpoint is built under a temporary name; every rank makes its share of the files durable and hashes it, then rank 0
writes SHA256SUMS and renames. What a killed run left half-written is therefore known by its name or its checksums.
`state.json` also holds a digest of each tensor's weights and optimizer state, which does not depend on how many ranks
share them in which ZeRO stage. It is compared after loading: nothing can be re-initialised in silence. Loading is ours:
DeepSpeed's own refuses other ranks, and its universal checkpoint does not cross all stages, mixes up parameter groups
in stage 3 and unpickles whatever it is given.
"""
import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from pretrain.engine import Engine
from pretrain.fragments import digests, fragments, loss_scale, refresh_weights, set_loss_scale, set_step, state_of
from pretrain.shards import Shards, copy_range
from pretrain.world import RankError, World, is_lost_peer
from scgpt.errors import CheckpointError, ConfigError
from scgpt.files import TEMPORARY_PREFIX, fsync_path, json_bytes, remove, sha256, write_bytes

STATE, SUMS = "state.json", "SHA256SUMS"
LATEST, BEST = "latest", "best"
_NAME = re.compile(r"step-(\d{8,})")
_SUM_LINE = re.compile(r"([0-9a-f]{64})  ([^\s/][^\n]*)")


@dataclass
class RunState:
    """Where a run is: with the engine's tensors, all that continuing needs."""

    step: int = 0                       # optimizer steps done = global batches consumed
    cells_seen: int = 0
    tokens_seen: int = 0
    best_step: int | None = None        # of the lowest validation loss
    best_loss: float | None = None      # its loss_expression
    patience_loss: float | None = None  # loss_expression that the next validation must undercut to improve
    n_not_improved: int = 0             # validations since the last one that improved
    gene_mean_loss: float | None = None # validation loss of predicting each gene's mean
    probe_pca: float | None = None      # accuracy of principal components on the cells of the probe
    last_valid: dict[str, float] | None = None   # the newest validation, and its step
    window: list[list[float]] = field(default_factory=list)   # loss sums of each step since the last train row
    skipped_in_row: int = 0             # of the newest steps: those without an update, see pretrain/recovery.py
    rollbacks: list[list[int]] = field(default_factory=list)  # [checkpoint that was gone back to, steps done then]
    world_size: int = 0
    zero_stage: int = 0
    precision: str = ""
    corpus: dict[str, Any] = field(default_factory=dict)      # name, sha256, splits: what it learns from
    config: dict[str, Any] = field(default_factory=dict)      # the resolved TrainConfig
    versions: dict[str, str] = field(default_factory=dict)    # of the packages that wrote it
    digests: dict[str, str] = field(default_factory=dict)     # of each tensor: weights, moments, step
    lineage: dict[str, Any] | None = None                     # what it began with, see pretrain/starting_point.py
    loss_scale: dict[str, float] = field(default_factory=dict)   # where fp16's search for one is


def checkpoint_name(step: int) -> str:
    """The folder's name."""
    return f"step-{step:08d}"


def steps_of(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints in a folder, valid or not, ascending."""
    matches = (_NAME.fullmatch(path.name) for path in checkpoints.glob("step-*"))
    return sorted(int(match[1]) for match in matches if match)


def save(engine: Engine, checkpoints: Path, state: RunState, world: World, *, keep_last: int) -> None:
    """Write a checkpoint of `state.step`, move `latest` (and `best`, where the step is the best), remove old ones.

    All ranks call it. Nothing happens where a checkpoint of this step is there already.

    Raises CheckpointError when a file cannot be written; the checkpoints before stay as they are.
    """
    name = checkpoint_name(state.step)
    building = checkpoints / f"{TEMPORARY_PREFIX}{name}"
    state.zero_stage = engine.zero_stage
    state.digests, state.loss_scale = digests(engine, world), loss_scale(engine)
    if not world.of_first(lambda: _begin(checkpoints / name, building)):
        return
    try:
        engine.deepspeed.save_checkpoint(str(checkpoints), tag=building.name, client_state={}, save_latest=False)
        sums = world.gather(_durable_sums(building, world))
        world.of_first(lambda: _publish(building, checkpoints, state, sums, keep_last))
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and is_lost_peer(error):
            raise
        kind = CheckpointError if world.is_first else RankError   # the disk of one rank alone: that rank tells
        raise kind(f"the checkpoint of step {state.step} cannot be written: {_reason(error)} "
                   f"({shutil.disk_usage(checkpoints).free / 1e9:.1f} GB free)", where=str(checkpoints),
                   fix="make room; the same command continues from the checkpoint before") from error


def _reason(error: OSError | RuntimeError) -> str:
    """Why a file cannot be written; torch's writer of archives loses the system's word where a disk takes no more."""
    text = str(error).splitlines()[0]
    return "the disk took a part of a file only" if "unexpected pos" in text else text


def _begin(final: Path, building: Path) -> bool:
    remove(building)
    if final.is_dir():
        try:
            validate(final)
            return False
        except CheckpointError:
            remove(final)   # torn: it was reported when the run was continued
    return True


def _durable_sums(folder: Path, world: World) -> dict[str, str]:
    """This rank's share of the folder's files: made durable, name -> sha256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    share = files[world.rank::world.world_size]
    for path in share:
        fsync_path(path)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in share}


def _publish(building: Path, checkpoints: Path, state: RunState, sums: list[dict[str, str]], keep_last: int) -> None:
    write_bytes(building / STATE, json_bytes(asdict(state)))
    everything = {name: value for part in sums for name, value in part.items()} | {STATE: sha256(building / STATE)}
    write_bytes(building / SUMS, sums_bytes(everything))
    final = checkpoints / checkpoint_name(state.step)
    building.rename(final)
    fsync_path(checkpoints)
    write_bytes(checkpoints / LATEST, f"{final.name}\n".encode())
    if state.best_step == state.step:
        write_bytes(checkpoints / BEST, f"{final.name}\n".encode())
    for script in checkpoints.glob("zero_to_*.py"):   # DeepSpeed's readers, which unpickle whatever they are given
        remove(script)
    kept = {*steps_of(checkpoints)[-keep_last:], state.step, state.best_step}
    for step in steps_of(checkpoints):
        if step not in kept:
            remove(checkpoints / checkpoint_name(step))


def sums_bytes(sums: Mapping[str, str]) -> bytes:
    """The content of a SHA256SUMS, as `sha256sum -c` reads it: one line a file, sorted by name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def check_sums(folder: Path, *, fix: str, only: Collection[str] = ()) -> dict[str, str]:
    """Hold every file of a folder, or `only` some of them, against its SHA256SUMS; name -> sha256 of all.

    Raises CheckpointError at the first fault: no list, a list that is not exactly what `sums_bytes` writes, a file that
    is missing, changed or not in the list.
    """
    try:
        content = (folder / SUMS).read_bytes()
        lines = [_SUM_LINE.fullmatch(line) for line in content.decode().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{SUMS} cannot be read ({error})", where=str(folder), fix=fix) from error
    sums = {line[2]: line[1] for line in lines if line}
    if not sums or sums_bytes(sums) != content:
        raise CheckpointError(f"{SUMS} was changed after it was written", where=str(folder), fix=fix)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {SUMS}
    for name in sorted(only or found | set(sums)):
        if name not in found:
            raise CheckpointError(f"the file '{name}' is missing", where=str(folder), fix=fix)
        if name not in sums:
            raise CheckpointError(f"the file '{name}' is not in {SUMS}", where=str(folder), fix=fix)
        if sha256(folder / name) != sums[name]:
            raise CheckpointError(f"the file '{name}' is not what {SUMS} says", where=str(folder), fix=fix)
    return sums


def validate(checkpoint: Path) -> RunState:
    """Check every file of a checkpoint; its state. Older versions' lack some of it, which then begins anew.

    Raises CheckpointError when it is missing, torn or changed, ConfigError when a newer version wrote it: what that one
    remembers would be lost, so nobody goes on from there by passing it over.
    """
    check_sums(checkpoint, fix="take an older checkpoint")
    content = json.loads((checkpoint / STATE).read_bytes())
    if isinstance(content.get("digests"), list):   # older ones: of each rank's tensors, of use to those ranks only
        del content["digests"]
    unknown = sorted(content.keys() - {known.name for known in fields(RunState)})
    if unknown:
        versions = ", ".join(f"{name} {version}" for name, version in content.get("versions", {}).items())
        raise ConfigError(f"the checkpoint was written by a newer version, which remembers {', '.join(unknown)}",
                          where=str(checkpoint), fix=f"install that version: {versions}")
    return RunState(**content)


def newest_valid(checkpoints: Path) -> tuple[RunState | None, list[str]]:
    """The newest checkpoint that is whole, and in one sentence each what is wrong with newer ones."""
    skipped = [f"{path.name[len(TEMPORARY_PREFIX):]} was being written when the run ended"
               for path in sorted(checkpoints.glob(f"{TEMPORARY_PREFIX}step-*"))]
    for step in reversed(steps_of(checkpoints)):
        try:
            return validate(checkpoints / checkpoint_name(step)), skipped
        except CheckpointError as error:
            skipped.append(f"{checkpoint_name(step)} is skipped: {error.what}")
    return None, skipped


def find(run: Path, step: str) -> Path:
    """The folder of checkpoint `best`, `latest` or a step number; CheckpointError where there is none."""
    checkpoints = run / "checkpoints"
    available = steps_of(checkpoints)
    if not available:
        raise CheckpointError("the run has no checkpoint", where=str(run),
                              fix="give the folder that `scgpt train ... --out RUN` wrote, after its first checkpoint")
    if step in (BEST, LATEST):
        for pointer in dict.fromkeys((step, LATEST)):   # without validation the best one is the newest
            if (checkpoints / pointer).is_file():
                name = (checkpoints / pointer).read_text(encoding="utf-8", errors="replace").strip()
                if name not in map(checkpoint_name, available):
                    raise CheckpointError(f"it names no checkpoint: {name!r}", where=str(checkpoints / pointer),
                                          fix=f"give one of the steps {', '.join(map(str, available))} by its number")
                return checkpoints / name
        return checkpoints / checkpoint_name(available[-1])
    if not step.isdecimal() or int(step) not in available:
        raise CheckpointError(f"there is no checkpoint '{step}'", where=str(checkpoints),
                              fix=f"choose best, latest or one of: {', '.join(map(str, available))}")
    return checkpoints / checkpoint_name(int(step))


def load(engine: Engine, checkpoints: Path, state: RunState, world: World) -> list[str]:
    """Bring the engine to a validated checkpoint, whatever ranks, ZeRO stage and precision wrote it. All ranks call it.

    Every rank fills what its optimizer holds from the mapped shards, value by value, and nothing else: memory does not
    grow. `state` then has the ranks, stage and precision of now; returns what of them is another than it was.

    Raises CheckpointError when what was loaded is not what was saved.
    """
    folder = checkpoints / checkpoint_name(state.step)
    shards = Shards(folder, stage=state.zero_stage, world_size=state.world_size)
    world.of_first(lambda: _check_names(engine, shards, folder))
    _fill(engine, shards)
    set_loss_scale(engine, state.loss_scale)
    deepspeed, before = engine.deepspeed, (state.world_size, state.zero_stage, state.precision)
    deepspeed.global_steps = state.step
    deepspeed.micro_steps = state.step * deepspeed.gradient_accumulation_steps()
    loaded = world.gather(digests(engine, world))
    world.of_first(lambda: _check_restored(folder, state, loaded))
    state.world_size, state.zero_stage, state.precision = world.world_size, engine.zero_stage, engine.precision
    now = (state.world_size, state.zero_stage, state.precision)
    return [f"{name} {was} -> {wanted}" for name, was, wanted
            in zip(("ranks", "deepspeed.zero_stage", "precision"), before, now, strict=True) if was != wanted]


def _check_names(engine: Engine, shards: Shards, folder: Path) -> None:
    tensors = {name: tuple(getattr(tensor, "ds_shape", tensor.shape))   # in ZeRO 3 a parameter itself is empty
               for name, tensor in engine.deepspeed.module.state_dict(keep_vars=True).items()}
    found = {name: tuple(shape) for name, shape in shards.shapes.items()}
    wrong = sorted(name for name in tensors.keys() | found.keys() if tensors.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(f"its tensors are not those of the model: {', '.join(wrong[:8])}", where=str(folder),
                              fix="continue with the version that wrote it, or start a new run from it: "
                                  "model.init_from=RUN")


@torch.no_grad()
def _fill(engine: Engine, shards: Shards) -> None:
    """Weights and optimizer state of this rank, then the weights of the model and its buffers."""
    filled: set[int] = set()
    for fragment in fragments(engine):
        owner, name = fragment.owner, fragment.name
        copy_range(shards.parts(name), fragment.start, fragment.weights)
        state = state_of(engine, owner)
        for moment in shards.moments(name):
            if moment not in state:
                state[moment] = torch.zeros_like(owner, requires_grad=False)
            copy_range(shards.parts(name, moment), fragment.start, fragment.within(state[moment]))
        if id(owner) not in filled:
            set_step(engine, owner, shards.step(name))
            filled.add(id(owner))
    refresh_weights(engine)
    for name, buffer in engine.deepspeed.module.named_buffers():
        if name in shards.shapes:
            buffer.copy_(shards.read(name))


def _check_restored(folder: Path, state: RunState, loaded: list[dict[str, str]]) -> None:
    """Checkpoints from before there were digests of tensors have none: their files' checksums were compared."""
    wrong = [name for name, value in state.digests.items() if any(found.get(name) != value for found in loaded)]
    if wrong:
        versions = ", ".join(f"{name} {version}" for name, version in state.versions.items())
        raise CheckpointError(f"the weights or the optimizer state of {len(wrong)} tensors are not those that were "
                              f"saved: {', '.join(wrong[:4])}", where=str(folder),
                              fix=f"install the versions that wrote it: {versions}")
