"""What a run directory says to a start that does not fit it, or that another version of ours began."""
import shutil
from pathlib import Path

import pytest
import yaml

from pretrain import continuation
from pretrain.checkpoint import STATE
from pretrain.metrics import read_rows
from scgpt.errors import CheckpointError, ConfigError
from scgpt.files import json_bytes
from tests.pretrain import runs
from tests.scgpt.data.cells import random_cells, write_corpus

SETTINGS = ("train.max_steps=4", "train.save_every=2")


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run_directory") / "run"
    assert runs.train_here(corpus, out, *SETTINGS) == 0
    return out


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_a_run_goes_on_under_another_name_and_tells_what_changed(corpus, copied, capsys):
    assert runs.train_here(corpus, copied, *SETTINGS, "train.max_steps=6", "train.log_every=3") == 0
    text = "continuing from step 4 of 6; train.log_every 5 -> 3; train.max_steps 4 -> 6"
    assert text in capsys.readouterr().err.splitlines()
    resumed = next(row for row in read_rows(copied / "events.jsonl") if row["event"] == "resume")
    assert resumed["changed"] == ["train.log_every 5 -> 3", "train.max_steps 4 -> 6"]


def test_what_the_checkpoint_was_written_with_counts_whatever_config_yaml_says(corpus, copied):
    saved = copied / "config.yaml"
    text = saved.read_text()
    assert "lr: 0.003" in text
    for spoil in (lambda: saved.write_text(text.replace("lr: 0.003", "lr: 0.5")),
                  lambda: saved.write_text(text[:len(text) // 2]), saved.unlink):
        spoil()
        with pytest.raises(ConfigError, match=r"another configuration \(optimizer.lr: 0.003 -> 0.5\)"):
            runs.train_here(corpus, copied, *SETTINGS, "train.max_steps=6", "optimizer.lr=0.5")
    saved.write_bytes(b"\xff")
    assert runs.train_here(corpus, copied, *SETTINGS, "train.max_steps=5") == 0
    assert saved.read_text() == text.replace("max_steps: 4", "max_steps: 5")


@pytest.mark.parametrize(("name", "content"), [("vocab.json", b"{"), ("wandb/run-id.txt", b"\xff\x00"), ("wandb", b"")])
def test_damaged_files_beside_the_checkpoints_are_written_anew_or_told(corpus, copied, capsys, name, content):
    before = (copied / "vocab.json").read_bytes()
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_bytes(content)
    assert runs.train_here(corpus, copied, *SETTINGS, "train.max_steps=5", "tracking.wandb=offline") == 0
    assert (copied / "vocab.json").read_bytes() == before
    told = "wandb cannot start" in capsys.readouterr().err
    assert told == (name == "wandb")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_by_itself(corpus, copied):
    states = sorted((copied / "checkpoints").glob(f"step-*/{STATE}"))
    assert len(states) == 2
    for state in states:
        state.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of the run's checkpoints is whole: step-00000004 is skipped.*; "
                                              r"step-00000002 is skipped"):
        runs.train_here(corpus, copied, *SETTINGS, "train.max_steps=6")
    assert [state.read_bytes() for state in states] == [b"", b""]


def test_a_split_without_cells_is_told_and_patience_refused(tmp_path, capsys):
    write_corpus(tmp_path / "corpus", {"train": [random_cells([5] * 20)], "valid": []})
    assert runs.train_here(tmp_path / "corpus", tmp_path / "run", *SETTINGS) == 0
    assert "1 rank; split 'valid' has no cell to validate on" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="split 'valid' has no cell"):
        runs.train_here(tmp_path / "corpus", tmp_path / "other", *SETTINGS, "train.patience=2")
    assert not (tmp_path / "other").exists()


def test_a_cell_of_one_token_has_no_batch_norm(tmp_path):
    write_corpus(tmp_path / "corpus", {"train": [random_cells([5, 0, 5])], "valid": []})
    norm = ("model.domain_spec_batchnorm=dsbn", "model.n_batch_labels=1", "data.batch_column=source")
    with pytest.raises(ConfigError, match="no batch norm has a variance"):
        runs.train_here(tmp_path / "corpus", tmp_path / "run", *SETTINGS, *norm, "batch.micro_batch_size=1")
    assert runs.train_here(tmp_path / "corpus", tmp_path / "run", *SETTINGS, *norm) == 0


def test_a_model_that_cannot_be_made_is_not_laid_to_deepspeed(corpus, tmp_path):
    with pytest.raises(ConfigError, match="the model cannot be made: unknown activation 'Linear'"):
        runs.train_here(corpus, tmp_path / "run", *SETTINGS, "model.kind=generator", "model.decoder_activation=Linear")


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


@pytest.mark.slow
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
