"""A source that is damaged, before the plan or after it, ends a build in one sentence and leaves no corpus."""
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from data_pipeline.build_dir import Record
from data_pipeline.plan import make_plan
from data_pipeline.sources import open_source
from scgpt.errors import ScgptError, SourceError
from tests.data_pipeline import atlases
from tests.data_pipeline.atlases import Here, build_here, bytes_of, config_of, write_h5ad, write_zarr

KINDS = {"h5ad": write_h5ad, "zarr": write_zarr}
Change = Callable[[Path], object]


class Meddled(Here):
    """Somebody changes the source once the plan is made."""

    def __init__(self, change: Callable[[], object]) -> None:
        super().__init__()
        self.change = change

    def run(self, *arguments: object, **options: object) -> list[Record]:
        if not self.calls:
            self.change()
        return super().run(*arguments, **options)


def file_of(path: Path, name: str) -> Path:
    return path / name if path.is_dir() else path


def garble(path: Path) -> None:
    """Overwrite the middle of the values, sizes kept."""
    target = file_of(path, "X/data/c/1")
    content = bytearray(target.read_bytes())
    if path.is_dir():
        first, size = len(content) // 2, 40
    else:
        with h5py.File(path) as file:
            chunk = file["X/data"].id.get_chunk_info(file["X/data"].id.get_num_chunks() // 2)
        first, size = chunk.byte_offset, chunk.size
    content[first:first + size] = b"x" * size
    target.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(file_of(path, "X/indices/c/1"), file_of(path, "X/indices/c/1").stat().st_size // 2)


def vanish(path: Path) -> None:
    file_of(path, "X/indices/c/2").unlink()


def grow(path: Path) -> None:
    with file_of(path, "obs/notes").open("ab") as stream:
        stream.write(b"x")


def atlas(folder: Path, kind: str) -> Path:
    matrix = atlases.random_counts(1, 300, 60, 0.4)
    if kind == "zarr":
        return write_zarr(folder / "poor.zarr", matrix, chunk=2000)
    path = write_h5ad(folder / "poor.h5ad", matrix)
    with h5py.File(path, "r+") as file:
        for name in ("data", "indices"):
            values = file["X"][name][:]
            del file["X"][name]
            file["X"].create_dataset(name, data=values, chunks=(2000,), compression="gzip")
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [garble, cut, vanish, grow])
def test_a_source_changed_after_the_plan_is_no_corpus(tmp_path: Path, kind: str, change: Change) -> None:
    path = atlas(tmp_path, kind)
    with pytest.raises(SourceError, match="changed while the corpus was being built.*poor") as caught:
        build_here(config_of(path), tmp_path / "out", workers=Meddled(lambda: change(path)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_build_goes_on_once_the_source_is_whole_again(tmp_path: Path, kind: str) -> None:
    path = atlas(tmp_path, kind)
    shutil.copytree(path, tmp_path / "kept") if path.is_dir() else shutil.copy(path, tmp_path / "kept")
    build_here(config_of(path), tmp_path / "whole")
    with pytest.raises(SourceError):
        build_here(config_of(path), tmp_path / "out", workers=Meddled(lambda: cut(path)))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.move(tmp_path / "kept", path)
    build_here(config_of(path), tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [garble, cut, vanish])
def test_a_source_damaged_in_the_middle_is_no_corpus(tmp_path: Path, kind: str, change: Change,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan looks at the first rows only: what is further on is found by whoever reads it."""
    monkeypatch.setattr("data_pipeline.sources.base.PROBE_VALUES", 100)
    path = atlas(tmp_path, kind)
    change(path)
    with pytest.raises(ScgptError, match=r"poor") as caught:
        build_here(config_of(path), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert caught.value.fix
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_every_kind_are_read(tmp_path: Path, kind: str) -> None:
    import anndata

    matrix = sparse.csr_matrix(np.ones((4, 3), np.float32))
    obs = {"plain": ["a", "", "ü", "d"], "category": pd.Categorical(["x", None, "y", "x"]),
           "ordered": pd.Categorical(["x", "z", "y", "x"], ordered=True, categories=["z", "y", "x"]),
           "nullable": pd.array(["p", None, "q", "r"], dtype="string")}
    with anndata.settings.override(allow_write_nullable_strings=True):
        path = KINDS[kind](tmp_path / f"a.{kind}", matrix, obs=obs)
    if kind == "h5ad":
        with h5py.File(path, "r+") as file:
            file["obs"]["fixed"] = np.array([b"1", b"22", b"", b"4444"])
            file["obs"]["latin"] = np.array([b"caf\xe9", b"b", b"c", b"d"])
            file["obs"].create_dataset("ascii", data=["1", "2", "3", "4"], dtype=h5py.string_dtype("ascii", 2))
    with open_source(path) as source:
        found = {name: column.to_pylist() for name, column in source.obs(source.obs_columns()).items()}
    assert found.pop("fixed", ["1", "22", "", "4444"]) == ["1", "22", "", "4444"]
    assert found.pop("latin", ["caf\ufffd", "b", "c", "d"]) == ["caf\ufffd", "b", "c", "d"]
    assert found.pop("ascii", ["1", "2", "3", "4"]) == ["1", "2", "3", "4"]
    assert found == {"plain": ["a", "", "ü", "d"], "category": ["x", None, "y", "x"],
                     "ordered": ["x", "z", "y", "x"], "nullable": ["p", None, "q", "r"]}


@pytest.mark.skipif("SCGPT_SHARED" not in os.environ, reason="SCGPT_SHARED names no folder with the shared data")
@pytest.mark.parametrize(("file", "message"), [
    ("anndata_archives/v0.5.0.h5ad", "negative values such as"), ("anndata_archives/v0.7.0.h5ad", "of 20 genes"),
    ("anndata_archives/v0.7.8.zarr.zip", "of 20 genes"), ("odd_h5ad/cxg_example_valid.h5ad", None),
    ("odd_h5ad/scp_dup_cell.h5ad", "0 of 4 genes"), ("odd_h5ad/scp_dup_feature.h5ad", "0 of 5 genes"),
    ("odd_h5ad/scp_nan_value.h5ad", "0 of 4 genes"), ("odd_h5ad/scp_indexed_by_gene_id.h5ad", "these are mouse genes")])
def test_odd_files_are_read_or_refused_with_the_cause(file: str, message: str | None) -> None:
    config = config_of(Path(os.environ["SCGPT_SHARED"]) / "data" / "formats" / file)
    if message is None:
        assert make_plan(config).sources[0].layer == "raw"
        return
    with pytest.raises(SourceError, match=message):
        make_plan(config)
