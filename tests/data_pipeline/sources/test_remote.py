"""Sources behind URLs: fsspec's memory, a web server, and (slow) an S3 server, read as from a disk."""
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from scipy import sparse

from data_pipeline.plan import check_unchanged, make_plan
from data_pipeline.sources import Location
from data_pipeline.sources.identity import sha256_of
from scgpt.data import Manifest
from scgpt.errors import ScgptError, SourceError
from tests.data_pipeline.atlases import (
    BLOOD,
    PANCREAS,
    build_here,
    bytes_of,
    cells_of,
    config_of,
    random_counts,
    write_h5ad,
    write_zarr,
)
from tests.data_pipeline.sources.range_server import Served, serve_ranges
from tests.s3_server import bucket_named

KINDS = {"h5ad": write_h5ad, "zarr": write_zarr}


@pytest.fixture
def lake() -> Iterator[Location]:
    system = fsspec.filesystem("memory")
    system.makedirs("/lake", exist_ok=True)
    yield Location.of("memory://lake")
    system.rm("/lake", recursive=True)


@pytest.fixture(scope="module")
def web() -> Iterator[Served]:
    with serve_ranges() as served:
        yield served


def upload(path: Path, lake: Location) -> Location:
    """A file or folder into fsspec's memory."""
    place = lake / path.name
    fsspec.filesystem("memory").put(str(path), place.url, recursive=path.is_dir())
    return place


@pytest.fixture(scope="module")
def counts() -> sparse.csr_matrix:
    return random_counts(3, 80, 50)


@pytest.mark.parametrize("kind", KINDS)
def test_a_remote_corpus_is_the_local_one(tmp_path: Path, lake: Location, counts: sparse.csr_matrix,
                                          kind: str) -> None:
    path = KINDS[kind](tmp_path / f"a.{kind}", counts, obs={"donor": ["x", "y"] * 40})
    place = upload(path, lake)
    local, remote = make_plan(config_of(path)), make_plan(config_of(place.url))
    assert local.sha256 == remote.sha256
    build_here(config_of(path), tmp_path / "one")
    manifest = build_here(config_of(place.url), tmp_path / "other")
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "other")
    assert manifest.sources[0].sha256 == sha256_of(Location.of(path))


def test_a_glob_of_urls_is_as_many_sources(tmp_path: Path, lake: Location, counts: sparse.csr_matrix) -> None:
    upload(write_h5ad(tmp_path / "b.h5ad", counts), lake)
    upload(write_zarr(tmp_path / "a.zarr", counts), lake)
    plan = make_plan(config_of(f"{lake.url}/*"))
    assert [(source.name, source.kind) for source in plan.sources] == [("a", "zarr"), ("b", "h5ad")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_remote_source_that_changes_after_the_plan_is_refused(tmp_path: Path, lake: Location,
                                                                counts: sparse.csr_matrix, kind: str) -> None:
    place = upload(KINDS[kind](tmp_path / f"a.{kind}", counts), lake)
    source = make_plan(config_of(place.url)).sources[0]
    check_unchanged(source)
    system = fsspec.filesystem("memory")
    changed = place.url if kind == "h5ad" else f"{place.url}/obs/_index/c/0"
    content = system.cat_file(changed)
    system.pipe_file(changed, content)   # the same bytes, written anew
    with pytest.raises(SourceError, match="changed while the corpus was being built.*a\\."):
        check_unchanged(source)
    system.rm(changed)
    with pytest.raises(SourceError, match="changed"):
        check_unchanged(source)


def test_an_atlas_on_a_web_server_is_read_by_parts(tmp_path: Path, web: Served) -> None:
    web.files = {"atlas/blood.h5ad": BLOOD.read_bytes()}
    url = f"{web.url}/atlas/blood.h5ad?Signature=s3cret"
    build_here(config_of({"path": str(BLOOD), "name": "blood"}), tmp_path / "one")
    build_here(config_of(url), tmp_path / "other")
    assert cells_of(tmp_path / "one") == cells_of(tmp_path / "other")
    assert not [name for name, content in bytes_of(tmp_path / "other").items() if b"s3cret" in content]
    plan = make_plan(config_of(url))
    check_unchanged(plan.sources[0])
    web.files["atlas/blood.h5ad"] = BLOOD.read_bytes()[:-1] + b"x"
    with pytest.raises(SourceError, match="changed") as caught:
        check_unchanged(plan.sources[0])
    assert "s3cret" not in str(caught.value)


def test_planning_reads_only_headers_and_edges(tmp_path: Path, web: Served) -> None:
    draw = np.random.default_rng(0)
    matrix = sparse.random(6000, 1000, 0.9, "csr", np.float32, draw, lambda size: draw.integers(1, 60000, size))
    content = write_h5ad(tmp_path / "a.h5ad", matrix).read_bytes()
    assert len(content) > 16 << 20
    web.files, web.bytes_sent = {"a.h5ad": content}, 0
    plan = make_plan(config_of(f"{web.url}/a.h5ad"))
    assert plan.n_values == matrix.nnz
    assert web.bytes_sent < 10 << 20   # 2 MiB of edges; the rest is blocks of 1 MiB in which something of use lies


@pytest.mark.parametrize("n_bytes", [None, 3 << 19])   # all of it; 1.5 MiB, of which the edges are the whole
def test_a_server_that_sends_no_parts_is_told(web: Served, n_bytes: int | None) -> None:
    web.files, web.ranges = {"a.h5ad": PANCREAS.read_bytes()[:n_bytes]}, False
    try:
        with pytest.raises(SourceError, match="sends no parts of a file.*download it first"):
            make_plan(config_of(f"{web.url}/a.h5ad"))
        with pytest.raises(SourceError, match="sends no parts of a file.*download it first"):
            Location.of(f"{web.url}/a.h5ad").open()
    finally:
        web.ranges = True


@pytest.mark.parametrize(("place", "message"), [
    ("{web}/none.h5ad", "no such file"), ("{lake}/none.h5ad", "no such file"), ("{lake}/*.none", "no file matches"),
    ("{lake}/poor.h5ad", "not an HDF5 file"), ("{lake}/cut.h5ad", "damaged HDF5|cannot be read"),
    ("nowhere://a/b.h5ad", "nowhere"), ("{lake}/poor.zarr", "not a Zarr group")])
def test_bad_remote_input_is_one_sentence(web: Served, lake: Location, place: str, message: str) -> None:
    system = fsspec.filesystem("memory")
    system.pipe({f"{lake.url}/poor.h5ad": b"hello", f"{lake.url}/cut.h5ad": PANCREAS.read_bytes()[:-3000],
                 f"{lake.url}/poor.zarr/zarr.json": b"{"})
    url = place.format(web=web.url, lake=lake.url)
    with pytest.raises(ScgptError, match=message) as caught:
        make_plan(config_of(url))
    assert "\n" not in str(caught.value)
    assert caught.value.fix


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """`s3://BUCKET` of an S3 server on this machine; where it is stands in the environment, as for any user."""
    with bucket_named("lake") as url:
        yield url


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_build_from_s3_is_the_local_one_whoever_does_it(tmp_path: Path, bucket: str, counts: sparse.csr_matrix,
                                                   kind: str) -> None:
    import s3fs

    from data_pipeline.execute import build

    path = KINDS[kind](tmp_path / f"{kind}.{kind}", counts)
    system = s3fs.S3FileSystem()
    system.put(str(path), f"{bucket}/{path.name}", recursive=path.is_dir())
    config = config_of(f"{bucket}/{path.name}", workers="ray")
    build(config, tmp_path / "remote")
    build(config.model_copy(update={"workers": "threads"}), tmp_path / "threads")
    assert bytes_of(tmp_path / "remote") == bytes_of(tmp_path / "threads")
    build_here(config_of(path), tmp_path / "local")
    remote, local = bytes_of(tmp_path / "remote"), bytes_of(tmp_path / "local")
    known = [Manifest.read(tmp_path / name).sources[0] for name in ("remote", "local")]
    assert [(source.etag is None, source.sha256 is None) for source in known] == [(False, True), (True, False)]
    assert remote.pop("manifest.json") != local.pop("manifest.json")   # by these, and nothing else
    assert remote == local
    source = make_plan(config).sources[0]
    check_unchanged(source)
    changed = f"{bucket}/{path.name}" if kind == "h5ad" else f"{bucket}/{path.name}/zarr.json"
    system.pipe_file(changed, system.cat_file(changed) + b" ")
    with pytest.raises(SourceError, match="changed"):
        check_unchanged(source)


@pytest.mark.slow
def test_what_s3_refuses_is_one_sentence(bucket: str) -> None:
    for url in (f"{bucket}/none.h5ad", "s3://no-such-bucket/a.h5ad"):
        with pytest.raises(SourceError, match="no such file|cannot be read") as caught:
            make_plan(config_of(url))
        assert "\n" not in str(caught.value)
        assert "s3cret" not in str(caught.value)
