import logging
import os
import shutil
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from pretrain.config import TrainConfig
from pretrain.metrics import RunLog, read_rows
from pretrain.tracking import run_id
from scgpt.config import load_config


def config_of(wandb: str) -> TrainConfig:
    return load_config(TrainConfig, "demo", ["data.corpus=x", f"tracking.wandb={wandb}"], kind="pretrain")


class FailingTracker:
    def __init__(self):
        self.calls = 0

    def log(self, row, step):
        self.calls += 1
        raise ConnectionError("the server is gone")

    def finish(self):
        self.calls += 1


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(tmp_path, capsys):
    log = RunLog(tmp_path, config_of("disabled"), total_steps=2, first=True)
    tracker = log._tracker._run = FailingTracker()
    for step in (1, 2):
        log.row({"step": step, "split": "valid", "loss_expression": 1.0, "loss_gene_mean": 2.0})
    log.close()
    assert tracker.calls == 1
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [row["event"] for row in read_rows(tmp_path / "events.jsonl")] == ["tracking_failed"]
    assert capsys.readouterr().err.count("the server is gone") == 1


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    return tmp_path / "run"


def quiet(text: str) -> None:
    pytest.fail(text)


def test_every_start_of_a_run_has_its_id(run):
    first = run_id(run, quiet)
    assert len(first) == 8
    assert run_id(run, quiet) == first


def test_a_copy_of_a_run_has_an_id_of_its_own_and_the_original_keeps_its(run, tmp_path):
    run = run.rename(tmp_path / "a\nrun\x85")   # names may hold anything
    first, told = run_id(run, quiet), []
    copy = shutil.copytree(run, tmp_path / "copy")
    second = run_id(copy, told.append)
    assert second != first
    assert told == [f"this run is a copy of {run}, which is tracked as {first}: from here on it is tracked as {second}"]
    assert run_id(copy, quiet) == second
    assert run_id(run, quiet) == first


def test_a_run_that_was_moved_or_is_seen_under_another_path_keeps_its_id(run, tmp_path):
    first = run_id(run, quiet)
    moved = run.rename(tmp_path / "moved")
    assert run_id(moved, quiet) == first
    run.symlink_to(moved)
    assert run_id(run, quiet) == first
    run.unlink()
    (run / "wandb").mkdir(parents=True)   # another run where the first one was
    assert run_id(run, quiet) != first
    again = moved.rename(tmp_path / "again")
    assert run_id(again, quiet) == first


def test_a_copy_of_a_run_that_may_not_be_looked_at_has_an_id_of_its_own(run, tmp_path, monkeypatch):
    first, told = run_id(run, quiet), []
    copy = shutil.copytree(run, tmp_path / "copy")
    real = Path.exists

    def exists(path: Path) -> bool:
        if path.is_relative_to(run):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "exists", exists)
    assert run_id(copy, told.append) != first
    assert len(told) == 1


@pytest.mark.parametrize("content", [b"0a1b2c3d\n", b"0a1b2c3d\n\x00\n", b"0a1b2c3d\n/no/such\xff/run\n"])
def test_an_id_without_a_directory_that_is_there_is_kept(run, content):
    (run / "wandb" / "run-id.txt").write_bytes(content)
    assert run_id(run, quiet) == "0a1b2c3d"
    assert (run / "wandb" / "run-id.txt").read_text() == f"0a1b2c3d\n{run}\n"


@pytest.fixture
def own_process(monkeypatch):
    """What a tracker changes for the process is as it was afterwards: later tests start programs, and log."""
    import wandb

    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    with patch.dict(os.environ):
        yield
        wandb.teardown()


@pytest.mark.slow
@pytest.mark.usefixtures("own_process")
def test_offline_each_start_keeps_the_rows_of_metrics_jsonl_under_one_id_and_a_copy_under_another(tmp_path):
    def start(run: Path, step: int) -> None:
        log = RunLog(run, config_of("offline"), total_steps=9, first=True)
        log.row({"step": step, "split": "valid", "loss_expression": step + 0.25, "loss_gene_mean": 2.5, "mfu": None})
        log.close()
        time.sleep(1.1)   # the folder of a start is named by its second

    (tmp_path / "run").mkdir()
    start(tmp_path / "run", 1)
    start(tmp_path / "run", 2)
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=True)
    start(copy, 3)
    ids = [run_id(run, quiet) for run in (tmp_path / "run", copy)]
    files = [sorted((run / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
             for run, identity in zip((tmp_path / "run", copy), ids, strict=True)]
    assert [len(found) for found in files] == [2, 1]
    contents = [file.read_bytes() for found in files for file in found]   # records of protobuf, whose strings are plain
    for step, content in enumerate(contents, 1):
        assert f"{step}.25".encode() in content
        assert b"valid/loss_expression" in content
        assert b"objective" in content   # the configuration
        assert b"mfu" not in content
    assert [row["event"] for row in read_rows(copy / "events.jsonl")] == ["tracked_apart"]
