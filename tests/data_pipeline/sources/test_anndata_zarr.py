import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from data_pipeline.sources import anndata_files, open_source
from scgpt.errors import ConfigError, ScgptError, SourceError
from tests.data_pipeline.atlases import (
    build_here,
    bytes_of,
    cells_of,
    config_of,
    random_counts,
    write_h5ad,
    write_zarr,
    zip_folder,
)

FORMATS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda matrix: matrix.toarray()}
LAYOUTS = {"v2": {"version": 2}, "v3": {"version": 3}, "chunked": {"version": 2, "chunk": 16},
           "sharded": {"version": 3, "chunk": 16, "shard": 64}}
OBS = {"word": pd.Categorical(["a", None, "b"] * 20), "number": np.arange(60), "share": [0.5, np.nan, 1.5] * 20,
       "flag": np.arange(60) % 2 == 0, "maybe": pd.array([1, None, 3] * 20, dtype="Int64"),
       "maybe_flag": pd.array([True, None, False] * 20, dtype="boolean"), "level": pd.Categorical(np.arange(60) % 3),
       "text": [f"cell {i}" for i in range(60)]}


@pytest.fixture(scope="module")
def counts() -> sparse.csr_matrix:
    return random_counts(1, 60, 40)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_range_equals_the_matrix(tmp_path: Path, counts: sparse.csr_matrix, form: str, layout: str,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anndata_files, "SCAN_VALUES", 77)
    options = LAYOUTS[layout] if form != "dense" else {"version": LAYOUTS[layout]["version"]}
    path = write_zarr(tmp_path / "a.zarr", FORMATS[form](counts), **options)
    for place in (path, zip_folder(path), zip_folder(path, within="a.zarr/")):
        with open_source(place) as source:
            assert (source.kind, source.name, source.format) == ("zarr", "a", form)
            assert (source.n_cells, source.n_genes) == (60, 40)
            for first, last in ((0, 60), (0, 1), (59, 60), (17, 33), (5, 5)):
                assert np.array_equal(source.read_rows(first, last).toarray(), counts[first:last].toarray())


@settings(max_examples=12, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 9)), elements=st.integers(0, 3).map(float)),
       st.sampled_from(sorted(FORMATS)), st.sampled_from(sorted(LAYOUTS)), st.data())
def test_any_matrix_reads_back(tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, form: str, layout: str,
                               data: st.DataObject) -> None:
    options = LAYOUTS[layout] if form != "dense" and values.any() else {"version": LAYOUTS[layout]["version"]}
    path = write_zarr(tmp_path_factory.mktemp("m") / "a.zarr", FORMATS[form](sparse.csr_matrix(values)), **options)
    first = data.draw(st.integers(0, len(values)))
    last = data.draw(st.integers(first, len(values)))
    with open_source(path) as source:
        assert np.array_equal(source.read_rows(first, last).toarray(), values[first:last])
        assert len(source.value_offsets(first, last)) == last - first + 1


@pytest.mark.parametrize("version", [2, 3])
def test_obs_and_genes_are_those_of_the_h5ad(tmp_path: Path, counts: sparse.csr_matrix, version: int) -> None:
    parts = {"obs": OBS, "var": {"feature_name": [f"gene {i}" for i in range(40)]}}
    with open_source(write_h5ad(tmp_path / "a.h5ad", counts, **parts)) as one, \
            open_source(write_zarr(tmp_path / "a.zarr", counts, version=version, **parts)) as other:
        assert one.obs_columns() == other.obs_columns()
        for first, last in ((0, 60), (7, 12)):
            expected = {name: column.to_pylist() for name, column in one.obs(one.obs_columns(), first, last).items()}
            found = {name: column.to_pylist() for name, column in other.obs(other.obs_columns(), first, last).items()}
            assert found == expected
        assert one.gene_columns() == other.gene_columns() == ["index", "feature_name"]
        for column in one.gene_columns():
            assert one.gene_names(column) == other.gene_names(column)


def test_matrices_are_chosen_as_in_an_h5ad(tmp_path: Path, counts: sparse.csr_matrix) -> None:
    path = write_zarr(tmp_path / "a.zarr", counts.log1p(), raw=counts, layers={"spliced": counts})
    with open_source(path) as source:
        assert (source.layer, source.other_matrices()) == ("raw", ["X", "spliced"])
    with open_source(path, layer="X") as source:
        assert source.probe().max() < 10
    with pytest.raises(ConfigError, match="no layer 'splced'.*choose one of: X, raw, spliced"):
        open_source(path, layer="splced")


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_a_corpus_of_a_store_holds_the_cells_of_the_h5ad(tmp_path: Path, counts: sparse.csr_matrix, form: str) -> None:
    matrix = FORMATS[form](counts)
    obs = {"donor": pd.Categorical(["a", "b", "c"] * 20)}
    build_here(config_of(write_h5ad(tmp_path / "a.h5ad", matrix, obs=obs)), tmp_path / "one")
    build_here(config_of(write_zarr(tmp_path / "a.zarr", matrix, obs=obs)), tmp_path / "other")
    assert cells_of(tmp_path / "one") == cells_of(tmp_path / "other")
    shards = {name: content for name, content in bytes_of(tmp_path / "one").items() if "/" in name}
    assert shards == {name: content for name, content in bytes_of(tmp_path / "other").items() if "/" in name}


def remove(name: str) -> Callable[[Path], None]:
    def removed(path: Path) -> None:
        target = path / name
        assert target.exists()
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    return removed


def cut(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-7])


BAD = {
    "a chunk of values is gone": (remove("X/data/c/3"), "1 chunk of its values is missing"),
    "a chunk of indices is gone": (remove("X/indices/c/3"), "1 chunk of its indices is missing"),
    "the first boundaries are gone": (remove("X/indptr/c/0"), "1 chunk of its row boundaries is missing"),
    "later boundaries are gone": (remove("X/indptr/c/2"), "row boundaries that do not fit"),
    "the last boundaries are gone": (remove("X/indptr/c/3"), "values where the boundaries say 0"),
    "an array is gone": (remove("X/indices"), "unknown encoding"),
    "a shape is gone": (remove("X/data/zarr.json"), "cannot be read"),
    "a chunk is cut": (cut("X/data/c/1"), "cannot be read"),
    "a shape is cut": (cut("X/data/zarr.json"), "cannot be read"),
    "obs is gone": (remove("obs"), "Zarr, but not AnnData: it holds X"),
    "the root is gone": (remove("zarr.json"), "not a Zarr group"),
    "the root is no JSON": (lambda path: (path / "zarr.json").write_text("{"), "not a Zarr group"),
    "obs is short": (lambda path: zarr.open_array(path / "obs/number", mode="r+").resize((50,)),
                     "50 values for 60 cells"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_damaged_store_is_one_sentence_with_its_place(tmp_path: Path, fault: str) -> None:
    path = write_zarr(tmp_path / "poor.zarr", random_counts(1, 60, 40, 0.5), chunk=16, obs={"number": np.arange(60)})
    damage, message = BAD[fault]
    damage(path)
    with pytest.raises(SourceError, match=message) as caught, open_source(path, layer="X", kind="zarr") as source:
        source.obs(source.obs_columns())
        source.read_rows(0, source.n_cells)
    assert "poor.zarr" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("name", ["data", "indices"])
def test_any_missing_chunk_of_a_sparse_matrix_is_noticed(tmp_path: Path, form: str, name: str) -> None:
    matrix = FORMATS[form](random_counts(2, 60, 40, 0.5))
    path = write_zarr(tmp_path / "poor.zarr", matrix, chunk=64)
    for chunk in sorted((path / f"X/{name}/c").iterdir()):
        content = chunk.read_bytes()
        chunk.unlink()
        with pytest.raises(SourceError, match="chunks? of its"), open_source(path, layer="X") as source:
            source.read_rows(0, 60)
        chunk.write_bytes(content)


def test_zeros_that_somebody_has_stored_are_no_damage(tmp_path: Path) -> None:
    matrix = sparse.csr_matrix(np.eye(30, dtype=np.float32))
    matrix.data[::2] = 0
    with open_source(write_zarr(tmp_path / "a.zarr", matrix, chunk=7)) as source:
        assert np.array_equal(source.read_rows(0, 30).toarray(), matrix.toarray())


def test_what_is_no_store_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "b.zarr.zip").write_bytes(b"no zip")
    zarr.create_array(tmp_path / "c.zarr", shape=(3,), dtype="int32")
    zarr.create_group(tmp_path / "d.zarr")
    for name, message in (("a.zarr", "not a Zarr group"), ("b.zarr.zip", "not a Zarr group"),
                          ("c.zarr", "not a Zarr group"), ("d.zarr", "it holds nothing")):
        with pytest.raises(SourceError, match=message):
            open_source(tmp_path / name)


def test_a_matrix_in_one_vast_chunk_is_refused(tmp_path: Path, counts: sparse.csr_matrix,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anndata_files, "MAX_CHUNK_BYTES", 1000)
    with pytest.raises(SourceError, match="stored in chunks of .* write it again"):
        open_source(write_zarr(tmp_path / "a.zarr", counts))
    with open_source(write_zarr(tmp_path / "b.zarr", counts, chunk=64)) as source:
        assert source.chunk_bytes == 64 * (4 + 4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return {version: write_zarr(folder / f"{version}.zarr", random_counts(1, 30, 20), version=version, chunk=32)
            for version in (2, 3)}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 20), st.sampled_from([2, 3]))
def test_random_bytes_in_a_store_give_an_error_or_values(tmp_path_factory: pytest.TempPathFactory,
                                                         whole: dict[int, Path], seed: int, n_bytes: int,
                                                         version: int) -> None:
    path = tmp_path_factory.mktemp("g") / "a.zarr"
    shutil.copytree(whole[version], path)
    draw = np.random.default_rng(seed)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    for number in draw.integers(0, len(files), n_bytes):
        content = bytearray(files[number].read_bytes())
        content[draw.integers(len(content))] = draw.integers(256)
        files[number].write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # zarr warns of what it does not know
        try:
            with open_source(path, kind="zarr") as source:
                rows = source.read_rows(0, source.n_cells)
                source.gene_names()
                source.obs(source.obs_columns())
                assert rows.shape == (source.n_cells, source.n_genes)
        except ScgptError as error:
            assert str(path) in str(error)  # noqa: PT017 some damage does not show


@pytest.mark.skipif("SCGPT_SHARED" not in os.environ, reason="SCGPT_SHARED names no folder with the shared data")
@pytest.mark.parametrize("version", ["v0.7.0", "v0.7.8"])
def test_old_encodings_agree_with_the_h5ad_of_the_same_atlas(version: str) -> None:
    archives = Path(os.environ["SCGPT_SHARED"]) / "data" / "formats" / "anndata_archives"
    for layer in ("X", "raw"):
        with open_source(archives / f"{version}.zarr.zip", layer=layer) as one, \
                open_source(archives / f"{version}.h5ad", layer=layer) as other:
            assert np.array_equal(one.read_rows(0, 30).toarray(), other.read_rows(0, 30).toarray())
            assert one.gene_names() == other.gene_names()
            assert one.obs_columns() == other.obs_columns()
            for name in one.obs_columns():
                assert one.obs([name])[name].to_pylist() == other.obs([name])[name].to_pylist()
