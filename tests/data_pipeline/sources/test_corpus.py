import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import plan
from data_pipeline.sources import open_source
from scgpt.data import Manifest, TokenDataset
from scgpt.errors import ConfigError, DataError, ScgptError, SourceError
from scgpt.files import json_bytes
from tests.data_pipeline.atlases import build_here, bytes_of, cells_of, config_of, random_counts, write_h5ad
from tests.data_pipeline.sources.formats import gene_names, on_memory

COUNTS = random_counts(1, 60, 40)
SETTINGS = {"splits": {"valid": 0.3}, "shards": {"max_bytes": 4096}, "columns": ["tissue"]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("c")
    path = write_h5ad(folder / "a.h5ad", COUNTS, obs={"tissue": pd.Categorical(["blood", "lung", None] * 20)})
    build_here(config_of(path, **SETTINGS), folder / "corpus")
    return folder / "corpus"


def test_rows_are_the_cells_of_train_then_valid(corpus: Path) -> None:
    rows = np.concatenate([TokenDataset.open(corpus, split).obs(["source_row"]).column(0).to_numpy()
                           for split in ("train", "valid")])
    with open_source(corpus) as source:
        assert (source.kind, source.n_cells, source.n_values()) == ("corpus", 60, COUNTS.nnz)
        genes = [source.gene_names().index(name) for name in gene_names(40)]
        for first, last in ((0, 60), (0, 1), (59, 60), (17, 50), (5, 5)):
            found, expected = source.read_rows(first, last), COUNTS[rows[first:last]]
            assert np.array_equal(found.toarray()[:, genes], expected.toarray())
            assert found.nnz == expected.nnz
            assert np.array_equal(np.diff(source.value_offsets(first, last)),
                                  np.diff(COUNTS.indptr)[rows[first:last]])
        assert {"source", "source_row", "tissue"} <= set(source.obs_columns())
        assert source.obs(["source_row"], 17, 50)["source_row"].to_pylist() == rows[17:50].tolist()


@pytest.mark.parametrize("shards", [{}, {"form": "zarr"}, {"compression": "zstd"}])
def test_a_corpus_of_a_corpus_has_its_cells_and_what_is_known_of_them(tmp_path: Path, shards: dict[str, str],
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BLOCK_VALUES", 100)
    path = write_h5ad(tmp_path / "a.h5ad", COUNTS, obs={"tissue": pd.Categorical(["blood", "lung", None] * 20)})
    build_here(config_of(path, **{**SETTINGS, "shards": {**SETTINGS["shards"], **shards}}), tmp_path / "first")
    again = config_of(tmp_path / "first", columns=["tissue"], cells={"filter": 'tissue == "lung"'})
    manifest = build_here(again, tmp_path / "second")
    lung = {row: cell for (_, row), cell in cells_of(tmp_path / "first").items() if row % 3 == 1}
    assert sorted(map(str, cells_of(tmp_path / "second").values())) == sorted(map(str, lung.values()))
    assert set(TokenDataset.open(tmp_path / "second").obs(["tissue"]).column(0).to_pylist()) == {"lung"}
    assert (manifest.sources[0].cells_in, manifest.sources[0].cells_written) == (60, 20)


def test_a_corpus_behind_a_url_reads_the_same(corpus: Path) -> None:
    with on_memory(corpus) as url, open_source(url) as far, open_source(corpus) as near:
        assert np.array_equal(far.read_rows(7, 50).toarray(), near.read_rows(7, 50).toarray())
        assert far.obs(["tissue"], 7, 50)["tissue"].to_pylist() == near.obs(["tissue"], 7, 50)["tissue"].to_pylist()


@pytest.mark.parametrize("name", ["manifest.json", "vocab.json", "train/part-00000.arrow",
                                  "train/part-00000.obs.parquet"])
def test_a_damaged_corpus_makes_no_other(tmp_path: Path, corpus: Path, name: str) -> None:
    for file, content in bytes_of(corpus).items():
        (tmp_path / "a" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / file).write_bytes(content[:len(content) // 2] if file == name else content)
    with pytest.raises(ScgptError, match=name.rpartition("/")[2] if "obs" not in name else "cannot be read"):
        build_here(config_of({"path": str(tmp_path / "a"), "kind": "corpus"}), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a corpus"):
        open_source(tmp_path, kind="corpus")


def rot(corpus: Path) -> None:
    """Change one byte of a value, valid as any: only the checksum of its file tells."""
    shard = corpus / "train" / "part-00000.arrow"
    content, value = bytearray(shard.read_bytes()), int(TokenDataset.open(corpus)[0]["expressions"][-1])
    batch = Manifest.read(corpus).splits["train"].shards[0].batches[0]
    place = content.index(value, batch.offset + 400)
    content[place] ^= 1
    shard.write_bytes(content)


def test_a_count_that_rotted_makes_no_corpus(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "poor")
    rot(tmp_path / "poor")
    with pytest.raises(SourceError, match="part-00000.arrow"):
        build_here(config_of(tmp_path / "poor"), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_remote_corpus_is_held_against_its_checksums_too(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "poor")
    with on_memory(tmp_path / "poor") as url:
        build_here(config_of({"path": url, "kind": "corpus"}), tmp_path / "whole")
    rot(tmp_path / "poor")
    with on_memory(tmp_path / "poor") as url, pytest.raises(SourceError, match="sha256.*part-00000.arrow"):
        build_here(config_of({"path": url, "kind": "corpus"}), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_it_has_one_column_of_genes_and_one_matrix(corpus: Path) -> None:
    with open_source(corpus) as source, pytest.raises(ConfigError, match="no gene column 'x'.*choose one of: index"):
        source.gene_names("x")
    with pytest.raises(ConfigError, match="no layer 'raw'.*choose one of: X"):
        open_source(corpus, layer="raw")


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """form -> a corpus of the same cells, with what a build of it holds as `NAME-out`."""
    folder = tmp_path_factory.mktemp("forms")
    path = write_h5ad(folder / "a.h5ad", COUNTS, obs={"tissue": pd.Categorical(["blood", "lung", None] * 20)})
    found = {}
    for form, shards in {"arrow": {}, "zstd": {"compression": "zstd"}, "zarr": {"form": "zarr"},
                         "cold": {"form": "zarr", "compression": "lz4"}}.items():
        found[form] = folder / form / "c"
        build_here(config_of(path, **{**SETTINGS, "shards": {**SETTINGS["shards"], **shards}}), found[form])
        build_here(config_of(found[form], columns=["tissue"]), folder / form / "out")
    return found


def harm_a_file(corpus: Path, draw: np.random.Generator) -> None:
    """Turn bits of some bytes, cut the file, or take it away."""
    path = draw.choice(sorted(path for path in corpus.rglob("*") if path.is_file() and path.name not in (
        "run.json", ".lock")))
    content, way = bytearray(path.read_bytes()), draw.integers(3)
    if way == 0:
        for place in draw.integers(0, len(content), draw.integers(1, 20)):
            content[place] ^= draw.integers(1, 256)
    path.write_bytes(content if way == 0 else content[:draw.integers(len(content))])
    if way == 2:
        path.unlink()


def harm_the_manifest(corpus: Path, draw: np.random.Generator) -> None:
    """Change one entry and seal the manifest anew, as a program with a fault would write it."""
    body = json.loads((corpus / "manifest.json").read_bytes())
    body.pop("sha256")
    within: Any = body
    while True:
        keys = list(within) if isinstance(within, dict) else list(range(len(within)))
        key = keys[draw.integers(len(keys))]
        if not isinstance(within[key], dict | list) or not within[key] or draw.integers(10) == 0:
            break
        within = within[key]
    held = within[key]
    if draw.integers(4) == 0:
        within.pop(key)
    elif isinstance(held, int | float):
        within[key] = [held + 1, held - 1, 0, -1, held * 2, 2**40][draw.integers(6)]
    else:
        within[key] = [held * 2 if isinstance(held, str | list) else {}, "", None, 3][draw.integers(4)]
    (corpus / "manifest.json").write_bytes(
        json_bytes({**body, "sha256": hashlib.sha256(json_bytes(body)).hexdigest()}))


@pytest.mark.parametrize("harm", [harm_a_file, harm_the_manifest])
@settings(max_examples=30, deadline=None)
@given(form=st.sampled_from(["arrow", "zstd", "zarr", "cold"]), seed=st.integers(0, 2**31))
def test_a_harmed_corpus_gives_an_error_or_its_own_cells(tmp_path_factory: pytest.TempPathFactory,
                                                         forms: dict[str, Path], harm: Any, form: str,
                                                         seed: int) -> None:
    folder = tmp_path_factory.mktemp("h")
    shutil.copytree(forms[form], folder / "c")
    harm(folder / "c", np.random.default_rng(seed))
    try:
        build_here(config_of({"path": str(folder / "c"), "kind": "corpus"}, columns=["tissue"]), folder / "out")
    except ScgptError as error:
        assert str(folder / "c") in str(error)  # noqa: PT017 some entries of the manifest bind nothing
        told = error
    else:
        assert harm is harm_the_manifest
        assert cells_of(folder / "out") == cells_of(forms[form].parent / "out")
        return
    assert "\n" not in str(told)
    assert told.fix
    assert not (folder / "out" / "manifest.json").exists()
