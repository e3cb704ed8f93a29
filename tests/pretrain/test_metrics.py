import json
import math
from pathlib import Path

import pytest
import torch

from pretrain.config import TrainConfig
from pretrain.metrics import JsonLines, RunLog, Window, describe, read_rows
from pretrain.objectives import Objective
from pretrain.world import join_world
from scgpt.config import load_config
from scgpt.errors import CheckpointError

OBJECTIVE = Objective({"loss_expression": 1.0, "loss_mvc": 1.0})
PROMPTED = Objective({"loss_expression": 1.0, "loss_prompted": 2.0}, cell_prompt_after=2)


@pytest.fixture(scope="module")
def world():
    with join_world(timeout_s=10) as joined:
        yield joined


def fill(window, steps):
    for step in steps:
        sums = torch.tensor([step / 3, step / 7, step / 11], dtype=torch.float64)
        window.add(sums, counts=[10 + step], n_cells=4, n_tokens=40, lr=0.1 * step)


def test_rows_are_appended_and_read_back_without_what_a_kill_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1, "loss": math.nan, "name": "ä"})
    lines.close()
    with path.open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1, "loss": None, "name": "ä"}]
    lines = JsonLines(path)
    lines.write({"step": 2})
    lines.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_line_that_was_broken_by_hand_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"rows\.jsonl:2"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_row_that_does_not_fit_on_the_disk_names_the_file_and_closing_is_quiet(tmp_path):
    (tmp_path / "rows.jsonl").symlink_to("/dev/full")
    lines = JsonLines(tmp_path / "rows.jsonl")
    with pytest.raises(OSError, match="No space left") as caught:
        lines.write({"step": 1})
    assert caught.value.filename == str(tmp_path / "rows.jsonl")
    lines.close()


class FailingTracker:
    def __init__(self):
        self.calls = 0

    def log(self, row, step):
        self.calls += 1
        raise ConnectionError("the server is gone")

    def finish(self):
        self.calls += 1


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(tmp_path, capsys):
    config = load_config(TrainConfig, "demo", ["data.corpus=x", "tracking.wandb=disabled"], kind="pretrain")
    log = RunLog(tmp_path, config, total_steps=2, first=True)
    tracker = log._wandb = FailingTracker()
    for step in (1, 2):
        log.row({"step": step, "split": "valid", "loss_expression": 1.0, "loss_gene_mean": 2.0})
    log.close()
    assert tracker.calls == 1
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [row["event"] for row in read_rows(tmp_path / "events.jsonl")] == ["tracking_failed"]
    assert capsys.readouterr().err.count("the server is gone") == 1


def test_no_rows_where_there_is_no_file(tmp_path):
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_row_is_the_mean_over_all_hidden_positions_of_its_steps(world):
    window = Window([], OBJECTIVE)
    fill(window, [1, 2])
    row = window.row(world, waited_s=0.5)
    assert row["loss_expression"] == (1 / 3 + 2 / 3) / (11 + 12)
    assert row["loss"] == row["loss_expression"] + row["loss_mvc"]
    assert row["mre"] == (1 / 11 + 2 / 11) / 23
    assert row["lr"] == 0.2
    assert row["data_wait_s"] == 0.25
    fill(window, [5])
    assert window.row(world, waited_s=0.5)["loss_expression"] == 5 / 3 / 15   # it began anew


def test_a_window_that_a_checkpoint_carried_over_gives_the_same_bits(world):
    whole = Window([], OBJECTIVE)
    fill(whole, [1, 2, 3, 4, 5])
    first = Window([], OBJECTIVE)
    fill(first, [1, 2, 3])
    second = Window(json.loads(json.dumps(first.reduced(world))), OBJECTIVE)
    fill(second, [4, 5])
    names = ("loss", *OBJECTIVE.names)
    one, other = whole.row(world, 0.0), second.row(world, 0.0)
    assert [one[name] for name in names] == [other[name] for name in names]


def test_a_term_that_begins_within_a_window_is_the_mean_over_what_it_was_trained_on(world):
    window = Window([], PROMPTED)
    for step, prompted in ((1, 0.0), (2, 30.0)):
        sums = torch.tensor([20.0, prompted, 1.0], dtype=torch.float64)
        window.add(sums, counts=[10, 10 if prompted else 0], n_cells=4, n_tokens=40, lr=step)
    row = window.row(world, 0.0)
    assert (row["loss_expression"], row["loss_prompted"], row["loss"]) == (2.0, 3.0, 8.0)
    window.add(torch.tensor([20.0, 0.0, 1.0], dtype=torch.float64), counts=[10, 0], n_cells=4, n_tokens=40, lr=1)
    assert "loss_prompted" not in window.row(world, 0.0)


def test_a_window_is_empty_until_a_step_and_again_after_its_row(world):
    window = Window([], OBJECTIVE)
    assert window.is_empty
    fill(window, [1])
    assert not window.is_empty
    assert not Window(window.reduced(world), OBJECTIVE).is_empty
    window.row(world, 0.0)
    assert window.is_empty


def test_time_that_was_no_training_does_not_count(world):
    window = Window([], OBJECTIVE)
    fill(window, [1])
    window.exclude(-100.0)
    assert window.row(world, 0.0)["step_time_s"] > 100


def test_a_line_of_the_log_says_step_loss_and_speed():
    row = {"step": 5, "split": "train", "loss": 1.234, "lr": 1e-3, "grad_norm": 2.0, "cells_per_s": 1234.5,
           "tokens_per_s": 1e6}
    assert describe(row, 10) == "step 5/10  loss 1.23  lr 1.00e-03  grad 2.00  1,234 cells/s  1,000,000 tokens/s"
