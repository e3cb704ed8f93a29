import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import plan as planning
from data_pipeline.plan import make_plan
from scgpt.data import TokenDataset, verify_corpus, zarr_format
from scgpt.data.convert import ConvertConfig, convert
from scgpt.errors import ConfigError
from tests.data_pipeline.atlases import BLOOD, CHR21, ROOT, Here, build_here, bytes_of, cells_of, config_of

CODECS = ("none", "zstd", "lz4")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zarr_format, "CHUNK_ITEMS", 5000)


def settings(form: str, codec: str = "none") -> dict[str, object]:
    return {"form": form, "compression": codec, "max_bytes": "64KiB"}


@pytest.mark.parametrize("codec", CODECS)
def test_both_forms_hold_the_same_cells_in_the_same_order(tmp_path: Path, codec: str) -> None:
    arrow = build_here(config_of(CHR21, shards=settings("arrow")), tmp_path / "arrow")
    assert len(arrow.splits["train"].shards) > 2
    for form in ("arrow", "zarr"):
        out = tmp_path / f"{form}-{codec}"
        manifest = build_here(config_of(CHR21, shards=settings(form, codec)), out)
        assert verify_corpus(out, deep=True) == manifest
        assert manifest.sources == arrow.sources
        assert (manifest.splits["train"].form, manifest.splits["train"].compression or "none") == (form, codec)
        assert cells_of(out) == cells_of(tmp_path / "arrow")
        for split in ("train", "valid"):
            one, other = TokenDataset.open(tmp_path / "arrow", split), TokenDataset.open(out, split)
            assert one.obs().equals(other.obs())
            assert np.array_equal(one.lengths, other.lengths)
        assert not (out / ".build").exists()


def test_a_build_and_a_conversion_give_the_same_store(tmp_path: Path) -> None:
    build_here(config_of(BLOOD, CHR21, shards=settings("arrow")), tmp_path / "arrow")
    build_here(config_of(BLOOD, CHR21, shards=settings("zarr", "lz4")), tmp_path / "built")
    convert(tmp_path / "arrow", tmp_path / "converted", ConvertConfig(form="zarr", compression="lz4"))
    built, converted = bytes_of(tmp_path / "built"), bytes_of(tmp_path / "converted")
    assert sum("/genes/c/" in name for name in built) > 3
    assert set(converted) == set(built) - {".lock"}
    assert [name for name in converted if built[name] != converted[name]] == ["manifest.json"]   # another plan


def test_the_bytes_of_a_store_depend_on_no_order_of_the_tasks(tmp_path: Path) -> None:
    config = config_of(CHR21, shards=settings("zarr", "zstd"))
    for seed in (None, 1, 2):
        build_here(config, tmp_path / str(seed), workers=Here(seed=seed))
    assert bytes_of(tmp_path / "None") == bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")


class CutOff(Here):
    """Stops after some tasks, in the middle of writing a file."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.left = tasks

    def run(self, stage: str, layout, jobs, *rest) -> list[dict[str, object]]:
        if self.left < len(jobs):
            super().run(stage, layout, jobs[:self.left], *rest)
            for folder in [path for path in layout.build.path.rglob("*") if path.is_dir()]:
                (folder / ".tmp-elsewhere-1-00000000-part").write_bytes(b"half")
            raise KeyboardInterrupt
        self.left -= len(jobs)
        return super().run(stage, layout, jobs, *rest)


def test_a_build_cut_off_anywhere_goes_on_to_the_same_bytes_and_repeats_nothing(tmp_path: Path) -> None:
    config = config_of(CHR21, shards=settings("zarr"))
    whole = Here()
    build_here(config, tmp_path / "whole", workers=whole)
    assert sum(name.startswith("store-") for name in whole.calls) > 10
    for tasks in range(2, len(whole.calls), 9):
        out = tmp_path / str(tasks)
        with pytest.raises(KeyboardInterrupt):
            build_here(config, out, workers=CutOff(tasks))
        assert not (out / "manifest.json").exists()
        before = {path: path.stat().st_mtime_ns for path in (out / ".build").rglob("*.zarr/*/c/*")}
        build_here(config, out)
        assert bytes_of(out) == bytes_of(tmp_path / "whole")
        for path, modified_ns in before.items():
            if not path.name.startswith(".tmp-"):
                assert (out / path.relative_to(out / ".build")).stat().st_mtime_ns == modified_ns


def test_a_commit_of_a_store_that_was_cut_off_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(CHR21, shards=settings("zarr"))
    build_here(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("scgpt.data.Manifest.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        build_here(config, tmp_path / "out")
    assert (tmp_path / "out" / "train.zarr").is_dir()
    again = Here()
    build_here(config, tmp_path / "out", workers=again)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_corpus_of_the_other_form_is_another_plan(tmp_path: Path) -> None:
    plans = {make_plan(config_of(CHR21, shards=settings(form, codec))).sha256
             for form in ("arrow", "zarr") for codec in CODECS}
    assert len(plans) == 6
    build_here(config_of(CHR21, shards=settings("zarr")), tmp_path / "zarr")
    with pytest.raises(ConfigError, match="a corpus of another plan"):
        build_here(config_of(CHR21, shards=settings("arrow")), tmp_path / "zarr")
    build_here(config_of(CHR21, shards=settings("arrow")), tmp_path / "zarr", fresh=True)
    assert not list(tmp_path.rglob("*.zarr"))
    convert(tmp_path / "zarr", tmp_path / "converted", ConvertConfig(compression="zstd"))
    with pytest.raises(ConfigError, match="a corpus of another plan"):
        build_here(config_of(CHR21, shards=settings("arrow")), tmp_path / "converted")


DRIVER = """
import sys
from pathlib import Path
from data_pipeline import plan
from data_pipeline.config import CorpusConfig
from data_pipeline.execute import build
from scgpt.config import validate
from scgpt.data import zarr_format
plan.BLOCK_VALUES, zarr_format.CHUNK_ITEMS = 20_000, 5000
build(validate(CorpusConfig, {"sources": sys.argv[2:3], "cells": {"min_genes": 1},
                              "workers": sys.argv[3],
                              "shards": {"form": "zarr", "compression": "lz4", "max_bytes": "64KiB"}}),
      Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["threads", "ray"])
def test_kill_9_while_stores_are_written_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         workers: str) -> None:
    monkeypatch.setattr(planning, "BLOCK_VALUES", 20_000)
    monkeypatch.setattr("scgpt.data.zarr_format.CHUNK_ITEMS", 5000)
    build_here(config_of(CHR21, shards=settings("zarr", "lz4")), tmp_path / "whole")
    out, command = tmp_path / "out", [sys.executable, "-c", DRIVER, str(tmp_path / "out"), str(CHR21), workers]
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp", ignore_cleanup_errors=True) as folder:   # short, for Ray
        environment = os.environ | {"TMPDIR": folder}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and len(list(out.glob(".build/records/store-*.json"))) < 3:
            time.sleep(0.02)
        process.kill()
        process.wait(timeout=60)
        assert not (out / "manifest.json").exists()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
                              check=False)
    assert done.returncode == 0, done.stderr
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    verify_corpus(out, deep=True)
