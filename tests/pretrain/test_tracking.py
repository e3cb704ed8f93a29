import logging
import os
import time
from unittest.mock import patch

import pytest

from pretrain.config import TrainConfig
from pretrain.metrics import RunLog, read_rows
from pretrain.tracking import Tracker, run_id
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


def test_every_start_of_a_run_has_its_id(tmp_path):
    first = run_id(tmp_path)
    assert len(first) == 8
    assert run_id(tmp_path) == first
    (tmp_path / "other").mkdir()
    assert run_id(tmp_path / "other") != first


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
def test_offline_each_start_keeps_the_rows_of_metrics_jsonl_under_one_id(tmp_path):
    told: list[str] = []
    for start in (1, 2):
        tracker = Tracker(tmp_path, config_of("offline"), told.append)
        tracker.log({"step": start, "split": "train", "loss": start + 0.25, "mfu": None})
        tracker.log({"step": start, "split": "valid", "loss": 2.5})
        tracker.finish()
        time.sleep(1.1)   # the folder of a start is named by its second
    assert not told
    identity = run_id(tmp_path / "wandb")
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    contents = [file.read_bytes() for file in files]   # records of protobuf, whose strings are plain
    for content in contents:
        assert b"valid/loss" in content
        assert b"objective" in content   # the configuration
        assert b"mfu" not in content
    assert b"1.25" in contents[0]
    assert b"2.25" in contents[1]
