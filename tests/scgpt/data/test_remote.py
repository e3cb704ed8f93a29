"""Corpora behind real servers: a web server that sends ranges, and (slow) an S3 server, read as from a disk."""
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from scgpt.data import RaggedBatch, TokenDataset, verify_corpus, zarr_format
from scgpt.data.convert import ConvertConfig, convert
from scgpt.errors import DataError
from tests.data_pipeline.sources.range_server import serve_ranges
from tests.s3_server import bucket_named

from .cells import random_cells, same_cells, write_corpus

FORMS = [("arrow", "none"), ("arrow", "zstd"), ("zarr", "none"), ("zarr", "lz4")]
PARTS = [random_cells([30] * 50), random_cells([7] * 30, seed=1, source="b")]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_corpus(folder / "plain", {"train": PARTS}, max_batch_values=400)
    for form, compression in FORMS:
        convert(folder / "plain", folder / f"{form}-{compression}", ConvertConfig(form=form, compression=compression))
    return folder


@pytest.fixture(scope="module")
def bucket(corpora: Path) -> Iterator[str]:
    """The corpora in a bucket of an S3 server on this machine; where it is stands in the environment."""
    import s3fs

    with bucket_named("corpora") as url:
        s3fs.S3FileSystem().put(f"{corpora}/", "corpora/", recursive=True)
        yield url


def holds_the_cells(url: str) -> None:
    dataset, whole = TokenDataset.open(url), RaggedBatch.concatenate(PARTS)
    order = np.random.default_rng(0).permutation(len(whole))[:20]
    same_cells(dataset.fetch(order), whole.take(order))
    assert np.array_equal(dataset.lengths, whole.lengths)
    same_cells(dataset.fetch(np.arange(80)), whole)
    assert dataset.codes("donor")[1] == ["d0", "d1", "d2"]
    assert dataset.vocab["g7"] == 7
    verify_corpus(url, deep=True)


@pytest.mark.parametrize(("form", "compression"), FORMS)
def test_a_corpus_on_a_web_server_is_the_one_on_the_disk(corpora: Path, form: str, compression: str) -> None:
    with serve_ranges() as web:
        folder = corpora / f"{form}-{compression}"
        web.files.update({path.relative_to(corpora).as_posix(): path.read_bytes()
                            for path in folder.rglob("*") if path.is_file()})
        holds_the_cells(f"{web.url}/{folder.name}")


@pytest.mark.parametrize("compression", ["none", "lz4"])
def test_a_part_of_a_zarr_shard_is_read_from_a_web_server(corpora: Path, tmp_path: Path, compression: str,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Then zarr first asks for the last bytes of the file, where a shard says what is where."""
    monkeypatch.setattr(zarr_format, "CHUNK_ITEMS", 64)
    convert(corpora / "plain", tmp_path / "chunked", ConvertConfig(form="zarr", compression=compression))
    with serve_ranges() as web:
        web.files.update({path.relative_to(tmp_path).as_posix(): path.read_bytes()
                          for path in tmp_path.rglob("*") if path.is_file()})
        dataset, cells = TokenDataset.open(f"{web.url}/chunked"), np.array([70, 3])
        before = web.bytes_sent
        same_cells(dataset.fetch(cells), RaggedBatch.concatenate(PARTS).take(cells))
        assert web.bytes_sent - before < 3 * (tmp_path / "chunked/train.zarr/genes/c/0").stat().st_size


def test_a_web_server_that_knows_no_parts_of_files_is_told_as_one(corpora: Path) -> None:
    with serve_ranges() as web:
        web.ranges = False
        web.files.update({path.relative_to(corpora).as_posix(): path.read_bytes()
                          for path in (corpora / "arrow-none").rglob("*") if path.is_file()})
        with pytest.raises(DataError, match="sends a whole file.*range requests, or copy it"):
            TokenDataset.open(f"{web.url}/arrow-none")


def test_what_cannot_be_reached_is_not_told_to_be_no_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no credentials")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem._open", refuse)
    with pytest.raises(DataError, match="^the file cannot be read: no credentials .*check the path, its permissions"):
        TokenDataset.open("memory://anywhere")


@pytest.mark.slow
@pytest.mark.parametrize(("form", "compression"), FORMS)
def test_a_corpus_on_s3_is_the_one_on_the_disk(bucket: str, form: str, compression: str) -> None:
    holds_the_cells(f"{bucket}/{form}-{compression}")


@pytest.mark.slow
def test_a_corpus_is_converted_from_s3_and_faults_there_are_one_sentence(bucket: str, corpora: Path, tmp_path: Path,
                                                                         ) -> None:
    import s3fs

    convert(f"{bucket}/zarr-lz4", tmp_path / "here", ConvertConfig(form="arrow"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "here" / "train").iterdir()} == {
        path.name: path.read_bytes() for path in (corpora / "arrow-none" / "train").iterdir()}
    system = s3fs.S3FileSystem()
    system.rm(f"{bucket}/zarr-none/train.zarr/genes/c/0")
    system.pipe_file(f"{bucket}/arrow-none/stray", b"x")
    for url, says in ((f"{bucket}/none", "not a corpus: the file 'manifest.json' is missing"),
                      (f"{bucket}/zarr-none", "a file is missing|is missing"),
                      (f"{bucket}/arrow-none", "'stray' does not belong"),
                      ("s3://no-such-bucket/a", "not a corpus.*check the address and the connection")):
        with pytest.raises(DataError, match=says) as caught:
            verify_corpus(url)
        assert "\n" not in str(caught.value)
        assert "s3cret" not in str(caught.value)
    with pytest.raises(DataError, match="missing"):
        TokenDataset.open(f"{bucket}/zarr-none")
