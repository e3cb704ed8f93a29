import errno
import json
import os
import shutil
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy import sparse

from data_pipeline.genes import map_source
from data_pipeline.sources import open_source
from data_pipeline.tokenization import tokenize_block
from launch import embed as embed_module
from launch.embed import OBSM_KEY, SOURCE_NAME, Embedder, batches_of, embed_cells, embed_file, load_embedder
from pretrain.checkpoint import SUMS, sums_bytes
from scgpt.collate import collate
from scgpt.errors import CheckpointError, ConfigError, ScgptError, SourceError
from scgpt.files import sha256, write_bytes
from scgpt.model import ModelConfig, build_model
from scgpt.vocab import CLS, SPECIAL_TOKENS, GeneVocab

HELD_OUT = Path(__file__).resolve().parents[2] / "examples" / "atlas" / "held-out" / "pancreas-baron2016-lib1.h5ad"
N_CELLS = 40


@pytest.fixture(scope="module")
def cells_h5ad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first cells of a real library, with an obsm of their own; the last one has no count."""
    cells = anndata.read_h5ad(HELD_OUT)[:N_CELLS].copy()
    cells.X = sparse.csr_matrix(np.vstack([cells.X[:-1].toarray(), np.zeros((1, cells.n_vars), np.float32)]))
    cells.obsm["other"] = np.ones((N_CELLS, 2), np.float32)
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def tiny_release(tmp_path_factory: pytest.TempPathFactory, cells_h5ad: Path) -> Path:
    """Random weights under a release's file names, with a vocabulary of 3,000 of the cells' genes."""
    folder = tmp_path_factory.mktemp("release")
    with h5py.File(cells_h5ad) as file:
        names = [name.decode() for name in file["var"][file["var"].attrs["_index"]][:3000]]
    vocab = GeneVocab([*names, *SPECIAL_TOKENS])
    (folder / "vocab.json").write_text(json.dumps(vocab.get_stoi()))
    config = ModelConfig(name="tiny", n_layers=2, d_model=16, n_heads=2, d_hid=16, dropout=0.1)
    (folder / "args.json").write_text(json.dumps({**config.to_args(), "max_seq_len": 64, "n_bins": 51}))
    torch.manual_seed(0)
    torch.save(build_model(config, vocab).state_dict(), folder / "best_model.pt")
    return folder


@pytest.fixture(scope="module")
def embedder(tiny_release: Path) -> Embedder:
    return load_embedder(tiny_release, "cpu")


def test_the_copy_gains_rows_of_length_one_and_keeps_all_else(tiny_release: Path, cells_h5ad: Path, tmp_path: Path):
    before = sha256(cells_h5ad)
    result = embed_file(tiny_release, cells_h5ad, tmp_path / "out.h5ad")
    assert (result.n_cells, result.d_model, result.n_genes_mapped) == (N_CELLS, 16, 3010)   # 10 by other names
    assert sha256(cells_h5ad) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5ad"]
    given_cells, found = anndata.read_h5ad(cells_h5ad), anndata.read_h5ad(tmp_path / "out.h5ad")
    embeddings = found.obsm.pop(OBSM_KEY)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-6)
    assert len(np.unique(embeddings.round(4), axis=0)) > N_CELLS - 3
    pd.testing.assert_frame_equal(given_cells.obs, found.obs)
    assert (given_cells.X != found.X).nnz == 0
    assert list(found.obsm) == ["other"]


def test_blocks_and_batches_do_not_show(tiny_release: Path, cells_h5ad: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch):
    embed_file(tiny_release, cells_h5ad, tmp_path / "whole.h5ad")
    monkeypatch.setattr(embed_module, "BLOCK_VALUES", 5000)
    monkeypatch.setattr(embed_module, "BATCH_TOKENS", 100)
    embed_file(tiny_release, cells_h5ad, tmp_path / "parts.h5ad")
    whole, parts = (anndata.read_h5ad(tmp_path / name).obsm[OBSM_KEY] for name in ("whole.h5ad", "parts.h5ad"))
    np.testing.assert_allclose(whole, parts, atol=1e-5)


def test_each_cell_is_what_the_model_makes_of_it_alone(embedder: Embedder, cells_h5ad: Path):
    """The slow twin: one cell at a time, padded as upstream does it, through upstream's `_encode`."""
    with open_source(cells_h5ad, name=SOURCE_NAME) as source:
        cells = tokenize_block(source, map_source(source, embedder.vocab), 0, N_CELLS)
    found = embed_cells(embedder, cells, seed=3)
    for row in range(0, N_CELLS, 7):
        batch = collate(cells.take(np.array([row])), embedder.collate_config, cls_id=embedder.vocab[CLS], seed=3,
                        epochs=0, mask=False)
        padded = batch.padded(embedder.vocab["<pad>"], -2)
        genes, values = torch.from_numpy(padded["gene"]), torch.from_numpy(padded["expr"])
        with torch.no_grad():
            encoded = embedder.model._encode(genes, values, genes.eq(embedder.vocab["<pad>"]))
        expected = encoded[0, 0].numpy() / np.linalg.norm(encoded[0, 0].numpy())
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_the_name_of_the_file_changes_nothing_but_the_seed_does(tiny_release: Path, cells_h5ad: Path, tmp_path: Path):
    other_name = tmp_path / "other-name.h5ad"
    other_name.write_bytes(cells_h5ad.read_bytes())
    outs = [tmp_path / f"{index}.h5ad" for index in range(3)]
    embed_file(tiny_release, cells_h5ad, outs[0], seed=1)
    embed_file(tiny_release, other_name, outs[1], seed=1)
    embed_file(tiny_release, cells_h5ad, outs[2], seed=2)
    first, renamed, reseeded = (anndata.read_h5ad(out).obsm[OBSM_KEY] for out in outs)
    np.testing.assert_array_equal(first, renamed)
    assert np.abs(first - reseeded).max() > 1e-3


def test_log_normalised_values_embed_as_counts_do_without_ties(tiny_release: Path, cells_h5ad: Path, tmp_path: Path):
    """Bins are quantiles of the cell, which a growing function of its values leaves alone."""
    cells = anndata.read_h5ad(cells_h5ad)
    cells.X.data = np.log1p(cells.X.data / 3)
    cells.write_h5ad(tmp_path / "log.h5ad")
    result = embed_file(tiny_release, tmp_path / "log.h5ad", tmp_path / "out.h5ad")
    assert result.n_cells == N_CELLS


def test_an_embedding_that_is_there_is_replaced(tiny_release: Path, cells_h5ad: Path, tmp_path: Path):
    embed_file(tiny_release, cells_h5ad, tmp_path / "a.h5ad", seed=1)
    embed_file(tiny_release, tmp_path / "a.h5ad", tmp_path / "b.h5ad", seed=1)
    a, b = (anndata.read_h5ad(tmp_path / name).obsm[OBSM_KEY] for name in ("a.h5ad", "b.h5ad"))
    np.testing.assert_array_equal(a, b)


def test_what_cannot_be_embedded_leaves_nothing(tiny_release: Path, cells_h5ad: Path, tmp_path: Path):
    foreign = anndata.read_h5ad(cells_h5ad)
    foreign.var_names = [f"unknown-{index}" for index in range(foreign.n_vars)]
    foreign.write_h5ad(tmp_path / "foreign.h5ad")
    out = tmp_path / "out.h5ad"
    with pytest.raises(SourceError, match="0 of 20,125 genes") as caught:
        embed_file(tiny_release, tmp_path / "foreign.h5ad", out)
    assert "vocabulary, or lower" not in str(caught.value)   # that is advice for a corpus
    for device in ("tpu", "cuda:99", "cuda:x", ""):
        with pytest.raises(ConfigError, match=f"no device '{device}'"):
            embed_file(tiny_release, cells_h5ad, out, device=device)
    with pytest.raises(ConfigError, match="a folder is there"):
        embed_file(tiny_release, cells_h5ad, tmp_path)
    with pytest.raises(ConfigError, match="would be overwritten"):
        embed_file(tiny_release, cells_h5ad, cells_h5ad)
    with pytest.raises(ConfigError, match="no such folder"):
        embed_file(tiny_release, cells_h5ad, tmp_path / "missing" / "out.h5ad")
    with pytest.raises(CheckpointError, match="no release"):
        embed_file(tmp_path, cells_h5ad, out)
    negative = anndata.read_h5ad(cells_h5ad)
    negative.X.data[-1] = -1
    negative.write_h5ad(tmp_path / "negative.h5ad")
    with pytest.raises(SourceError, match=r"negative values.*give a whole \.h5ad file whose X or raw holds"):
        embed_file(tiny_release, tmp_path / "negative.h5ad", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.h5ad", "negative.h5ad"]


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "cells.h5ad"),   # a copy names what it reads
    OSError("Can't write data (file write failed: errno = 28, error message = 'No space left on device')"),   # HDF5
])
def test_a_full_disk_is_that_of_the_output(tiny_release, cells_h5ad, tmp_path, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(embed_module, "_write", fail)
    out = tmp_path / "out.h5ad"
    with pytest.raises(ScgptError) as caught:
        embed_file(tiny_release, cells_h5ad, out)
    assert str(caught.value) == f"No space left on device ({out}); make room, or give an --out on another disk"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["args.json", "vocab.json", "model-00002-of-00002.safetensors"])
def test_a_damaged_file_of_a_release_is_named_and_one_beside_it_is_none(tiny_release, cells_h5ad, tmp_path, name):
    release = shutil.copytree(tiny_release, tmp_path / "release")
    state = torch.load(release / "best_model.pt", weights_only=True)
    (release / "best_model.pt").unlink()
    first, second = ({key: state[key].contiguous() for key in keys} for keys in (list(state)[::2], list(state)[1::2]))
    files = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
    for file, tensors in files.items():
        save_file(tensors, release / file)
    index = {"weight_map": {key: file for file, tensors in files.items() for key in tensors}}
    (release / "model.safetensors.index.json").write_text(json.dumps(index))
    write_bytes(release / SUMS, sums_bytes({path.name: sha256(path) for path in release.iterdir()}))
    embed_file(release, cells_h5ad, release / "out.h5ad")
    content = bytearray((release / name).read_bytes())
    content[-2] ^= 1
    (release / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"'{name}' is not what SHA256SUMS says"):
        embed_file(release, cells_h5ad, release / "out.h5ad")


def test_a_vocabulary_without_its_special_tokens_is_named(tiny_release: Path, cells_h5ad: Path, tmp_path: Path):
    release = shutil.copytree(tiny_release, tmp_path / "release")
    vocab = json.loads((release / "vocab.json").read_bytes())
    (release / "vocab.json").write_text(json.dumps({f"x{name}" if name[0] == "<" else name: index
                                                    for name, index in vocab.items()}))
    with pytest.raises(CheckpointError, match=r"lacks <cls> and <pad> \(.*vocab\.json"):
        embed_file(release, cells_h5ad, tmp_path / "out.h5ad")


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), most=st.integers(1, 200))
def test_batches_hold_every_cell_once_and_few_tokens(lengths: list[int], most: int):
    batches = list(batches_of(np.array(lengths), most))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in batch) for batch in batches]
    assert all(size <= most or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    assert all(sizes[i] + lengths[batches[i + 1][0]] > most for i in range(len(batches) - 1))
