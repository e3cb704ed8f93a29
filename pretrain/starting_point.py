"""Continual pretraining: a new run that begins with the weights of a release, an imported model or another run.

`model.init_from` names its folder. Tensors are taken by name, embeddings by the gene, so the vocabulary may have grown,
shrunk or moved; what the source does not have begins as a fresh model's. Nothing of that happens in silence: what is
not taken, what is drawn, and which settings differ is told in events.jsonl and in the model card, and a model that the
weights do not fit is refused with the settings that differ or, where none does, the tensors. Every rank fills what its
optimizer holds from the mapped files, so memory does not grow with the model, in ZeRO 3 too.
"""
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain import checkpoint
from pretrain.checkpoint import SUMS, check_sums
from pretrain.continuation import config_of_run
from pretrain.engine import Engine
from pretrain.export import vocab_of
from pretrain.fragments import fragments, refresh_weights
from pretrain.run_directory import CHECKPOINTS, VOCAB
from pretrain.shards import Shards, copy_range
from pretrain.world import World
from scgpt.errors import CheckpointError, ConfigError
from scgpt.files import sha256
from scgpt.model.config import ModelConfig, read_args
from scgpt.model.weights import naming_of, read_state, rename, weights_file
from scgpt.vocab import GeneVocab

EMBEDDING = "encoder.embedding.weight"   # (tokens, d_model), the one tensor that the vocabulary shapes
_ROWS_AT_ONCE = 4096
_MUST_AGREE = ("kind", "n_layers", "d_model", "n_heads", "d_hid", "input_emb_style", "n_input_bins", "pre_norm")
_MAY_BE_NEW = ("mvc_decoder.", "cls_decoder.", "flag_encoder.", "pert_encoder.", "batch_encoder.", "dsbn.", "bn.",
               "grad_reverse_discriminator.", "decoder.zero_logit.")   # parts that an objective adds
_NOT_OF_A_MODEL = ("name", "init_from", "attention_backend")


@dataclass(frozen=True)
class Source:
    """Weights to begin with."""

    model: ModelConfig
    vocab: GeneVocab
    shapes: Mapping[str, torch.Size]
    parts: Callable[[str], list[Tensor]]   # a tensor's values, flat, in parts that follow one another
    facts: dict[str, Any]                  # what it is: kind, name, checksum, steps


@dataclass
class Lineage:
    """What a run began with, for its checkpoints, events and model card."""

    kind: str                                # release or run
    name: str                                # of its model
    sha256: str                              # of its SHA256SUMS
    step: int | None                         # optimizer steps behind it, where that is known
    genes_kept: int = 0                      # tokens of the vocabulary whose embedding was taken
    genes_new: int = 0                       # drawn
    genes_left: int = 0                      # of the source, not in the vocabulary
    drawn: list[str] = field(default_factory=list)      # tensors that the source does not have
    not_taken: list[str] = field(default_factory=list)  # tensors that the model does not have
    settings: dict[str, list[Any]] = field(default_factory=dict)   # of the model that differ: [there, here]

    def __str__(self) -> str:
        """For the log."""
        parts = [f"the weights of {self.kind} {self.name}", f"{self.genes_kept:,} genes and special tokens kept",
                 f"{self.genes_new:,} drawn", f"{self.genes_left:,} left behind"]
        for words, names in (("drawn", self.drawn), ("not taken", self.not_taken)):
            if names:
                parts.append(f"{words}: {', '.join(sorted({name.split('.')[0] for name in names}))}")
        parts += [f"model.{key} {there} -> {here}" for key, (there, here) in self.settings.items()]
        return "; ".join(parts)


def open_source(path: Path, world: World) -> Source:
    """The weights in a run, one of its checkpoints, or a release. All ranks call it; rank 0 looks at every checksum.

    Raises CheckpointError for anything else, and where a file is not what it was.
    """
    if (path / CHECKPOINTS).is_dir():
        path = world.of_first(lambda: checkpoint.find(path, checkpoint.BEST))
    if path.parent.name == CHECKPOINTS and (path / checkpoint.STATE).is_file():
        return _of_checkpoint(path, world)
    if not (path / SUMS).is_file():
        fix = ("`scgpt import DIR --out INIT` makes one of a published folder" if (path / "args.json").is_file()
               else "give a run, a release or what `scgpt import` has made")
        raise CheckpointError("model.init_from is no starting point", where=str(path), fix=fix)
    world.of_first(lambda: check_sums(path, fix="take the release from where it was published"))
    return _of_release(path)


def _of_checkpoint(folder: Path, world: World) -> Source:
    state = world.of_first(lambda: checkpoint.validate(folder))
    config, _ = config_of_run(state.config, where=str(folder))
    vocab = vocab_of(folder.parents[1], state)
    shards = Shards(folder, stage=state.zero_stage, world_size=state.world_size)
    return Source(config.model, vocab, shards.shapes, shards.parts, {
        "kind": "run", "name": config.model.name, "sha256": sha256(folder / SUMS), "step": state.step})


def _of_release(folder: Path) -> Source:
    weights = read_state(weights_file(folder))
    config = json.loads((folder / "config.json").read_bytes())
    return Source(
        ModelConfig.from_args(read_args(folder)), GeneVocab.from_file(folder / VOCAB, default_token=None),
        {name: tensor.shape for name, tensor in weights.items()}, lambda name: [weights[name].flatten()],
        {"kind": "release", "name": config["name"], "sha256": sha256(folder / SUMS), "step": config.get("step")})


def begin_from(path: Path, engine: Engine, model: ModelConfig, vocab: GeneVocab, world: World) -> dict[str, Any]:
    """Give the engine the weights in `path`; the optimizer stays fresh. All ranks call it. What was done, as JSON.

    Raises CheckpointError where there are no such weights, ConfigError with what does not fit the model.
    """
    source = open_source(path, world)
    tensors = engine.deepspeed.module.state_dict(keep_vars=True)
    shapes = {name: torch.Size(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors.items()}
    naming = naming_of(shapes)
    theirs = {rename(name, naming): name for name in source.shapes}
    drawn = _fitting(source, model, shapes, theirs, where=str(path))
    lineage = Lineage(**source.facts, drawn=drawn, not_taken=sorted(set(theirs) - set(shapes)),
                      settings=_settings(source.model, model))
    rows = np.array([-1 if (row := source.vocab.get(token)) is None else row for token in vocab])
    lineage.genes_kept, lineage.genes_new = int((rows >= 0).sum()), int((rows < 0).sum())
    lineage.genes_left = len(source.vocab) - lineage.genes_kept
    taken = {name: theirs[name] for name in shapes if name in theirs and name not in drawn}
    _fill(engine, source, taken, rows, n_columns=shapes[EMBEDDING][1])
    return asdict(lineage) | {"text": str(lineage)}


def _settings(source: ModelConfig, model: ModelConfig) -> dict[str, list[Any]]:
    there, here = source.model_dump(mode="json"), model.model_dump(mode="json")
    return {key: [there[key], here[key]] for key in here if key not in _NOT_OF_A_MODEL and there[key] != here[key]}


def _fitting(source: Source, model: ModelConfig, shapes: Mapping[str, torch.Size], theirs: Mapping[str, str], *,
             where: str) -> list[str]:
    """The tensors that must be drawn; ConfigError with the settings, or else the tensors, that do not fit."""
    others = {key: found for key, found in _settings(source.model, model).items() if key in _MUST_AGREE}
    if others:   # every tensor that does not fit would follow from them
        kind = source.facts["kind"]
        raise ConfigError("the weights of model.init_from do not fit the model: "
                          + ", ".join(f"{key} is {there} in the {kind} and {here} in the model"
                                      for key, (there, here) in others.items()), where=where,
                          fix=f"set {' '.join(f'model.{key}={there}' for key, (there, _) in others.items())}, or leave "
                              "out model.init_from")
    drawn, faults = [], []
    for name, shape in shapes.items():
        found = source.shapes[theirs[name]] if name in theirs else None
        expected = torch.Size([len(source.vocab), shape[1]]) if name == EMBEDDING else shape
        if found is None and name.startswith(_MAY_BE_NEW):
            drawn.append(name)
        elif found is None:
            faults.append(f"{name} is missing")
        elif found != expected and name.startswith("cls_decoder."):   # other classes
            drawn.append(name)
        elif found != expected:
            faults.append(f"{name} is {tuple(found)} there and {tuple(expected)} here")
    if faults:
        more = f" and {len(faults) - 12} more" if len(faults) > 12 else ""
        raise ConfigError(f"the weights of model.init_from do not fit the model: {'; '.join(faults[:12])}{more}",
                          where=where, fix="give the model the settings of the source, or leave out model.init_from")
    return drawn


@torch.no_grad()
def _fill(engine: Engine, source: Source, taken: Mapping[str, str], rows: np.ndarray[Any, Any], *,
          n_columns: int) -> None:
    for fragment in fragments(engine):
        if fragment.name == EMBEDDING:
            copy_rows(source.parts(taken[EMBEDDING]), rows, fragment.start, fragment.weights, n_columns=n_columns)
        elif fragment.name in taken:
            copy_range(source.parts(taken[fragment.name]), fragment.start, fragment.weights)
    refresh_weights(engine)
    for name, buffer in engine.deepspeed.module.named_buffers():
        if name in taken:
            copy_range(source.parts(taken[name]), 0, buffer.view(-1))


def copy_rows(parts: list[Tensor], rows: np.ndarray[Any, Any], start: int, into: Tensor, *, n_columns: int) -> None:
    """Fill a range of a flattened matrix with rows of another; rows that it does not have stay as they are.

    Args:
        parts: the other matrix, flat, in parts that follow one another.
        rows: (rows,) int: the row of the other matrix for each row of this one, -1 where there is none.
        start: place of the first value of `into` in this matrix.
        into: (values,), changed in place.
        n_columns: of both.
    """
    end = start + into.numel()
    first = start // n_columns
    while first * n_columns < end:
        last = min(first + _ROWS_AT_ONCE, -(-end // n_columns))
        for begin, stop in _runs(rows[first:last]):
            low, high = max(start, (first + begin) * n_columns), min(end, (first + stop) * n_columns)
            shift = (int(rows[first + begin]) - first - begin) * n_columns
            copy_range(parts, low + shift, into[low - start:high - start])
        first = last


def _runs(rows: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """[begin, stop) of each stretch of rows that are there and follow one another."""
    borders = np.flatnonzero((np.diff(rows) != 1) | (rows[:-1] < 0)) + 1
    return [(begin, stop) for begin, stop in itertools.pairwise([0, *borders.tolist(), len(rows)]) if rows[begin] >= 0]
