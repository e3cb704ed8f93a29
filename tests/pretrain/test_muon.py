"""Why Muon is not offered: see docs/engine.md."""
import json
from pathlib import Path

import pytest

from tests.pretrain import runs


@pytest.mark.slow
def test_deepspeed_clips_muons_update_in_zero_1_to_3_and_its_gradient_in_zero_0(tmp_path):
    """Should this fail for a newer DeepSpeed, Muon may pass the gradient gate, and can be offered."""
    code, errors = runs.program(Path(__file__).with_name("muon.py"), str(tmp_path / "found.json"), ranks=1)
    assert code == 0, errors
    found = json.loads((tmp_path / "found.json").read_text())
    assert max(found["0.0"].values()) < 1e-6
    assert min(found["0.1"].values()) > 0.02
