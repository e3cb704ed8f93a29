import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from data_pipeline import plan
from data_pipeline.plan import make_plan
from data_pipeline.sources import open_source, soma
from scgpt.data import Manifest
from scgpt.errors import ConfigError, ScgptError, SourceError
from tests.data_pipeline.atlases import ROOT, build_here, cells_of, config_of, random_counts, write_h5ad
from tests.data_pipeline.sources.formats import gene_names
from tests.s3_server import bucket_named

tiledbsoma = pytest.importorskip("tiledbsoma", reason="the extra [census] is not installed")
pytest.importorskip("tiledbsoma.io")

COUNTS = random_counts(1, 60, 40)
TISSUES = ["blood", "lung", None] * 20


def write_soma(path: Path, counts: Any, *, layer: str = "raw", measurement: str = "RNA", nnz: bool = True,
               obs: dict[str, Sequence[Any]] | None = None) -> Path:
    """An experiment as the Census is laid out: obs by joinid, var with feature_id and feature_name, X/raw."""
    n_cells, n_genes = counts.shape
    about = {"n_value": np.arange(n_cells), **(obs or {})}
    if nnz:
        about["nnz"] = np.diff(sparse.csr_matrix(counts).indptr)
    atlas = anndata.AnnData(
        sparse.csr_matrix(counts, dtype=np.float32), obs=pd.DataFrame(about, index=[f"c{i}" for i in range(n_cells)]),
        var=pd.DataFrame({"feature_name": gene_names(n_genes)},
                         index=pd.Index([f"ENSG{i:011d}" for i in range(n_genes)], name="feature_id")))
    tiledbsoma.io.from_anndata(str(path), atlas, measurement, X_layer_name=layer)
    return path


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_soma(tmp_path_factory.mktemp("s") / "a.soma", COUNTS,
                      obs={"tissue": pd.Categorical(TISSUES), "is_primary_data": np.arange(60) % 2 == 0})


_CTRL_C_IGNORED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from data_pipeline.sources import open_source
with open_source(sys.argv[1]) as source:
    os.kill(os.getpid(), signal.SIGINT)
    print(source.n_cells)
"""


@pytest.mark.slow
def test_ctrl_c_that_is_ignored_ends_no_reading(experiment: Path) -> None:
    """As in a job that a script started with `&`."""
    done = subprocess.run([sys.executable, "-c", _CTRL_C_IGNORED, str(experiment)], check=False, capture_output=True,
                          text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "60\n"), done.stderr


def test_every_row_range_equals_the_matrix(experiment: Path) -> None:
    with open_source(experiment) as source:
        assert (source.kind, source.n_cells, source.n_genes, source.layer) == ("soma", 60, 40, "raw")
        assert (source.gene_columns(), source.gene_names()[1]) == (["index", "feature_id", "feature_name"],
                                                                  "ENSG00000000001")
        assert source.gene_names("feature_name") == gene_names(40)
        for first, last in ((0, 60), (0, 1), (59, 60), (17, 33), (5, 5)):
            assert np.array_equal(source.read_rows(first, last).toarray(), COUNTS[first:last].toarray())
            assert np.array_equal(np.diff(source.value_offsets(first, last)), np.diff(COUNTS.indptr)[first:last])
        assert source.n_values() == COUNTS.nnz


@settings(max_examples=8, deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 7)), elements=st.integers(0, 3).map(float)),
       st.booleans(), st.data())
def test_any_matrix_reads_back(tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, nnz: bool,
                               data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(values)))
    last = data.draw(st.integers(first, len(values)))
    with open_source(write_soma(tmp_path_factory.mktemp("s") / "a.soma", values, nnz=nnz)) as source:
        assert np.array_equal(source.read_rows(first, last).toarray(), values[first:last])
        assert len(source.value_offsets(first, last)) == last - first + 1


def test_obs_keeps_types_and_missing_values(experiment: Path) -> None:
    with open_source(experiment) as source:
        assert source.obs_columns() == ["obs_id", "n_value", "tissue", "is_primary_data", "nnz"]
        found = source.obs(["tissue", "n_value", "is_primary_data"], 1, 4)
        assert {name: column.to_pylist() for name, column in found.items()} == {
            "tissue": ["lung", None, "blood"], "n_value": [1, 2, 3], "is_primary_data": [False, True, False]}
        assert source.obs(["tissue"], 3, 3)["tissue"].to_pylist() == []


def test_rows_that_the_filter_leaves_out_are_not_read(experiment: Path) -> None:
    lung = np.array([tissue == "lung" for tissue in TISSUES])
    with open_source(experiment) as source:
        source.leave_out(lambda first, last: lung[first:last])
        expected = np.where(lung[:, None], COUNTS.toarray(), 0)
        assert np.array_equal(source.read_rows(3, 50).toarray(), expected[3:50])
        assert source.read_rows(2, 4).nnz == 0
        assert source.n_values() == np.count_nonzero(expected)


@pytest.mark.parametrize("block_values", [100, 1 << 22])
def test_a_build_has_the_cells_of_the_same_h5ad(tmp_path: Path, experiment: Path, block_values: int,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BLOCK_VALUES", block_values)
    monkeypatch.setattr(soma, "_SCAN_CELLS", 7)
    wish = {"cells": {"filter": 'tissue == "blood"'}, "columns": ["tissue"], "genes": {"min_gene_overlap": 0.1}}
    h5ad = write_h5ad(tmp_path / "a.h5ad", COUNTS, obs={"tissue": pd.Categorical(TISSUES)})
    expected = build_here(config_of(h5ad, **wish), tmp_path / "expected")
    found = build_here(config_of(experiment, **wish), tmp_path / "found")
    assert cells_of(tmp_path / "found") == cells_of(tmp_path / "expected")
    assert {row for _, row in cells_of(tmp_path / "found")} == set(range(0, 60, 3))   # joinids
    for manifest in (expected, found):
        assert (manifest.sources[0].cells_in, manifest.sources[0].filtered) == (60, {"filter": 40})
    assert Manifest.read(tmp_path / "found") == found


def test_a_plan_counts_what_the_filter_keeps(experiment: Path) -> None:
    config = config_of({"path": str(experiment), "filter": 'tissue == "blood"'}, genes={"min_gene_overlap": 0.1})
    assert make_plan(config).n_values == COUNTS[np.arange(0, 60, 3)].nnz


def test_layers_and_measurements_without_a_choice_are_named(tmp_path: Path) -> None:
    path = write_soma(tmp_path / "a.soma", COUNTS, layer="normalized")
    with open_source(path) as source:
        assert source.layer == "normalized"
    with pytest.raises(ConfigError, match="no layer 'raw'.*choose layer: normalized"):
        open_source(path, layer="raw")
    with tiledbsoma.open(str(path), "w") as experiment:
        tiledbsoma.io.add_X_layer(experiment, "RNA", "spliced", sparse.csr_matrix(COUNTS, dtype=np.float32))
    with pytest.raises(ConfigError, match="it has no layer 'raw'.*choose layer: normalized or spliced"):
        open_source(path)
    with open_source(path, layer="spliced") as source:
        assert source.other_matrices() == ["normalized"]
    with open_source(write_soma(tmp_path / "b.soma", COUNTS, measurement="ATAC")) as source:   # the only one
        assert source.n_genes == 40


def test_what_is_no_experiment_is_told(tmp_path: Path, experiment: Path) -> None:
    with pytest.raises(SourceError, match="not a SOMA experiment but a DataFrame"):
        open_source(experiment / "obs", kind="soma")
    with pytest.raises(SourceError, match="not a SOMA experiment but a Collection with RNA"):
        open_source(experiment / "ms", kind="soma")
    (tmp_path / "empty.soma").mkdir()
    with pytest.raises(SourceError, match="cannot be read"):
        open_source(tmp_path / "empty.soma")


def test_cells_that_were_removed_make_it_refused(tmp_path: Path) -> None:
    path = write_soma(tmp_path / "a.soma", COUNTS)
    with tiledbsoma.open(str(path / "obs"), "d") as obs:
        obs.delete_cells(([3],))
    with pytest.raises(SourceError, match="joinids"), open_source(path) as source:
        source.obs(["n_value"])


@pytest.mark.parametrize("array", ["obs", "ms/RNA/X/raw", "ms/RNA/var"])
def test_damaged_arrays_give_an_error_or_values(tmp_path: Path, array: str) -> None:
    for seed in range(6):
        path = write_soma(tmp_path / f"{seed}.soma", random_counts(1, 30, 20))
        draw = np.random.default_rng(seed)
        for file in sorted((path / array / "__fragments").rglob("*.tdb")):
            content = bytearray(file.read_bytes())
            for place in draw.integers(0, len(content), 3):
                content[place] = draw.integers(256)
            file.write_bytes(content)
        try:
            with open_source(path) as source:
                source.obs(source.obs_columns())
                assert source.read_rows(0, source.n_cells).shape == (30, 20)
        except ScgptError as error:
            assert str(path) in str(error)  # noqa: PT017 some damage does not show


@pytest.mark.slow
def test_an_experiment_on_s3_is_the_local_one(tmp_path: Path, experiment: Path) -> None:
    """In a process of its own: TileDB keeps Python's lock while it waits for the server, which is in this one."""
    import s3fs

    config = {"cells": {"filter": 'tissue == "blood"'}, "columns": ["tissue"], "genes": {"min_gene_overlap": 0.1}}
    build_here(config_of(experiment, **config), tmp_path / "expected")
    with bucket_named("census") as bucket:
        s3fs.S3FileSystem().put(str(experiment), f"{bucket}/{experiment.name}", recursive=True)
        program = ("import sys; from pathlib import Path; from tests.data_pipeline.atlases import *\n"
                   f"build_here(config_of('{bucket}/{experiment.name}', **{config!r}), Path(sys.argv[1]))")
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "found")], cwd=ROOT, text=True,
                              check=False, capture_output=True, timeout=200,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert cells_of(tmp_path / "found") == cells_of(tmp_path / "expected")
    source = Manifest.read(tmp_path / "found").sources[0]
    assert source.sha256 is None   # nothing but the cells was read
    assert source.etag is not None
