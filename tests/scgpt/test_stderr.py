"""A program outlives whoever reads its stderr. The runs of pretraining: tests/pretrain/test_progress.py."""
import os
import subprocess
import sys

import pytest

from tests.data_pipeline.atlases import BLOOD, ROOT


@pytest.mark.parametrize("shown", ["pipe", "full", "closed"])
def test_a_build_that_nobody_watches_is_finished(tmp_path, shown):
    words = [sys.executable, "-m", "launch.cli", "data", "build", str(tmp_path / "blood.yaml"), "--out",
             str(tmp_path / "corpus")]
    (tmp_path / "blood.yaml").write_text(f"sources: [{BLOOD}]\nworkers: threads\n")
    if shown == "pipe":
        reading, stderr = os.pipe()
        os.close(reading)
    else:
        stderr = os.open("/dev/full", os.O_WRONLY)
    close = ["bash", "-c", 'exec "$@" 2>&-', "bash"] if shown == "closed" else []
    done = subprocess.run([*close, *words], stderr=stderr, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    os.close(stderr)
    assert done.returncode == 0
    assert "built by" in done.stdout
    assert (tmp_path / "corpus" / "manifest.json").exists()
    again = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert "it was complete" in again.stdout
