"""Checkpoint folders without an engine: what is whole, what is torn, which one is taken."""
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pretrain.checkpoint import (
    BEST,
    LATEST,
    STATE,
    SUMS,
    RunState,
    check_sums,
    checkpoint_name,
    find,
    newest_valid,
    sums_bytes,
    validate,
)
from scgpt.errors import CheckpointError, ConfigError
from scgpt.files import json_bytes, sha256


def write(checkpoints: Path, step: int) -> Path:
    folder = checkpoints / checkpoint_name(step)
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(bytes([step % 256]) * 100)
    (folder / STATE).write_bytes(json_bytes(asdict(RunState(step=step, window=[[1.0, 0.1]]))))
    (folder / SUMS).write_bytes(sums_bytes({path.name: sha256(path) for path in folder.iterdir()}))
    return folder


def flip(path: Path, place: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_state_comes_back_as_it_was(tmp_path):
    state = RunState(step=7, best_step=5, best_loss=0.1 + 0.2, window=[[3.0, 1 / 3]], corpus={"sha256": "a"})
    folder = write(tmp_path, 7)
    (folder / STATE).write_bytes(json_bytes(asdict(state)))
    (folder / SUMS).write_bytes(sums_bytes({path.name: sha256(path) for path in folder.iterdir() if path.name != SUMS}))
    assert validate(folder) == state


@pytest.mark.parametrize("name", ["weights.pt", STATE, SUMS])
@pytest.mark.parametrize("spoil", [
    flip, lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(path.read_bytes() + b"x")])
def test_any_change_of_any_file_is_found(tmp_path, name, spoil):
    folder = write(tmp_path, 3)
    spoil(folder / name)
    with pytest.raises(CheckpointError):
        validate(folder)


def test_every_changed_byte_of_the_list_itself_is_found(tmp_path):
    folder = write(tmp_path, 3)
    for place in range((folder / SUMS).stat().st_size):
        flip(folder / SUMS, place)
        with pytest.raises(CheckpointError):
            check_sums(folder, fix="")
        flip(folder / SUMS, place)
    check_sums(folder, fix="")


def test_a_file_that_is_not_in_the_list_is_found(tmp_path):
    folder = write(tmp_path, 3)
    (folder / "more.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"'more\.pt' is not in SHA256SUMS"):
        validate(folder)


def test_the_newest_whole_one_is_taken_and_the_others_are_told(tmp_path):
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    flip(tmp_path / checkpoint_name(40) / "weights.pt")
    (tmp_path / checkpoint_name(30) / SUMS).unlink()
    (tmp_path / ".tmp-step-00000050").mkdir()
    state, skipped = newest_valid(tmp_path)
    assert state is not None
    assert state.step == 20
    assert [line.split()[0] for line in skipped] == ["step-00000050", "step-00000040", "step-00000030"]


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    flip(write(tmp_path, 10) / STATE)
    assert newest_valid(tmp_path)[0] is None


def test_a_step_is_found_by_best_latest_and_number(tmp_path):
    for step in (10, 20):
        write(tmp_path / "checkpoints", step)
    assert find(tmp_path, "latest").name == find(tmp_path, "best").name == checkpoint_name(20)   # no pointer yet
    (tmp_path / "checkpoints" / LATEST).write_text(f"{checkpoint_name(20)}\n")
    (tmp_path / "checkpoints" / BEST).write_text(f"{checkpoint_name(10)}\n")
    found = [find(tmp_path, step).name for step in ("best", "latest", "20")]
    assert found == [checkpoint_name(step) for step in (10, 20, 20)]
    with pytest.raises(CheckpointError, match="choose best, latest or one of: 10, 20"):
        find(tmp_path, "15")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find(tmp_path / "elsewhere", "best")


@pytest.mark.parametrize("content", [b"", b"step-00000030\n", b"\xff\x00", b"..\n"])
def test_a_damaged_pointer_is_told(tmp_path, content):
    write(tmp_path / "checkpoints", 10)
    (tmp_path / "checkpoints" / BEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"it names no checkpoint: .*best\); give one of the steps 10 by"):
        find(tmp_path, "best")
    assert find(tmp_path, "10").name == checkpoint_name(10)


def test_a_newer_versions_checkpoint_is_neither_read_nor_passed_over(tmp_path):
    write(tmp_path, 10)
    folder = write(tmp_path, 20)
    content = asdict(RunState(step=20, versions={"scgpt-pretrain": "9.1"})) | {"moon_phase": 0.5}
    (folder / STATE).write_bytes(json_bytes(content))
    (folder / SUMS).write_bytes(sums_bytes({path.name: sha256(path) for path in folder.iterdir() if path.name != SUMS}))
    with pytest.raises(ConfigError, match=r"newer version, which remembers moon_phase.*install.*scgpt-pretrain 9\.1"):
        newest_valid(tmp_path)


def test_the_state_is_plain_json(tmp_path):
    text = (write(tmp_path, 3) / STATE).read_text()
    assert json.loads(text)["step"] == 3
