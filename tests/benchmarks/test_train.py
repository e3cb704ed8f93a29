import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "train.py"


@pytest.mark.slow
def test_the_benchmark_runs_and_its_parts_add_up():
    command = [sys.executable, str(BENCHMARK), "--model", "scgpt-tiny", "--steps", "21", "--cells", "8", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False,
                          env=os.environ | {"PYTHONPATH": str(BENCHMARK.parents[1])})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["steps"] == 13   # of 21: not the first three, the last, or one with a row or a checkpoint
    assert 0 < told["forward"] + told["backward"] + told["optimizer"] < told["loop"] * 1.5
    assert told["overhead"] == pytest.approx(sum(told[f"overhead of {part}"] for part in
                                                 ("the loop", "metrics", "checkpoints")))
    assert told["lower quartile"] <= told["overhead of the loop"] <= told["upper quartile"]
    assert told["checkpoint itself"] > told["row itself"] > 0
