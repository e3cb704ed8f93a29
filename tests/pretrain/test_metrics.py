import json
import math
from pathlib import Path

import pytest
import torch

from pretrain.metrics import JsonLines, Window, last_row, read_rows
from pretrain.objectives import Objective
from pretrain.world import join_world
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
        window.add(sums, counts=[10 + step], n_cells=4, n_tokens=40, flops=10**9, lr=0.1 * step)


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
        window.add(sums, counts=[10, 10 if prompted else 0], n_cells=4, n_tokens=40, flops=10**9, lr=step)
    row = window.row(world, 0.0)
    assert (row["loss_expression"], row["loss_prompted"], row["loss"]) == (2.0, 3.0, 8.0)
    sums = torch.tensor([20.0, 0.0, 1.0], dtype=torch.float64)
    window.add(sums, counts=[10, 0], n_cells=4, n_tokens=40, flops=1, lr=1)
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


def test_model_flops_over_what_the_devices_could_do_is_the_mfu(world):
    window = Window([], OBJECTIVE, peak_tflops=0.01)
    fill(window, [1, 2])
    window.exclude(-10.0)
    row = window.row(world, 0.0)
    assert row["tflops_per_s"] == pytest.approx(2e-3 / row["step_time_s"] / 2)
    assert row["mfu"] == pytest.approx(row["tflops_per_s"] / 0.01)
    window = Window([], OBJECTIVE)
    fill(window, [1])
    assert window.row(world, 0.0)["mfu"] is None


def test_a_row_tells_the_spread_of_its_steps_and_their_parts(world):
    window = Window([], OBJECTIVE)
    for seconds in (1.0, 2.0, 6.0):
        window.exclude(-seconds)
        fill(window, [1])
    row = window.row(world, 0.0, {"forward": 3.0, "to_device": 0.3})
    assert row["step_time_p50_s"] == pytest.approx(2.0, abs=0.1)
    assert row["step_time_p95_s"] == pytest.approx(5.6, abs=0.1)
    assert (row["forward_s"], row["to_device_s"]) == (1.0, pytest.approx(0.1))
    assert (row["slowest_rank"], row["slowest_rank_ratio"]) == (0, 1.0)
    assert row["memory_bytes"] > 10_000_000


def test_the_last_row_is_there_where_an_earlier_one_is_damaged(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert last_row(path) is None
    path.write_bytes(b"\xff{\n{\"step\": 2}\n{\"step\": 3")
    assert last_row(path) == {"step": 2}
