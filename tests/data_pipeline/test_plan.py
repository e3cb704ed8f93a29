import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import plan as planning
from data_pipeline.config import CorpusConfig
from data_pipeline.plan import check_unchanged, expand, make_plan, unchanged
from scgpt.config import load_config
from scgpt.errors import ConfigError, ScgptError, SourceError
from tests.data_pipeline.atlases import BLOOD, CHR21, PANCREAS, config_of, random_counts, write_h5ad


def test_the_demo_plan_covers_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BLOCK_VALUES", 100_000)
    plan = make_plan(load_config(CorpusConfig, "demo", kind="corpus"))
    assert [source.name for source in plan.sources] == ["pancreas-baron2016", "blood-pbmc68k", "blood-pbmc10k-chr21"]
    assert len(plan.blocks) > 10
    before = 0
    for place, source in enumerate(plan.sources):
        blocks = [block for block in plan.blocks if block.source == place]
        assert [block.first for block in blocks] == [0, *(block.last for block in blocks[:-1])]
        assert blocks[-1].last == source.n_cells
        assert all(0 < block.values <= 100_000 for block in blocks)
    for block in plan.blocks:
        assert block.values_before == before
        before += block.values
    assert before == plan.n_values
    assert sum(split.cells for split in plan.splits.values()) == plan.n_cells == 3176


def test_one_cell_larger_than_a_block_is_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BLOCK_VALUES", 10)
    plan = make_plan(config_of(BLOOD))
    assert [block.last - block.first for block in plan.blocks] == [1] * 700


def test_the_filters_on_obs_are_planned_with() -> None:
    plan = make_plan(config_of({"path": str(BLOOD), "filter": 'phase == "G1"'}))
    assert 0 < sum(split.cells for split in plan.splits.values()) < plan.n_cells == 700


@pytest.mark.parametrize("setting", [
    {"seed": 1}, {"cells": {"min_genes": 11}}, {"splits": {"valid": 0.1}}, {"splits": {"seed": 1}},
    {"shards": {"max_bytes": "1MiB"}}, {"shards": {"shuffle": False}}, {"columns": ["donor"]},
    {"genes": {"min_gene_overlap": 0.2}}])
def test_every_setting_is_under_the_hash(setting: dict[str, object]) -> None:
    assert make_plan(config_of(BLOOD)).sha256 != make_plan(config_of(BLOOD, **setting)).sha256


def test_the_hash_is_the_content_s_not_the_folder_s(tmp_path: Path) -> None:
    shutil.copy(BLOOD, tmp_path / BLOOD.name)
    here, there = make_plan(config_of(BLOOD)), make_plan(config_of(tmp_path / BLOOD.name))
    assert here.sha256 == there.sha256
    with (tmp_path / BLOOD.name).open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last[0] ^ 1]))
    try:
        assert make_plan(config_of(tmp_path / BLOOD.name)).sha256 != here.sha256
    except SourceError as error:   # the byte mattered to HDF5
        assert "cannot be read" in str(error)  # noqa: PT017


def test_a_glob_gives_each_file_its_stem(tmp_path: Path) -> None:
    for name in ("b", "a"):
        shutil.copy(BLOOD, tmp_path / f"{name}.h5ad")
    plan = make_plan(config_of(tmp_path / "*.h5ad"))
    assert [source.name for source in plan.sources] == ["a", "b"]


@pytest.mark.parametrize(("pattern", "names"), [
    ("runs/*/outs/counts.h5", ["s1", "s2"]), ("runs/s1/outs/counts.h5", ["counts"]),
    ("runs/*/outs/*.h5", ["counts"] * 2),
    ("r*s/s[12]/outs/counts.h5", ["runs-s1", "runs-s2"]), ("**/counts.h5", ["runs-s1-outs", "runs-s2-outs"])])
def test_files_of_one_name_are_called_by_the_folders_that_a_glob_leaves_open(tmp_path: Path, pattern: str,
                                                                             names: list[str]) -> None:
    for name in ("s1", "s2"):
        (tmp_path / "runs" / name / "outs").mkdir(parents=True)
        (tmp_path / "runs" / name / "outs" / "counts.h5").touch()
    found = expand(config_of(tmp_path / pattern).sources)
    assert [config.name or location.stem for location, config in found] == names


def test_two_sources_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two sources are named 'blood-pbmc68k'"):
        make_plan(config_of(BLOOD, BLOOD))
    with pytest.raises(ConfigError, match="the name 'x' is given to 2 files"):
        make_plan(config_of({"path": str(BLOOD.parent / "blood*.h5ad"), "name": "x"}))
    assert [source.name for source in make_plan(config_of(BLOOD, {"path": str(BLOOD), "name": "x"})).sources][1] == "x"


@pytest.mark.parametrize("odd", ["\n", "\x1b", "\u2028", "\ud800"])
def test_a_name_that_would_tear_a_line_is_refused(tmp_path: Path, odd: str) -> None:
    with pytest.raises(ConfigError, match="the name 'a.*b' holds the control character") as caught:
        make_plan(config_of({"path": str(BLOOD), "name": f"a{odd}b"}))
    assert odd not in str(caught.value)


def test_a_file_whose_name_would_tear_a_line_needs_another(tmp_path: Path) -> None:
    torn = tmp_path / "a\nb.h5ad"
    shutil.copy(BLOOD, torn)
    with pytest.raises(ConfigError, match=r"^the name 'a\\nb' holds .*a\\nb.h5ad\); give the source a `name`"):
        make_plan(config_of(torn))
    assert [source.name for source in make_plan(config_of({"path": str(torn), "name": "whole"})).sources] == ["whole"]


def test_shards_are_planned_to_stay_below_their_size() -> None:
    plan = make_plan(config_of(PANCREAS, shards={"max_bytes": "1MiB"}, splits={"valid": 0.0}))
    split = plan.splits["train"]
    assert split.values * 6 / split.n_shards < 1 << 20
    assert plan.splits["valid"].cells == 0


def test_a_corpus_split_by_a_column_that_no_source_has_is_refused(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(0, 10, 30))
    with pytest.raises(ConfigError, match="splits.by is 'donor', which is a column of no source"):
        make_plan(config_of(path, splits={"by": "donor"}))


def test_a_source_that_changes_after_the_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    shutil.copy(BLOOD, path)
    source = make_plan(config_of(path)).sources[0]
    check_unchanged(source)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(SourceError, match="changed while the corpus was being built"):
        check_unchanged(source)
    path.unlink()
    with pytest.raises(SourceError, match="changed"):
        check_unchanged(source)


def test_an_error_that_came_of_a_change_is_told_as_the_change(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    shutil.copy(BLOOD, path)
    source = make_plan(config_of(path)).sources[0]
    with pytest.raises(ValueError, match="as it is"), unchanged(source):
        raise ValueError("as it is")
    with pytest.raises(SourceError, match="changed while the corpus was being built"), unchanged(source):
        os.truncate(path, 100)
        source.open()


def bad_atlas(kind: str, folder: Path) -> Path:
    counts = random_counts(0, 30, 40)
    path = folder / "poor.h5ad"
    if kind == "missing":
        return path
    if kind == "not HDF5":
        path.write_text("a,b\n1,2\n")
    elif kind == "not AnnData":
        import h5py

        with h5py.File(path, "w") as file:
            file["matrix/barcodes"] = np.arange(3)
    elif kind == "mouse":
        write_h5ad(path, counts[:, :5], ["Lypla1", "Tcea1", "Atp6v1h", "Rgs20", "Rb1cc1"])
    elif kind == "log-normalised":
        write_h5ad(path, counts.log1p())
    elif kind == "negative":
        counts.data[3] = -1
        write_h5ad(path, counts)
    elif kind == "NaN":
        counts.data[3] = np.nan
        write_h5ad(path, counts)
    elif kind == "no cells":
        write_h5ad(path, counts[:0])
    return path


@pytest.mark.parametrize(("kind", "message"), [
    ("missing", "there is no such file"), ("not HDF5", "not an HDF5 file"), ("not AnnData", "it holds matrix"),
    ("mouse", "these are mouse genes"), ("log-normalised", "log-normalised values"), ("negative", "negative values"),
    ("NaN", "NaN"), ("no cells", "hold no cells")])
def test_bad_input_is_one_sentence_before_any_work(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(ScgptError, match=message) as caught:
        make_plan(config_of(bad_atlas(kind, tmp_path)))
    assert "poor" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def test_other_kinds_of_values_are_read_when_they_are_named(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(0, 30, 40).log1p())
    plan = make_plan(config_of(path, cells={"expression_kind": "log1p"}))
    assert plan.sources[0].layer == "X"


def test_ensembl_ids_and_symbols_of_the_demo_are_both_used() -> None:
    plan = make_plan(load_config(CorpusConfig, "demo", kind="corpus"))
    assert {source.genes.style for source in plan.sources} == {"symbol", "ensembl"}
    assert next(source for source in plan.sources if source.path.name == CHR21.name).genes.column == "index"
