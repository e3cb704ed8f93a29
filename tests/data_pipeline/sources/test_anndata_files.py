import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from data_pipeline.sources import anndata_files, open_source
from data_pipeline.sources.base import are_counts
from scgpt.errors import ConfigError, SourceError
from tests.data_pipeline.atlases import (
    BLOOD,
    CHR21,
    PANCREAS,
    build_here,
    config_of,
    random_counts,
    spoil,
    write_h5ad,
)

FORMATS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda matrix: matrix.toarray()}


@pytest.fixture(scope="module")
def counts() -> sparse.csr_matrix:
    return random_counts(1, 60, 40)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("scan_values", [7, 1 << 22])
def test_every_row_range_equals_the_matrix(tmp_path: Path, counts: sparse.csr_matrix, form: str, scan_values: int,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anndata_files, "SCAN_VALUES", scan_values)
    with open_source(write_h5ad(tmp_path / "a.h5ad", FORMATS[form](counts))) as source:
        assert (source.format, source.n_cells, source.n_genes) == (form, 60, 40)
        for first, last in ((0, 60), (0, 1), (59, 60), (17, 33), (5, 5)):
            assert np.array_equal(source.read_rows(first, last).toarray(), counts[first:last].toarray())


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 9)), elements=st.integers(0, 3).map(float)),
       st.sampled_from(sorted(FORMATS)), st.data())
def test_any_matrix_reads_back(tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, form: str,
                               data: st.DataObject) -> None:
    path = write_h5ad(tmp_path_factory.mktemp("m") / "a.h5ad", FORMATS[form](sparse.csr_matrix(values)))
    first = data.draw(st.integers(0, len(values)))
    last = data.draw(st.integers(first, len(values)))
    with open_source(path) as source:
        assert np.array_equal(source.read_rows(first, last).toarray(), values[first:last])
        assert len(source.value_offsets(first, last)) == last - first + 1


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16, np.float64])
def test_any_number_type_is_read(tmp_path: Path, counts: sparse.csr_matrix, kind: type) -> None:
    with open_source(write_h5ad(tmp_path / "a.h5ad", counts.astype(kind))) as source:
        assert np.array_equal(source.read_rows(3, 9).toarray(), counts[3:9].toarray())


@pytest.mark.parametrize("options", [{"compression": "lzf"}, dict(hdf5plugin.Zstd()), dict(hdf5plugin.Blosc())],
                         ids=["lzf", "zstd", "blosc"])
def test_other_filters_are_read(tmp_path: Path, counts: sparse.csr_matrix, options: dict[str, object]) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", counts)
    with h5py.File(path, "r+") as file:
        values = file["X/data"][:]
        del file["X/data"]
        file["X"].create_dataset("data", data=values, chunks=(50,), **options)
    with open_source(path) as source:
        assert np.array_equal(source.read_rows(0, 60).toarray(), counts.toarray())


def test_auto_takes_raw_where_only_raw_holds_counts(tmp_path: Path, counts: sparse.csr_matrix) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", counts.log1p(), raw=counts)
    with open_source(path) as source:
        assert source.layer == "raw"
        assert np.array_equal(source.read_rows(0, 5).toarray(), counts[:5].toarray())
    with open_source(path, layer="X") as source:
        assert (source.layer, source.other_matrices()) == ("X", ["raw"])


def test_infinite_values_are_no_counts(tmp_path: Path, counts: sparse.csr_matrix) -> None:
    assert not are_counts(np.array([1.0, np.inf]))
    infinite = counts.astype(np.float32)
    infinite.data[0] = np.inf
    with open_source(write_h5ad(tmp_path / "a.h5ad", infinite, raw=counts)) as source:
        assert source.layer == "raw"


def test_auto_prefers_x_and_never_takes_a_layer(tmp_path: Path, counts: sparse.csr_matrix) -> None:
    spliced = counts.multiply(2).tocsr()
    both = write_h5ad(tmp_path / "a.h5ad", counts, raw=spliced, layers={"spliced": spliced})
    logs = write_h5ad(tmp_path / "b.h5ad", counts.log1p(), layers={"spliced": spliced})
    for path in (both, logs):
        with open_source(path) as source:
            assert source.layer == "X"
    with open_source(logs, layer="spliced") as source:
        assert np.array_equal(source.read_rows(0, 5).toarray(), spliced[:5].toarray())
    with pytest.raises(ConfigError, match="no layer 'splced'.*choose one of: X, spliced"):
        open_source(logs, layer="splced")


def test_cut_row_blocks_equal_the_rows(tmp_path: Path, counts: sparse.csr_matrix,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anndata_files, "SCAN_VALUES", 33)
    with open_source(write_h5ad(tmp_path / "a.h5ad", sparse.csc_matrix(counts))) as source:
        assert source.by_columns
        bounds = [0, 1, 20, 21, 60]
        paths = source.cut_row_blocks(bounds[:-1], tmp_path / "cut")
        assert len(paths) == 4
        source.use_row_blocks(tmp_path / "cut")
        for first, last in pairwise(bounds):
            assert np.array_equal(source.read_rows(first, last).toarray(), counts[first:last].toarray())


def test_obs_keeps_types_and_missing_values(tmp_path: Path, counts: sparse.csr_matrix) -> None:
    import pandas as pd

    words = ["a", None, "b"] * 20
    path = write_h5ad(tmp_path / "a.h5ad", counts, obs={
        "word": pd.Categorical(words), "number": np.arange(60), "share": [0.5, np.nan, 1.5] * 20,
        "flag": np.arange(60) % 2 == 0, "maybe": pd.array([1, None, 3] * 20, dtype="Int64"),
        "maybe_flag": pd.array([True, None, False] * 20, dtype="boolean"),
        "level": pd.Categorical(np.arange(60) % 3)})
    with open_source(path) as source:
        assert set(source.obs_columns()) == {"word", "number", "share", "flag", "maybe", "maybe_flag", "level"}
        found = {name: column.to_pylist() for name, column in source.obs(source.obs_columns(), 1, 4).items()}
    assert found == {"word": [None, "b", "a"], "number": [1, 2, 3], "share": [None, 1.5, 0.5],
                     "flag": [False, True, False], "maybe": [None, 3, 1], "maybe_flag": [None, False, True],
                     "level": [1, 2, 0]}


@pytest.mark.parametrize(("path", "n_cells", "n_genes"),
                         [(PANCREAS, 1369, 20_125), (BLOOD, 700, 765), (CHR21, 1107, 507)])
def test_the_real_atlases_open(path: Path, n_cells: int, n_genes: int) -> None:
    with open_source(path) as source:
        assert (source.n_cells, source.n_genes, source.layer) == (n_cells, n_genes, "X")
        assert len(source.gene_names()) == n_genes
        assert (source.probe() > 0).all()


BAD = {
    "shape": (lambda path: _set_shape(path, [60, 41]), "41 .*40 in var"),
    "boundaries": (lambda path: spoil(path, "X/indptr", lambda p: np.where(np.arange(61) == 30, 10**9, p)),
                   "boundaries"),
    "columns": (lambda path: spoil(path, "X/indices", lambda i: i + 30), "column index outside the 40"),
    "short data": (lambda path: spoil(path, "X/data", lambda d: d[:-5]), "values, .* indices"),
    "short indptr": (lambda path: spoil(path, "X/indptr", lambda p: p[:-1]), "boundaries"),
    "no data": (lambda path: _delete(path, "X/data"), "unknown encoding"),
    "short obs": (lambda path: spoil(path, "obs/number", lambda n: n[:-5]), "55 values for 60 cells"),
    "category": (lambda path: spoil(path, "obs/word/codes", lambda c: c + 5), "category code"),
    "codes": (lambda path: spoil(path, "obs/word/codes", lambda c: c + 0.5), "category codes of the type float"),
    "no column": (lambda path: _delete(path, "obs/number"), "'number' is named among the columns, but missing"),
    "one number": (lambda path: spoil(path, "X/data", lambda d: d[0]), "'data' is no list of numbers"),
    "no var": (lambda path: _delete(path, "var"), "not AnnData"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-3000]), "damaged HDF5|cannot be read"),
    "not HDF5": (lambda path: path.write_text("hello"), "not an HDF5 file"),
    "garbled chunk": (lambda path: _garble(path, "X/data"), "cannot be read"),
}


def _set_shape(path: Path, shape: list[int]) -> None:
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = shape


def _delete(path: Path, key: str) -> None:
    with h5py.File(path, "r+") as file:
        del file[key]


def _garble(path: Path, key: str) -> None:
    with h5py.File(path) as file:
        chunk = file[key].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset:chunk.byte_offset + chunk.size] = b"x" * chunk.size
    path.write_bytes(content)


@pytest.mark.parametrize("fault", BAD)
def test_a_damaged_file_is_one_sentence_with_its_place(tmp_path: Path, counts: sparse.csr_matrix, fault: str) -> None:
    import pandas as pd

    path = write_h5ad(tmp_path / "poor.h5ad", counts,
                      obs={"number": np.arange(60), "word": pd.Categorical(["a", "b"] * 30)})
    damage, message = BAD[fault]
    damage(path)
    with pytest.raises(SourceError, match=message) as caught, open_source(path, layer="X") as source:
        source.obs(source.obs_columns())
        source.read_rows(0, source.n_cells)
    assert "poor.h5ad" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_column_that_is_named_but_missing_is_told_where_it_is_wanted(tmp_path: Path,
                                                                       counts: sparse.csr_matrix) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", counts, obs={"tissue": ["lung"] * 60}, var={"symbol": ["x"] * 40})
    for key in ("obs/tissue", "var/symbol"):
        _delete(path, key)
    with open_source(path) as source:
        assert source.gene_columns() == ["index"]
    with pytest.raises(SourceError, match="'tissue' is named among the columns, but missing.*obs, tissue"):
        build_here(config_of(path), tmp_path / "out")
    assert build_here(config_of(path, columns=["donor"]), tmp_path / "other").sources[0].cells_in == 60


def test_missing_and_foreign_files_are_told() -> None:
    with pytest.raises(SourceError, match="no such file"):
        open_source("/nowhere/a.h5ad")
    with pytest.raises(SourceError, match="suffix '.py'"):
        open_source(__file__)


def test_a_file_without_any_matrix_is_told(tmp_path: Path, counts: sparse.csr_matrix) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", counts)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.require_group("layers")
    with pytest.raises(SourceError, match="it holds no matrix: no X, raw or layer"):
        open_source(path)


@pytest.mark.skipif("SCGPT_SHARED" not in os.environ, reason="SCGPT_SHARED names no folder with the shared data")
@pytest.mark.parametrize(("file", "cells", "genes", "first"), [
    ("anndata_archives/v0.5.0.h5ad", 700, 765, "HES4"), ("anndata_archives/v0.7.0.h5ad", 30, 20, "gene0"),
    ("anndata_archives/v0.7.8.h5ad", 30, 20, "gene0"), ("odd_h5ad/cxg_example_valid.h5ad", 2, 7, "ENSG00000127603")])
def test_old_encodings_agree_with_anndata(file: str, cells: int, genes: int, first: str) -> None:
    path = Path(os.environ["SCGPT_SHARED"]) / "data" / "formats" / file
    with open_source(path, layer="raw") as source:
        matrix = source.read_rows(0, source.n_cells)
    with open_source(path, layer="X") as source:
        assert (source.n_cells, source.n_genes, source.gene_names()[0]) == (cells, genes, first)
        for column in source.obs(source.obs_columns()).values():
            assert len(column) == cells
    if "v0.7" in file:
        import anndata

        with pytest.warns(anndata.OldFormatWarning):
            atlas = anndata.read_h5ad(path)
        assert np.array_equal(matrix.toarray(), atlas.raw.X.toarray())


@pytest.mark.parametrize(("key", "change", "message"), [
    ("data", lambda values: values.astype(np.complex64), "numbers of the type complex64"),
    ("data", lambda values: values.astype("S9"), "numbers of the type"),
    ("indices", lambda values: values.astype(float), "numbers of the type float64"),
    ("indptr", lambda values: values.astype(float), "numbers of the type float64"),
    ("indptr", lambda values: np.concatenate([[3], values[1:]]), "boundaries that begin at 3"),
    ("data", lambda values: values[:, None], "'data' is no list of numbers")])
def test_arrays_that_are_no_sparse_matrix_are_refused(tmp_path: Path, counts: sparse.csr_matrix, key: str, change: Any,
                                                      message: str) -> None:
    path = spoil(write_h5ad(tmp_path / "a.h5ad", counts), f"X/{key}", change)
    with pytest.raises(SourceError, match=message), open_source(path, layer="X") as source:
        source.read_rows(0, 60)


def test_a_dense_matrix_of_text_is_refused(tmp_path: Path, counts: sparse.csr_matrix) -> None:
    path = spoil(write_h5ad(tmp_path / "a.h5ad", counts.toarray()), "X", lambda values: values.astype("S9"))
    with pytest.raises(SourceError, match="numbers of the type"):
        open_source(path)
