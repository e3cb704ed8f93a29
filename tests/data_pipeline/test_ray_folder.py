import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from data_pipeline.ray_folder import TEMPORARY, ray_folder


def test_what_a_killed_build_left_is_removed_and_what_lives_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:   # short, as Ray needs it
        monkeypatch.setattr(tempfile, "tempdir", parent)
        dead = Path(parent) / f"{TEMPORARY}dead"
        dead.mkdir()
        (dead / "owner").touch()
        remade, beginning = (Path(parent) / f"{TEMPORARY}{name}" for name in ("remade", "beginning"))
        remade.mkdir()
        os.utime(remade, (0, 0))
        beginning.mkdir()
        with ray_folder() as first:
            assert not dead.exists()
            assert not remade.exists()
            assert beginning.exists()
            with ray_folder() as second:
                assert first.exists()
                assert second != first
        assert list(Path(parent).iterdir()) == [beginning]


def test_processes_begun_under_the_folder_end_with_it_and_no_others() -> None:
    sleep = ["sleep", "60"]
    before = subprocess.Popen(sleep)
    with ray_folder() as folder:
        within = subprocess.Popen(sleep, start_new_session=True)
        assert os.environ["SCGPT_RAY_FOLDER"] == str(folder)
    assert within.wait(timeout=10) == -9
    assert before.poll() is None
    after = subprocess.Popen(sleep)
    assert not folder.exists()
    assert after.poll() is None
    for process in (before, after):
        process.kill()
        process.wait()
