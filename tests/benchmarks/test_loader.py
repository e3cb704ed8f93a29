import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader import RandomCells, plain_numpy
from scgpt.collate import CollateConfig, collate

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "loader.py"


def test_both_sides_do_the_same_work():
    """Equal lengths, equal mean bins (ties are drawn, 3 % apart would be 20 sigma), equal shares hidden."""
    cells, config = RandomCells(300).cells, CollateConfig(600)
    plain = plain_numpy(cells, config, np.random.default_rng(0))
    packed = collate(cells, config, cls_id=60_695, seed=0, epochs=0)
    padded = packed.padded(60_694, config.pad_value)
    assert plain["gene"].shape == padded["gene"].shape
    np.testing.assert_array_equal((plain["gene"] != 60_694).sum(1), np.diff(packed.cu_seqlens))
    bins = [side["expr"][side["expr"] > 0].mean() for side in (plain, padded)]
    assert bins[0] == pytest.approx(bins[1], rel=0.03)
    hidden = [(side["masked_expr"] == config.mask_value).sum() for side in (plain, padded)]
    assert hidden[0] == pytest.approx(hidden[1], rel=0.02)


@pytest.mark.slow
def test_the_benchmark_runs_and_tells_its_figures():
    command = [sys.executable, str(BENCHMARK), "--cells", "600", "--rounds", "1", "--json"]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARK.parents[1])}
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert told["cells"] == 600
    assert told["cells_per_s"]["collate"] > told["cells_per_s"]["plain NumPy, padded"]
