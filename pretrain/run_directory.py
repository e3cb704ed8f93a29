"""A run's directory: made or opened, held against the configuration and the corpus, locked by every rank.

    config.yaml (resolved)  deepspeed.json  vocab.json  metrics.jsonl  events.jsonl  checkpoints/  ranks/  wandb/
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pretrain import checkpoint
from pretrain.checkpoint import RunState
from pretrain.config import TrainConfig
from pretrain.continuation import config_of_run, differences
from pretrain.corpus import Corpus
from pretrain.metrics import RunLog
from pretrain.precision import resolve_precision
from pretrain.recovery import hold_rank
from pretrain.world import World
from scgpt.config import read_values
from scgpt.errors import CheckpointError, ConfigError
from scgpt.files import TEMPORARY_PREFIX, remove, write_bytes
from scgpt.stderr import say

CONFIG, DEEPSPEED, VOCAB, CHECKPOINTS = "config.yaml", "deepspeed.json", "vocab.json", "checkpoints"
_PACKAGES = ("scgpt-pretrain", "torch", "deepspeed", "numpy", "numba")


def total_steps(config: TrainConfig, corpus: Corpus) -> int:
    """Optimizer steps until the first of the limits of `train`; tokens are those of the average step."""
    limits, size = config.train, config.batch.global_batch_size
    steps = [limits.max_steps] if limits.max_steps is not None else []
    if limits.max_epochs is not None:
        steps.append(math.ceil(corpus.order.n_cells(limits.max_epochs) / size))
    if limits.max_tokens is not None:
        tokens_a_cell = corpus.order.mean(config.collate_config(corpus.vocab).n_tokens(corpus.train.lengths))
        steps.append(math.ceil(limits.max_tokens / (tokens_a_cell * size)))
    return max(1, min(steps))


@dataclass(frozen=True)
class OpenRun:
    """A run directory that this start holds."""

    path: Path
    state: RunState      # of the newest valid checkpoint; at step 0 for a new run
    log: RunLog
    total_steps: int
    before: TrainConfig | None   # what that checkpoint was written with; None for a new run

    @property
    def checkpoints(self) -> Path:
        """Their folder."""
        return self.path / CHECKPOINTS


@contextmanager
def open_run(config: TrainConfig, path: Path, corpus: Corpus, world: World) -> Iterator[OpenRun]:
    """Make the directory, or open it to continue the run in it. All ranks call it.

    Raises ConfigError where it holds something else, or a run with another configuration or corpus, or the batch does
    not fit the ranks; CheckpointError where ranks of another start hold it.
    """
    config.batch.accumulation(world.world_size)   # before anything is made
    world.of_first(lambda: _claim(path))
    with hold_rank(path, world, tell=say):
        total = total_steps(config, corpus)
        passed_over = world.of_first(lambda: _check_same(config, path))
        log = RunLog(path, config, total_steps=total, first=world.is_first)
        try:
            state = world.of_first(lambda: _restore(path, corpus, log))
            if state.step == 0:
                _begin(state, config, corpus, world)
            before: TrainConfig | None = None
            gone: list[str] = []
            if state.config:   # what counts: config.yaml is there to be read, and may have been edited
                folder = path / CHECKPOINTS / checkpoint.checkpoint_name(state.step)
                before, gone = config_of_run(state.config, where=str(folder))
                _refuse_other(before, config, where=folder)
            for key in dict.fromkeys([*passed_over, *gone]):
                log.event("setting_passed_over", f"the run was started by a version that had the setting {key}; it had "
                                                 "the value that this version computes with", key=key)
            state.config = config.model_dump(mode="json")
            yield OpenRun(path, state, log, total, before)
        except BaseException as error:
            log.failed(error)
            raise
        finally:
            log.close()


def _claim(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        found = sorted((part.name for part in path.iterdir()), key=lambda name: (name.startswith("."), name))
        if found and not {CONFIG, "ranks"} & set(found):
            raise ConfigError(f"the output directory holds something else: {found[0]}", where=str(path),
                              fix="give a new directory, or that of a run to continue")
        (path / CHECKPOINTS).mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the run directory cannot be made: {error.strerror}", where=str(path),
                          fix="give a directory that you may write to") from error


def _check_same(config: TrainConfig, path: Path) -> list[str]:
    """Hold a configuration against the one that is saved; the keys of an earlier version that are passed over."""
    saved = path / CONFIG
    if not saved.is_file():
        return []
    try:
        before, passed_over = config_of_run(read_values(saved, kind="pretrain"), where=str(saved))
    except ConfigError:
        if checkpoint.steps_of(path / CHECKPOINTS):   # they hold it too; what is damaged here is written anew
            return []
        raise
    _refuse_other(before, config, where=saved)
    return passed_over


def _refuse_other(before: TrainConfig, config: TrainConfig, *, where: Path) -> None:
    found = differences(before.model_dump(mode="json"), config)
    if found:
        raise ConfigError(f"the run was started with another configuration ({'; '.join(found)})", where=str(where),
                          fix="give the same values to continue it, or another --out to start a new run")


def _restore(path: Path, corpus: Corpus, log: RunLog) -> RunState:
    """Rank 0: the newest valid checkpoint's state, or a new one; what a killed start left is told and removed."""
    checkpoints = path / CHECKPOINTS
    state, skipped = checkpoint.newest_valid(checkpoints)
    for text in skipped:
        log.event("checkpoint_skipped", f"checkpoint {text}")
    damaged = checkpoint.steps_of(checkpoints)
    if state is None and damaged:
        raise CheckpointError(f"none of the run's checkpoints is whole: {'; '.join(skipped)}", where=str(checkpoints),
                              fix="bring one back from a copy, or remove them to begin the run anew")
    for left_over in checkpoints.glob(f"{TEMPORARY_PREFIX}*"):
        remove(left_over)
    if state is not None and state.corpus["sha256"] != corpus.facts()["sha256"]:
        raise ConfigError("the corpus is not the one that the run was started with", where=corpus.where,
                          fix="give data.corpus=DIR of that corpus, or another --out to start a new run")
    write_bytes(path / VOCAB, corpus.vocab.to_bytes())   # at each start: a damaged one would be found at the export
    return RunState() if state is None else state


def _begin(state: RunState, config: TrainConfig, corpus: Corpus, world: World) -> None:
    state.world_size, state.zero_stage = world.world_size, config.deepspeed.zero_stage
    state.precision = resolve_precision(config.train.precision, world.device)
    state.corpus = corpus.facts()
    state.versions = {name: version(name) for name in _PACKAGES}
