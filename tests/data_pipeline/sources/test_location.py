import hashlib
import os
from pathlib import Path

import pytest

from data_pipeline.sources import Location
from data_pipeline.sources.storage import CENSUS
from scgpt.errors import ConfigError, SourceError
from tests.data_pipeline.sources.places import put, root
from tests.data_pipeline.sources.range_server import serve_ranges

__all__ = ["root"]   # a fixture
BIG = os.urandom(3 << 20)


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


def test_a_file_is_found_and_read(root: Location) -> None:
    place = root / "deep/a.h5ad"
    assert not place.exists()
    put(place, BIG)
    assert place.exists()
    assert not place.is_folder()
    assert (root / "deep").is_folder()
    with place.open() as stream:
        stream.seek(2_000_000)
        assert stream.read(100) == BIG[2_000_000:2_000_100]
    assert place.read_spans([(5, 9), (0, 0), (len(BIG) - 3, len(BIG))]) == [BIG[5:9], b"", BIG[-3:]]
    assert place.file_sha256() == hashlib.sha256(BIG).hexdigest()
    assert [entry.name for entry in place.files()] == ["a.h5ad"]


def test_a_folder_is_its_files(root: Location) -> None:
    place = root / "a.zarr"
    for name, content in {"zarr.json": b"{}", "X/c/1": b"two", "X/c/0": b"one"}.items():
        put(place / name, content)
    assert [(entry.name, entry.bytes) for entry in place.files()] == [("X/c/0", 3), ("X/c/1", 3), ("zarr.json", 2)]
    assert place.names() == ["X", "zarr.json"]
    assert place.exists()


def test_globs_are_expanded_in_order_and_brackets_in_names_are_kept(root: Location) -> None:
    for name in ("b.h5ad", "a.h5ad", "c/d.h5ad", "c.txt", "odd[1].h5ad"):
        put(root / name, b"x")
    assert [place.name for place in (root / "*.h5ad").expand()] == ["a.h5ad", "b.h5ad", "odd[1].h5ad"]
    assert [place.name for place in (root / "**/*.h5ad").expand()] == ["a.h5ad", "b.h5ad", "d.h5ad", "odd[1].h5ad"]
    assert all(place.exists() for place in (root / "*.h5ad").expand())
    assert (root / "odd[1].h5ad").expand() == [root / "odd[1].h5ad"]
    assert (root / "none*").expand() == []
    assert (root / "not-there").expand() == [root / "not-there"]


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
        for look in (place.files, place.check):
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
