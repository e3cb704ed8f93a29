"""A disk that is full or read-only, a tracker that cannot be reached: nothing that was saved is lost."""
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import wandb

from pretrain.checkpoint import newest_valid
from pretrain.metrics import read_rows
from scgpt.errors import CheckpointError, explain
from tests.pretrain import runs

pytestmark = [pytest.mark.slow, pytest.mark.system]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small tmpfs")
STEPS = ("train.max_steps=40", "train.save_every=10", "train.log_every=1", "schedule.kind=constant")


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert runs.train_here(corpus, out, *STEPS) == 0
    return out


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, *, but_bytes: int = 0) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream:
        left = shutil.disk_usage(disk).free - but_bytes
        while left > 0 and (written := stream.write(bytes(min(left, 4096)))):
            left -= written
    return filler


def assert_goes_on(corpus: Path, out: Path, undisturbed: Path) -> None:
    assert runs.train_here(corpus, out, *STEPS) == 0
    ours, theirs = runs.weights(out), runs.weights(undisturbed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    curve = runs.curve(out)   # with the validation of another end, too
    assert {key: curve[key] for key in runs.curve(undisturbed)} == runs.curve(undisturbed)


@needs_root
def test_a_checkpoint_that_does_not_fit_leaves_those_before(corpus, undisturbed, disk):
    out = disk / "run"
    assert runs.train_here(corpus, out, *STEPS, "train.max_steps=20") == 0
    filler = fill(disk, but_bytes=60_000)   # rows fit, a checkpoint does not
    with pytest.raises(CheckpointError) as caught:
        runs.train_here(corpus, out, *STEPS)
    assert "the checkpoint of step 30 cannot be written: " in str(caught.value)
    assert "unexpected pos" not in str(caught.value)   # torch's word for it
    assert "make room; the same command continues from the checkpoint before" in str(caught.value)
    state, _ = newest_valid(out / "checkpoints")
    assert state is not None
    assert state.step == 20
    filler.unlink()
    assert_goes_on(corpus, out, undisturbed)


@needs_root
def test_a_disk_that_is_full_in_the_middle_ends_the_run_after_what_is_saved(corpus, undisturbed, disk):
    """A row of metrics is what fails first, unless a checkpoint is on its way."""
    out = disk / "run"

    ended = threading.Event()

    def fill_amid() -> None:
        while not any(row["step"] > 12 for row in read_rows(out / "metrics.jsonl")):
            if ended.wait(0.002):
                return
        fill(disk)

    thread = threading.Thread(target=fill_amid)
    thread.start()
    try:
        with pytest.raises((OSError, CheckpointError)) as caught:
            runs.train_here(corpus, out, *STEPS, "train.max_steps=100000")
    finally:
        ended.set()
        thread.join()
    assert "make room" in str(explain(caught.value))
    assert newest_valid(out / "checkpoints")[0] is not None
    (disk / "filler").unlink()
    assert_goes_on(corpus, out, undisturbed)


@needs_root
def test_a_run_directory_that_may_not_be_written_to_is_one_sentence(corpus, disk):
    assert runs.train_here(corpus, disk / "run", *STEPS, "train.max_steps=10") == 0
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for out in (disk / "run", disk / "other"):
        with pytest.raises(Exception, match="Read-only file system") as caught:
            runs.train_here(corpus, out, *STEPS)
        assert explain(caught.value) is not None


@pytest.fixture
def service() -> Iterator[None]:
    """A W&B service of this process, as of a notebook that starts a training."""
    wandb.teardown()
    wandb.setup()
    yield
    wandb.teardown()
    assert "WANDB_SERVICE" not in os.environ   # nor do later tests find it


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize("listens", [False, True])
def test_a_tracker_that_does_not_answer_is_told_and_the_run_is_tracked_offline(corpus, tmp_path, monkeypatch, listens):
    assert "WANDB_SERVICE" in os.environ
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:   # but never answers
            silent.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        out = tmp_path / "run"
        code, errors = runs.train(corpus, out, *STEPS, "tracking.wandb=online")
    assert code == 0, errors
    assert errors.count("cannot start") == errors.count("wandb (online) cannot start") == 1, errors
    assert "Traceback" not in errors
    assert list((out / "wandb").glob("offline-run-*"))
    assert runs.state_of(out)["step"] == 40
