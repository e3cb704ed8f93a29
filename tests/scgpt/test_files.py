import multiprocessing
import os
from pathlib import Path

import pytest

from scgpt import files
from scgpt.errors import DataError


def test_a_published_file_is_whole_or_absent(tmp_path: Path):
    path = tmp_path / "a.json"
    with pytest.raises(RuntimeError), files.publish(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    files.write_json(path, {"b": 1})
    with pytest.raises(RuntimeError), files.publish(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == '{\n "b": 1\n}\n'
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_published_folder_is_whole_or_absent(tmp_path: Path):
    with files.publish(tmp_path / "release") as temporary:
        (temporary / "deep").mkdir(parents=True)
        (temporary / "deep" / "x").write_bytes(b"1")
        assert not (tmp_path / "release").exists()
    assert (tmp_path / "release" / "deep" / "x").read_bytes() == b"1"
    assert len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_a_killed_attempt_are_told_from_finished_work(tmp_path: Path):
    files.temporary_path(tmp_path / "a").write_bytes(b"half")
    (tmp_path / "b").write_bytes(b"whole")
    files.remove_temporaries(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_what_a_killed_process_left_of_one_target_goes_and_nothing_else(tmp_path: Path):
    process = multiprocessing.get_context("spawn").Process(target=_leave, args=(tmp_path / "release",))
    process.start()
    process.join(30)
    ours = [files.temporary_path(tmp_path / "release"), files.temporary_path(tmp_path / "old-release")]
    for path in ours:
        path.mkdir()
    (tmp_path / f"{files.TEMPORARY_PREFIX}elsewhere-1-00000000-release").mkdir()
    (tmp_path / "release").mkdir()
    before = set(tmp_path.iterdir())
    files.remove_abandoned(tmp_path / "release")
    gone = before - set(tmp_path.iterdir())
    assert len(gone) == 1
    assert f"-{process.pid}-" in gone.pop().name


def _leave(path: Path) -> None:
    files.temporary_path(path).mkdir()


def _hold(path: Path, ready, done) -> None:
    with files.lock(path, holder="a test", fix="wait"):
        ready.set()
        done.wait(30)


def test_a_lock_is_refused_while_held_and_gone_with_its_process(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / ".lock", ready, done))
    process.start()
    assert ready.wait(30)
    with pytest.raises(DataError, match="a test is already at work here"), \
            files.lock(tmp_path / ".lock", holder="a test", fix="wait"):
        pass
    os.kill(process.pid, 9)
    process.join(30)
    with files.lock(tmp_path / ".lock", holder="a test", fix="wait"):
        pass


def test_sha256_reads_files_longer_than_one_piece(tmp_path: Path):
    import hashlib

    content = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(content)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
