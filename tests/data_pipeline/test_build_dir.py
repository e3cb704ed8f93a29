import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from data_pipeline.build_dir import BUILD, LOCK, BuildDir, claim, finished
from data_pipeline.execute import build
from data_pipeline.plan import Plan, make_plan
from data_pipeline.report import write_report
from data_pipeline.sources import Location
from data_pipeline.sources.identity import state_of
from scgpt.errors import ConfigError, DataError
from tests.data_pipeline.atlases import BLOOD, build_here, bytes_of, config_of, random_counts, write_zarr


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(config_of(BLOOD))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_record_counts_only_with_whole_files_of_the_same_plan(tmp_path: Path, plan: Plan) -> None:
    with claim(tmp_path / "out", plan, fresh=False) as build:
        made = build.runs / "block.arrow"
        made.write_bytes(b"cells")
        assert build.read_record("block") is None
        build.write_record("block", {"cells": 3}, [made])
        assert build.read_record("block") == {"cells": 3}
        assert BuildDir(build.out, "another plan").read_record("block") is None
        for content in (b"cellS", b"cell", b"cells!"):
            made.write_bytes(content)
            assert build.read_record("block") is None
        made.unlink()
        assert build.read_record("block") is None
        made.write_bytes(b"cells")
        record = build.path / "records" / "block.json"
        record.write_bytes(record.read_bytes()[:-20])
        assert build.read_record("block") is None


def test_finished_work_is_kept_for_the_same_plan_and_refused_to_another(tmp_path: Path, plan: Plan) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), claim(out, plan, fresh=False) as build:
        build.write_record("block", {"cells": 3}, [])
        (build.runs / ".tmp-host-1-abc-block.arrow").write_bytes(b"half")
        raise KeyboardInterrupt
    other = make_plan(config_of(BLOOD, seed=1))
    with pytest.raises(ConfigError, match="unfinished build of another plan.*--fresh"), claim(out, other, fresh=False):
        pass
    with claim(out, plan, fresh=False) as build:
        assert build.read_record("block") == {"cells": 3}
        assert not list(build.runs.iterdir())
    with claim(out, other, fresh=True) as build:
        assert not list((build.path / "records").iterdir())


def test_nothing_is_left_when_nothing_was_finished(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "out", plan, fresh=False):
        raise ZeroDivisionError
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "empty", plan, fresh=False):
        raise ZeroDivisionError
    assert names(tmp_path / "empty") <= {LOCK}


@pytest.mark.parametrize("fresh", [False, True])
def test_what_no_build_has_made_is_never_touched(tmp_path: Path, plan: Plan, fresh: bool) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(ConfigError, match="holds something else: thesis.txt"), claim(tmp_path, plan, fresh=fresh):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years"
    assert names(tmp_path) == {"thesis.txt"}


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_named_as_ours_without_a_corpus_is_something_else(tmp_path: Path, plan: Plan, fresh: bool) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "picture.png").write_text("")
    with pytest.raises(ConfigError, match="holds something else: train"), claim(tmp_path, plan, fresh=fresh):
        pass
    assert names(tmp_path) == {"train"}
    assert names(tmp_path / "train") == {"picture.png"}


def test_a_second_build_is_refused_while_the_first_lives(tmp_path: Path, plan: Plan) -> None:
    with claim(tmp_path, plan, fresh=False) as build:
        build.write_record("block", {}, [])
        with pytest.raises(DataError, match="another build is already at work here"), claim(tmp_path, plan, fresh=True):
            pass
        assert build.read_record("block") == {}


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="the directory cannot be used"), claim(tmp_path / "file", plan, fresh=False):
        pass
    with pytest.raises(ConfigError, match="the directory cannot be used"), claim(Path("/proc/x"), plan, fresh=False):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a read-only disk")
def test_a_complete_corpus_on_a_read_only_disk_is_found_complete(tmp_path: Path, plan: Plan) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(disk)], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        build_here(config_of(BLOOD), disk / "out")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        again = build(config_of(BLOOD), disk / "out")
        assert (again.workers, again.manifest.plan_sha256) == ("", plan.sha256)
        with pytest.raises(ConfigError, match="cannot be used: Read-only file system"):
            build(config_of(BLOOD), disk / "out", fresh=True)
        with pytest.raises(ConfigError, match="a corpus of another plan"):
            build(config_of(BLOOD, seed=1), disk / "out")
        with pytest.raises(ConfigError, match="cannot be used: Read-only file system"):
            build(config_of(BLOOD), disk / "other")
        with pytest.raises(ConfigError, match=r"cannot be written there \(.*out\).*--out FILE.html in a folder"):
            write_report(disk / "out")
        assert write_report(disk / "out", tmp_path / "page.html")[0].exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_complete_corpus_is_left_alone_and_refused_to_another_plan(tmp_path: Path, plan: Plan) -> None:
    build_here(config_of(BLOOD), tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    with claim(tmp_path / "out", plan, fresh=False) as build:
        assert finished(build)
    other = make_plan(config_of(BLOOD, seed=1))
    with pytest.raises(ConfigError, match="a corpus of another plan"), claim(tmp_path / "out", other, fresh=False):
        pass
    assert bytes_of(tmp_path / "out") == before


def test_a_damaged_corpus_can_only_be_replaced_with_fresh(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_here(config_of(BLOOD), out)
    before = bytes_of(out)
    (out / "manifest.json").write_bytes(before["manifest.json"].replace(b"train", b"trein", 1))
    with pytest.raises(DataError, match="was changed after it was written.*--fresh"):
        build_here(config_of(BLOOD), out)
    build_here(config_of(BLOOD), out, fresh=True)
    assert bytes_of(out) == before


@pytest.mark.parametrize("moved", [("train",), ("train", "valid", "vocab.json", "run.json")])
def test_a_commit_that_was_cut_off_is_taken_back_and_done_again(tmp_path: Path, plan: Plan,
                                                                moved: tuple[str, ...]) -> None:
    """The files of a commit lie in their place but the manifest does not: there is no corpus yet."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    build_here(config_of(BLOOD), whole)
    with pytest.raises(KeyboardInterrupt), claim(out, plan, fresh=False) as build:
        build.write_record("x", {}, [])
        for name in moved:
            if (whole / name).is_dir():
                shutil.rmtree(build.path / name)
                shutil.copytree(whole / name, out / name)
            else:
                shutil.copy(whole / name, out / name)
        raise KeyboardInterrupt
    with claim(out, plan, fresh=False) as build:
        assert names(out) - {"vocab.json", "run.json"} == {LOCK, BUILD}
        assert names(build.shards("train")) == names(whole / "train")
    build_here(config_of(BLOOD), out)
    assert bytes_of(out) == bytes_of(whole)


def test_a_touched_source_makes_the_work_start_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    shutil.copy(BLOOD, path)
    with pytest.raises(KeyboardInterrupt), claim(tmp_path / "out", make_plan(config_of(path)), fresh=False) as build:
        build.write_record("block", {}, [])
        raise KeyboardInterrupt
    os.utime(path, ns=(0, 0))
    with claim(tmp_path / "out", make_plan(config_of(path)), fresh=False) as build:
        assert build.read_record("block") is None
        assert json.loads((build.path / "plan.json").read_bytes())["states"] == [state_of(Location.of(path))]


@pytest.mark.parametrize("fresh", [False, True])
def test_what_another_program_calls_a_manifest_makes_no_corpus(tmp_path: Path, plan: Plan, fresh: bool) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine").touch()
    (tmp_path / "manifest.json").write_text('{"files": []}')
    with pytest.raises(ConfigError, match="holds something else: manifest.json, train"), \
            claim(tmp_path, plan, fresh=fresh):
        pass
    assert names(tmp_path) == {"train", "manifest.json"}
    assert names(tmp_path / "train") == {"mine"}


def test_a_directory_within_a_source_is_refused(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", random_counts(1, 9, 20))
    with pytest.raises(ConfigError, match="within the source 'a'"), \
            claim(path / "out", make_plan(config_of(path)), fresh=False):
        pass
    assert not (path / "out").exists()
