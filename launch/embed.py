"""Cell embeddings of any h5ad file by a release: the one place where pipeline and model meet.

As upstream's `embed_data`: the genes of the vocabulary, binned over the whole cell, sampled to the release's context
length, position 0 of the encoder's output in eval mode, scaled to length 1. Draws are keyed by (seed, row), where
upstream's are unseeded. Memory is that of a block of rows and of the model, whatever the file: rows go from the matrix
to the embedding block by block, and a forward pass takes a bounded number of tokens.
"""
import dataclasses
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scgpt.collate import CollateConfig, collate
from scgpt.data.schema import RaggedBatch
from scgpt.errors import CheckpointError, ConfigError, ScgptError, SourceError
from scgpt.files import publish, remove_abandoned
from scgpt.vocab import CLS, PAD, GeneVocab

if TYPE_CHECKING:
    import h5py
    from torch import nn

    from data_pipeline.genes import GeneMap
    from data_pipeline.sources.base import Source

OBSM_KEY = "X_scGPT"
BLOCK_VALUES = 1 << 22   # stored values of a block of rows
BATCH_TOKENS = 1 << 14   # tokens of a forward pass; one cell may exceed it
MIN_GENE_OVERLAP = 0.05  # share of the file's genes with a token, below which it is the wrong species or column
SOURCE_NAME = "cells"    # in the key of every draw, whatever the file is called
_FIX_GENES = "give a file whose var_names, or a column of var, hold symbols or Ensembl ids of the release's genes"
_FIX_VALUES = "give a whole .h5ad file whose X or raw holds counts, or other values of 0 or more"
_FIX_OLD = "read and write the file once with a newer anndata"
_FIXES = (_FIX_GENES, _FIX_VALUES, _FIX_OLD)


@dataclass(frozen=True)
class Embedder:
    """A model in eval mode, and how its cells are prepared."""

    model: "nn.Module"
    vocab: GeneVocab
    collate_config: CollateConfig
    device: str
    d_model: int


@dataclass(frozen=True)
class Embedded:
    """What was written."""

    out: Path
    n_cells: int
    d_model: int
    n_genes: int          # columns of the file
    n_genes_mapped: int   # of them in the vocabulary

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**dataclasses.asdict(self), "out": str(self.out)}


def embed_file(release: Path, source_path: Path, out: Path, *, seed: int = 0, device: str = "auto") -> Embedded:
    """Write a copy of an h5ad file with `obsm["X_scGPT"]`, (cells, d_model) float32, rows of length 1.

    Args:
        release: folder of a release, ours or a published one.
        source_path: the h5ad file; it is not touched.
        out: the copy, whole or absent.
        seed: of the sampled genes and tied bins.
        device: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:N`.

    Raises SourceError for a file that cannot be embedded, CheckpointError for a release that cannot be read,
    ConfigError for an `out` that cannot be written or a device that is not there.
    """
    from data_pipeline.genes import map_source
    from data_pipeline.sources import open_source
    from data_pipeline.sources.hdf5_structure import check_structure
    from data_pipeline.sources.location import Location

    if not out.parent.is_dir():
        raise ConfigError("there is no such folder", where=str(out.parent), fix="make it, or give another --out")
    if out.is_dir():
        raise ConfigError("a folder is there", where=str(out), fix="give the path of a file to write")
    location = Location.of(source_path)
    location.check()
    check_structure(location)
    with _advice(_FIX_VALUES), open_source(location, name=SOURCE_NAME, kind="h5ad") as source:
        if out.exists() and out.samefile(source_path):
            raise ConfigError("the input would be overwritten", where=str(out), fix="give another --out")
        embedder = load_embedder(release, device)
        with _advice(_FIX_GENES):
            gene_map = map_source(source, embedder.vocab, min_gene_overlap=MIN_GENE_OVERLAP)
        remove_abandoned(out)
        with _full_disk_is_of(out), publish(out) as temporary:
            shutil.copyfile(source_path, temporary)
            _write(temporary, source.n_cells, embedder.d_model, embed_blocks(embedder, source, gene_map, seed=seed))
        return Embedded(out, source.n_cells, embedder.d_model, source.n_genes, gene_map.n_mapped)


@contextmanager
def _advice(fix: str) -> Iterator[None]:
    """The readers of atlases advise on the settings of a corpus; here there are none."""
    try:
        yield
    except SourceError as error:
        if error.fix not in _FIXES:
            error.fix = fix
        raise


@contextmanager
def _full_disk_is_of(out: Path) -> Iterator[None]:
    """A copy that finds no room names the file that it reads, and HDF5 its own source: it is the output's disk."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC and os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise ScgptError(os.strerror(errno.ENOSPC), where=str(out),
                         fix="make room, or give an --out on another disk") from error


def load_embedder(release: Path, device: str = "auto") -> Embedder:
    """The model of a release folder (args.json, vocab.json, tensors), ready to embed."""
    from pretrain.checkpoint import SUMS, check_sums
    from scgpt.model.build import build_model
    from scgpt.model.config import ModelConfig, read_args
    from scgpt.model.weights import load_state, read_state, weights_file, weights_files

    if (release / SUMS).is_file():   # a published folder has none; `best_model.pt` beside safetensors is not read
        check_sums(release, fix="take the release from where it was published, or export it again",
                   only=["args.json", "vocab.json", *(path.name for path in weights_files(release))])
    args = read_args(release)
    vocab = GeneVocab.from_file(release / "vocab.json", default_token=None)
    missing = [token for token in (CLS, PAD) if token not in vocab]
    if missing:
        raise CheckpointError(f"its vocabulary lacks {' and '.join(missing)}", where=str(release / "vocab.json"),
                              fix="take the file from where the release was published")
    model = build_model(ModelConfig.from_args(args), vocab)
    weights = weights_file(release)
    load_state(model, read_state(weights), where=str(weights), ignore=("flag_encoder.", "cls_decoder."))
    return make_embedder(model, vocab, CollateConfig.from_args(args), device)


def make_embedder(model: "nn.Module", vocab: GeneVocab, collate_config: CollateConfig, device: str) -> Embedder:
    """Put a model on a device, in eval mode."""
    device = choose_device(device)
    return Embedder(model.eval().to(device), vocab, collate_config, device, int(model.d_model))  # type: ignore[arg-type]


def choose_device(device: str) -> str:
    """`auto` resolved; ConfigError where the device is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"there is no device '{device}'", fix="give --device auto, cpu, cuda or cuda:N")
    n_gpus, number = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    if device != "cpu" and number >= n_gpus:
        raise ConfigError(f"there is no device '{device}' here: torch finds {n_gpus or 'no'} GPU(s)",
                          fix="give --device auto or cpu")
    return device


def embed_blocks(embedder: Embedder, source: "Source", gene_map: "GeneMap", *,
                 seed: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first row, embeddings of a block of rows (cells, d_model)), in order, every row once."""
    from data_pipeline.tokenization import tokenize_block

    first = 0
    while first < source.n_cells:
        last = _block_end(source, first)
        yield first, embed_cells(embedder, tokenize_block(source, gene_map, first, last, counts=False), seed=seed)
        first = last


def _block_end(source: "Source", first: int) -> int:
    """The row before which a block that starts at `first` ends: BLOCK_VALUES values, at least one row."""
    horizon = min(source.n_cells, first + (1 << 16))
    offsets = source.value_offsets(first, horizon)
    return first + max(1, int(np.searchsorted(offsets, offsets[0] + BLOCK_VALUES, side="right")) - 1)


def embed_cells(embedder: Embedder, cells: RaggedBatch, *, seed: int) -> NDArray[np.float32]:
    """Embeddings of cells in memory, (cells, d_model) float32, rows of length 1.

    A cell without a gene of the vocabulary is `<cls>` alone.
    """
    import torch

    from pretrain.data import to_tensors

    lengths = np.minimum(cells.lengths, embedder.collate_config.context_length - 1) + 1
    found = np.empty((len(cells), embedder.d_model), np.float32)
    for rows in batches_of(lengths, BATCH_TOKENS):
        batch = collate(cells.take(rows), embedder.collate_config, cls_id=embedder.vocab[CLS], seed=seed, epochs=0,
                        mask=False)
        with torch.inference_mode():
            packed = to_tensors(batch, embedder.device).inputs
            found[rows] = embedder.model(packed)["cell_emb"].float().cpu().numpy()
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return found


def batches_of(lengths: NDArray[np.int64], most: int) -> Iterator[NDArray[np.int64]]:
    """Cells of similar length together, at most `most` tokens a batch (a longer cell is one), every cell once."""
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    first = 0
    while first < len(order):
        before = ends[first] - lengths[order[first]]
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield order[first:last]
        first = last


def _write(path: Path, n_cells: int, d_model: int, blocks: Iterator[tuple[int, NDArray[np.float32]]]) -> None:
    """Add the matrix to an h5ad file in anndata's encoding, block by block."""
    import h5py

    with h5py.File(path, "r+") as file:
        matrix = _make_dataset(file, n_cells, d_model)
        for first, embeddings in blocks:
            matrix[first:first + len(embeddings)] = embeddings


def _make_dataset(file: "h5py.File", n_cells: int, d_model: int) -> "h5py.Dataset":
    import h5py

    group = file.require_group("obsm") if not isinstance(file.get("obsm"), h5py.Dataset) else None
    if group is None:
        raise SourceError("its obsm is in the form that anndata wrote before version 0.7", where=file.filename,
                          fix=_FIX_OLD)
    group.attrs.setdefault("encoding-type", "dict")
    group.attrs.setdefault("encoding-version", "0.1.0")
    if OBSM_KEY in group:
        del group[OBSM_KEY]
    matrix = group.create_dataset(OBSM_KEY, (n_cells, d_model), np.float32)
    matrix.attrs["encoding-type"], matrix.attrs["encoding-version"] = "array", "0.2.0"
    return matrix
