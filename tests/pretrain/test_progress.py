import contextlib
import os
import pty
import re
import subprocess
import sys

import pytest

from pretrain.progress import Bar, Lines, describe, progress
from tests.pretrain import runs

TRAIN = {"step": 5, "split": "train", "loss": 1.234, "lr": 1e-3, "grad_norm": 2.0, "cells_per_s": 1234.5,
         "tokens_per_s": 1e6, "mfu": None, "step_time_s": 2.0}
VALID = {"step": 5, "split": "valid", "loss_expression": 1.5, "loss_gene_mean": 2.5}
PROBE = {"step": 5, "split": "probe", "column": "cell_type", "neighbours": 15, "knn_accuracy": 0.75,
         "knn_accuracy_pca": 0.5}


def test_a_line_of_the_log_says_step_loss_speed_and_time_left():
    assert describe(TRAIN, 10) == ("step 5/10  loss 1.23  lr 1.00e-03  grad 2.00  1,234 cells/s  1,000,000 tokens/s  "
                                   "0:00:10 left")
    assert "tokens/s  MFU 41.5%  0" in describe(TRAIN | {"mfu": 0.4149}, 10)
    assert describe(VALID, 10) == "step 5/10  valid: loss_expression 1.50 (predicting each gene's mean: 2.50)"
    assert describe(PROBE, 10) == "step 5/10  probe: 15-NN accuracy of cell_type 0.750 (PCA: 0.500)"


def test_a_run_that_something_else_ends_has_no_time_left():
    assert describe(TRAIN, 10**18).endswith("tokens/s  for ever left")


def show(shown: Bar | Lines) -> None:
    shown.say("training 10 steps [on 1 rank]")
    for row in (TRAIN, VALID, TRAIN | {"step": 10}):
        shown.row(row)
    shown.close()


def test_elsewhere_than_on_a_terminal_each_row_is_one_plain_line(capsys):
    show(progress(10))
    rows = [describe(row, 10) for row in (TRAIN, VALID, TRAIN | {"step": 10})]
    assert capsys.readouterr().err.splitlines() == ["training 10 steps [on 1 rank]", *rows]


def read_all(master: int) -> bytes:
    """What was written to a terminal whose other end is closed."""
    text = b""
    with os.fdopen(master, "rb", buffering=0) as stream, contextlib.suppress(OSError):   # EIO is its end
        while part := stream.read(1 << 12):
            text += part
    return text


def test_on_a_terminal_there_is_a_bar_with_lines_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        shown = progress(10)
        assert isinstance(shown, Bar)
        show(shown)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", read_all(master).decode())
    assert "training 10 steps [on 1 rank]" in plain
    assert "valid: loss_expression 1.50" in plain
    assert re.search(r"10/10\s+loss 1.23 .* 0:00:00 left", plain)


@pytest.mark.parametrize("step", [0, 10])
def test_a_run_that_was_continued_is_not_taken_for_a_fast_one(step):
    assert describe(TRAIN | {"step": step}, 10).endswith(f"0:00:{(10 - step) * 2:02d} left")


LINES = """
import sys
from pretrain.progress import Bar, Lines
from scgpt.stderr import say
shown = {bar}
input()
for step in range(3):
    shown.say("a line")
sys.stderr.write("other libraries write there too")
shown.close()
say("done")
"""


@pytest.mark.parametrize("bar", ["Lines(10)", "Bar(10)"])
def test_a_stderr_that_nobody_reads_any_more_ends_no_run(bar):
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", LINES.format(bar=bar)], stdin=subprocess.PIPE, stderr=writing,
                               env=os.environ | {"PYTHONPATH": str(runs.ROOT)})
    os.close(writing)
    os.close(reading)
    process.communicate(b"\n")
    assert process.returncode == 0


@pytest.mark.parametrize("words", [["-m", "launch.cli", "train"], ["pretrain/train.py"]])
def test_an_exit_code_is_the_same_when_nobody_reads_the_error(words):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, *words, "demo", "data.corpus=none", "train.max_steps=0"], stderr=writing,
                          cwd=runs.ROOT, env=os.environ | {"PYTHONPATH": str(runs.ROOT)}, check=False)
    os.close(writing)
    assert done.returncode == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")  # noqa: PTH110
def test_a_log_on_a_full_disk_ends_no_run():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run([sys.executable, "-c", LINES.format(bar="Lines(10)")], input=b"\n", stderr=full,
                              env=os.environ | {"PYTHONPATH": str(runs.ROOT)}, check=False)
    assert done.returncode == 0
