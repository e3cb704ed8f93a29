import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_pipeline.sources import Location
from data_pipeline.sources.storage import CENSUS, Entry
from scgpt.errors import ConfigError, SourceError
from scgpt.files import sha256
from tests.data_pipeline.sources.range_server import serve_ranges

BIG = os.urandom(3 << 20)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    """An empty folder, on the disk and in fsspec's memory."""
    if request.param == "local":
        yield Location.of(tmp_path)
        return
    system = fsspec.filesystem("memory")
    system.makedirs("/lake", exist_ok=True)
    yield Location.of("memory://lake")
    system.rm("/lake", recursive=True)


def put(place: Location, content: bytes) -> Location:
    if place.is_remote:
        fsspec.filesystem("memory").pipe(place.url, content)
    else:
        place.path.parent.mkdir(parents=True, exist_ok=True)
        place.path.write_bytes(content)
    return place


def take(place: Location) -> None:
    if place.is_remote:
        fsspec.filesystem("memory").rm(place.url)
    else:
        place.path.unlink()


@pytest.mark.parametrize(("given", "name", "stem"), [
    ("s3://lake/a/lung.v2.h5ad", "lung.v2.h5ad", "lung.v2"), ("s3://lake/heart.zarr/", "heart.zarr", "heart"),
    ("atlas/cellranger-3.0.0_matrix", "cellranger-3.0.0_matrix", "cellranger-3.0.0_matrix"),
    ("a.zarr.zip", "a.zarr.zip", "a"), ("gs://b/.h5ad", ".h5ad", ".h5ad"),
    ("https://host/a.h5ad?X-Amz-Signature=secret", "a.h5ad", "a")])
def test_a_source_is_named_by_its_file(given: str, name: str, stem: str) -> None:
    assert (Location.of(given).name, Location.of(given).stem) == (name, stem)


def test_paths_are_absolute_and_file_urls_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Location.of("a.h5ad") == Location.of(tmp_path / "a.h5ad") == Location.of(f"file://{tmp_path}/a.h5ad")
    assert Location.of("a.h5ad").path == tmp_path / "a.h5ad"
    assert Location.of("S3://lake//a").url == "s3://lake//a"
    with pytest.raises(ConfigError, match="only a local path"):
        _ = Location.of("s3://lake/a").path


@pytest.mark.parametrize("url", ["https://host/a.h5ad?X-Amz-Signature=s3cret", "https://me:s3cret@host/a.h5ad",
                                 "https://s3cret@host/a.h5ad#s3cret", "ftp://me:s3cret@host/a.h5ad"])
def test_no_secret_of_a_url_is_shown(url: str) -> None:
    place = Location.of(url)
    assert place.url == url
    for shown in (str(place), repr(place), place.name, place.cause(ValueError(f"cannot open {url} at all")),
                  place.cause(OSError(f"no {url}"))):
        assert "s3cret" not in shown
    assert str(place).endswith("host/a.h5ad")


def test_a_file_is_read_hashed_and_watched(root: Location) -> None:
    place = root / "deep/a.h5ad"
    assert not place.exists()
    put(place, BIG)
    assert place.exists()
    assert not place.is_folder()
    assert (root / "deep").is_folder()
    with place.open() as stream:
        stream.seek(2_000_000)
        assert stream.read(100) == BIG[2_000_000:2_000_100]
    found = pickle.loads(pickle.dumps(place)).fingerprint()
    assert found.bytes == len(BIG)
    assert found.edges_sha256 == hashlib.sha256(BIG[:1 << 20] + BIG[-(1 << 20):]).hexdigest()
    assert place.sha256() == hashlib.sha256(BIG).hexdigest()
    assert [entry.name for entry in place.files()] == ["a.h5ad"]
    assert place.state() == found.state
    put(place, BIG)   # equal content, written anew
    assert place.state() != found.state
    assert place.fingerprint().edges_sha256 == found.edges_sha256
    take(place)
    with pytest.raises(SourceError, match="no such file"):
        place.state()


def test_a_folder_is_the_sum_of_its_files(root: Location) -> None:
    place = root / "a.zarr"
    for name, content in {"zarr.json": b"{}", "X/c/1": b"two", "X/c/0": b"one"}.items():
        put(place / name, content)
    assert [(entry.name, entry.bytes) for entry in place.files()] == [("X/c/0", 3), ("X/c/1", 3), ("zarr.json", 2)]
    assert place.names() == ["X", "zarr.json"]
    assert place.exists()
    found, digest = place.fingerprint(), place.sha256()
    parts = {"X/c/0": b"one", "X/c/1": b"two", "zarr.json": b"{}"}
    assert digest == hashlib.sha256("".join(
        f"{name}\0{hashlib.sha256(content).hexdigest()}\n" for name, content in parts.items()).encode()).hexdigest()
    put(place / "X/c/1", b"TWO")
    assert place.fingerprint().edges_sha256 != found.edges_sha256
    assert place.sha256() != digest
    put(place / "X/c/1", b"two")
    assert (place.fingerprint().edges_sha256, place.sha256()) == (found.edges_sha256, digest)
    state = place.state()
    take(place / "X/c/0")
    assert place.state() != state


def test_the_same_content_has_one_fingerprint_wherever_it_lies(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    local, remote = Location.of(tmp_path / "a"), Location.of("memory://elsewhere/b")
    for number in range(50):
        put(local / f"c/{number}", bytes([number]) * (number + 1) * 4000)
        put(remote / f"c/{number}", bytes([number]) * (number + 1) * 4000)
    assert local.fingerprint().edges_sha256 == remote.fingerprint().edges_sha256
    assert local.sha256() == remote.sha256()
    system.rm("/elsewhere", recursive=True)


def test_etags_stand_for_the_content_where_every_file_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Location.of(tmp_path / "a")
    for name in ("b", "c"):
        put(place / name, b"one")
    assert place.identity() == {"sha256": place.sha256()}
    entries = [Entry("b", 3, "s", '"1"'), Entry("c", 3, "s", '"2"')]
    monkeypatch.setattr(Location, "files", lambda place: entries if place.is_folder() else entries[:1])
    assert place.identity() == {"etag": hashlib.sha256(b'b\0"1"\nc\0"2"\n').hexdigest()}
    assert (place / "b").identity() == {"etag": "1"}
    entries[1] = Entry("c", 3, "s")
    assert "sha256" in place.identity()


def test_globs_are_expanded_in_order_and_brackets_in_names_are_kept(root: Location) -> None:
    for name in ("b.h5ad", "a.h5ad", "c/d.h5ad", "c.txt", "odd[1].h5ad"):
        put(root / name, b"x")
    assert [place.name for place in (root / "*.h5ad").expand()] == ["a.h5ad", "b.h5ad", "odd[1].h5ad"]
    assert [place.name for place in (root / "**/*.h5ad").expand()] == ["a.h5ad", "b.h5ad", "d.h5ad", "odd[1].h5ad"]
    assert all(place.exists() for place in (root / "*.h5ad").expand())
    assert (root / "odd[1].h5ad").expand() == [root / "odd[1].h5ad"]
    assert (root / "none*").expand() == []
    assert (root / "not-there").expand() == [root / "not-there"]


def test_an_empty_file_and_an_empty_folder_have_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    assert Location.of(tmp_path / "empty").fingerprint().edges_sha256 == hashlib.sha256(b"").hexdigest()
    assert Location.of(tmp_path / "folder").fingerprint().bytes == 0
    assert Location.of(tmp_path / "empty").sha256() == sha256(tmp_path / "empty")


def test_links_below_a_folder_are_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0").write_bytes(b"far")
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "c").symlink_to(tmp_path / "elsewhere")
    assert [entry.name for entry in Location.of(tmp_path / "a.zarr").files()] == ["c/0"]
    (tmp_path / "a.zarr" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="no such file.*a.zarr/gone"):
        Location.of(tmp_path / "a.zarr").files()


@pytest.mark.parametrize(("url", "error", "message"), [
    ("nowhere://bucket/a.h5ad", ConfigError, "no storage is known as nowhere://"),
    ("http://127.0.0.1:9/a.h5ad", SourceError, "http://127.0.0.1:9/a.h5ad")])
def test_what_cannot_be_reached_is_one_sentence(url: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        Location.of(url).files()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("status", "message"), [
    (404, "there is no such file"), (410, "there is no such file"), (403, "cannot be read: 403.*the credentials"),
    (500, "cannot be read: 500.*check the address"), (503, "cannot be read: 503")])
def test_a_server_that_refuses_is_not_taken_for_one_without_the_file(status: int, message: str) -> None:
    with serve_ranges() as served:
        served.files["a.h5ad"], served.status = b"x" * 100, status
        place = Location.of(f"{served.url}/a.h5ad?signature=s3cret")
        for look in (place.fingerprint, place.check):
            with pytest.raises(SourceError, match=message) as caught:
                look()
            assert "s3cret" not in str(caught.value)
        served.status = 200
        assert place.exists()
        assert not Location.of(f"{served.url}/b.h5ad").exists()


@pytest.mark.parametrize(("error", "text"), [
    (KeyError("x"), "x"), (ValueError("no 'x'"), "no 'x'"), (ValueError("'x' and 'y'"), "'x' and 'y'")])
def test_a_cause_keeps_its_quotes(error: Exception, text: str) -> None:
    assert Location.of("/a").cause(error) == text


def test_the_public_bucket_of_the_census_is_read_as_nobody() -> None:
    """No credentials are looked for: who has none can read it, and nobody's are sent."""
    pytest.importorskip("s3fs", reason="the extra [remote] is not installed")
    assert Location.of(f"{CENSUS}cell-census/x").file_system().anon is True
    assert Location.of("s3://another-bucket/x").file_system().anon is False


def test_what_is_neither_file_nor_folder_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.h5ad")   # opening it would wait for ever
    (tmp_path / "b.zarr").mkdir()
    os.mkfifo(tmp_path / "b.zarr" / "c")
    for name in ("a.h5ad", "b.zarr"):
        with pytest.raises(SourceError, match="neither a file nor a folder"):
            Location.of(tmp_path / name).fingerprint()
