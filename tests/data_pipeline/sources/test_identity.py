import hashlib
import os
import pickle
from pathlib import Path

import fsspec
import pytest

from data_pipeline.sources import Location
from data_pipeline.sources.identity import fingerprint, identity_of, sha256_of, state_of
from data_pipeline.sources.storage import Entry
from scgpt.errors import SourceError
from scgpt.files import sha256
from tests.data_pipeline.sources.places import put, root, take

__all__ = ["root"]   # a fixture
BIG = os.urandom(3 << 20)


def test_a_file_is_hashed_and_watched(root: Location) -> None:
    place = root / "deep/a.h5ad"
    put(place, BIG)
    found = fingerprint(pickle.loads(pickle.dumps(place)))
    assert found.bytes == len(BIG)
    assert found.edges_sha256 == hashlib.sha256(BIG[:1 << 20] + BIG[-(1 << 20):]).hexdigest()
    assert sha256_of(place) == hashlib.sha256(BIG).hexdigest()
    assert state_of(place) == found.state
    put(place, BIG)   # equal content, written anew
    assert state_of(place) != found.state
    assert fingerprint(place).edges_sha256 == found.edges_sha256
    take(place)
    with pytest.raises(SourceError, match="no such file"):
        state_of(place)


def test_a_folder_is_the_sum_of_its_files(root: Location) -> None:
    place = root / "a.zarr"
    for name, content in {"zarr.json": b"{}", "X/c/1": b"two", "X/c/0": b"one"}.items():
        put(place / name, content)
    found, digest = fingerprint(place), sha256_of(place)
    parts = {"X/c/0": b"one", "X/c/1": b"two", "zarr.json": b"{}"}
    assert digest == hashlib.sha256("".join(
        f"{name}\0{hashlib.sha256(content).hexdigest()}\n" for name, content in parts.items()).encode()).hexdigest()
    put(place / "X/c/1", b"TWO")
    assert fingerprint(place).edges_sha256 != found.edges_sha256
    assert sha256_of(place) != digest
    put(place / "X/c/1", b"two")
    assert (fingerprint(place).edges_sha256, sha256_of(place)) == (found.edges_sha256, digest)
    state = state_of(place)
    take(place / "X/c/0")
    assert state_of(place) != state


def test_the_same_content_has_one_fingerprint_wherever_it_lies(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    local, remote = Location.of(tmp_path / "a"), Location.of("memory://elsewhere/b")
    for number in range(50):
        put(local / f"c/{number}", bytes([number]) * (number + 1) * 4000)
        put(remote / f"c/{number}", bytes([number]) * (number + 1) * 4000)
    assert fingerprint(local).edges_sha256 == fingerprint(remote).edges_sha256
    assert sha256_of(local) == sha256_of(remote)
    system.rm("/elsewhere", recursive=True)


def test_etags_stand_for_the_content_where_every_file_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Location.of(tmp_path / "a")
    for name in ("b", "c"):
        put(place / name, b"one")
    assert identity_of(place) == {"sha256": sha256_of(place)}
    entries = [Entry("b", 3, "s", '"1"'), Entry("c", 3, "s", '"2"')]
    monkeypatch.setattr(Location, "files", lambda place: entries if place.is_folder() else entries[:1])
    assert identity_of(place) == {"etag": hashlib.sha256(b'b\0"1"\nc\0"2"\n').hexdigest()}
    assert identity_of(place / "b") == {"etag": "1"}
    entries[1] = Entry("c", 3, "s")
    assert "sha256" in identity_of(place)


def test_an_empty_file_and_an_empty_folder_have_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    assert fingerprint(Location.of(tmp_path / "empty")).edges_sha256 == hashlib.sha256(b"").hexdigest()
    assert fingerprint(Location.of(tmp_path / "folder")).bytes == 0
    assert sha256_of(Location.of(tmp_path / "empty")) == sha256(tmp_path / "empty")


def test_what_is_neither_file_nor_folder_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.h5ad")   # opening it would wait for ever
    (tmp_path / "b.zarr").mkdir()
    os.mkfifo(tmp_path / "b.zarr" / "c")
    for name in ("a.h5ad", "b.zarr"):
        with pytest.raises(SourceError, match="neither a file nor a folder"):
            fingerprint(Location.of(tmp_path / name))
