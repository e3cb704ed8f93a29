"""A run of another version of ours is continued, or refused with everything as it was."""
from pathlib import Path

import pytest
import yaml

from pretrain import continuation
from pretrain.metrics import read_rows
from scgpt.errors import ConfigError
from scgpt.files import json_bytes
from tests.pretrain import runs

pytestmark = pytest.mark.slow


def add_key(out: Path, value: float) -> None:
    """Make of a run, and of its checkpoint, those of a version that had a setting more."""
    saved = yaml.safe_load((out / "config.yaml").read_text())
    saved["train"]["moon_phase"] = value
    (out / "config.yaml").write_text(yaml.safe_dump(saved))
    state = runs.state_of(out)
    state["config"]["train"]["moon_phase"] = value
    folder = out / "checkpoints" / "step-00000004"
    (folder / "state.json").write_bytes(json_bytes(state))
    runs.sign(folder)


def test_a_run_with_a_setting_that_is_gone_goes_on_and_tells_it_once(tmp_path, monkeypatch):
    corpus, out = runs.make_corpus(tmp_path / "corpus"), tmp_path / "run"
    assert runs.train_here(corpus, out, "train.max_steps=4", "schedule.kind=constant") == 0
    add_key(out, 0.5)
    before = sorted(path.read_bytes() for path in out.rglob("*.json"))
    with pytest.raises(ConfigError, match="unknown key 'train.moon_phase'"):
        runs.train_here(corpus, out, "train.max_steps=6", "schedule.kind=constant")
    monkeypatch.setitem(continuation.GONE, "train.moon_phase", 0.25)
    with pytest.raises(ConfigError, match="train.moon_phase=0.5, which this version no longer has"):
        runs.train_here(corpus, out, "train.max_steps=6", "schedule.kind=constant")
    assert sorted(path.read_bytes() for path in out.rglob("*.json")) == before
    monkeypatch.setitem(continuation.GONE, "train.moon_phase", 0.5)
    for steps in (6, 8):   # saved without it, it is told no second time
        assert runs.train_here(corpus, out, f"train.max_steps={steps}", "schedule.kind=constant") == 0
    told = [row["key"] for row in read_rows(out / "events.jsonl") if row["event"] == "setting_passed_over"]
    assert told == ["train.moon_phase"]
    assert runs.state_of(out)["step"] == 8
    assert "moon_phase" not in runs.state_of(out)["config"]["train"]
