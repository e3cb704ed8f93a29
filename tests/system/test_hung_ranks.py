"""Ranks that die or stop answering, wherever they are: the job ends soon, says so, and leaves nothing behind."""
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.pretrain import runs

pytestmark = [pytest.mark.slow, pytest.mark.system]
ENDLESS = ("train.max_steps=100000", "train.save_every=15", "train.eval_every=15", "deepspeed.timeout_s=20")
PLACES = ("step", "checkpoint", "validation") if runs.FULL else ("checkpoint",)
GRACE_S = 30   # between SIGTERM and SIGKILL of DeepSpeed's launcher: a process that is stopped hears only the second


def assert_ended(process: "subprocess.Popen[str]", out: Path, *, within_s: float) -> str:
    ranks = runs.rank_processes(out)
    _, errors = process.communicate(timeout=within_s)
    assert process.returncode not in {0, 75}, errors
    assert "another rank is gone or hung" in errors, errors
    assert "the same command continues from the last checkpoint" in errors
    assert "Traceback" not in errors
    runs.wait_until_gone(ranks, within_s=30)
    return errors


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_stops_ends_the_job_after_the_time_limit(corpus, tmp_path, place):
    out = tmp_path / "run"
    words = ("demo", f"data.corpus={corpus}", *runs.SETTINGS, *ENDLESS, "--out", str(out))
    process = runs.begin(runs.launched(str(runs.ROOT / "tests/system/stopping.py"), *words, place, ranks=2))
    runs.wait_for_step(process, out, 5, within_s=400)
    assert_ended(process, out, within_s=20 + GRACE_S + 60)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_job_long_before_the_time_limit(corpus, tmp_path, rank):
    """Within seconds, on a machine that does nothing else."""
    out = tmp_path / "run"
    process = runs.start(corpus, out, *ENDLESS, "deepspeed.timeout_s=600", ranks=2)
    runs.wait_for_step(process, out, 10, within_s=400)
    os.kill(runs.rank_processes(out)[rank], signal.SIGKILL)
    assert_ended(process, out, within_s=120)
