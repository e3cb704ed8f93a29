import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from scgpt import files
from scgpt.data import arrow_format, verify_corpus
from scgpt.data.convert import ConvertConfig, convert
from scgpt.errors import ConfigError, DataError

from .cells import random_cells, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", {"train": [random_cells([5, 9, 1]), random_cells([3] * 9, seed=1, source="b")]})
    return tmp_path / "corpus"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_known_of_a_split_and_of_the_sources_stays(corpus: Path):
    before = verify_corpus(corpus)
    split = before.splits["train"].model_copy(update={"groups": ["d0", "d1"]})
    before = before.model_copy(update={"splits": {"train": split}})
    before.write(corpus)
    after = convert(corpus, corpus.with_name("out"), ConvertConfig(form="zarr", compression="lz4"))
    assert after.splits["train"].groups == ["d0", "d1"]
    assert (after.sources, after.plan_sha256, after.vocab) == (before.sources, before.plan_sha256, before.vocab)
    assert [part.cells for part in after.splits["train"].parts] == [3, 9]


def test_a_damaged_corpus_is_not_converted(corpus: Path):
    path = corpus / "train" / "part-00001.arrow"
    content = path.read_bytes()
    path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    with pytest.raises(DataError, match="sha256 is not the manifest's"):
        convert(corpus, corpus.with_name("out"), ConvertConfig(form="zarr"))
    assert names(corpus.parent) == ["corpus"]


@pytest.mark.parametrize("form", ["arrow", "zarr"])
def test_a_disk_that_fills_up_leaves_nothing(corpus: Path, monkeypatch: pytest.MonkeyPatch, form: str):
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    monkeypatch.setattr(arrow_format, "write_shard", fail)
    monkeypatch.setattr("scgpt.data.zarr_format.write_bytes", fail)
    with pytest.raises(DataError, match="cannot be written: No space left on device .*nothing was left"):
        convert(corpus, corpus.with_name("out"), ConvertConfig(form=form))
    assert names(corpus.parent) == ["corpus"]


def test_what_is_there_is_not_touched_and_what_a_killed_attempt_left_goes(corpus: Path):
    out = corpus.with_name("out")
    process = multiprocessing.get_context("spawn").Process(target=_leave, args=(out,))
    process.start()
    process.join(60)
    assert len(names(corpus.parent)) == 2
    convert(corpus, out, ConvertConfig(form="zarr"))
    assert names(corpus.parent) == ["corpus", "out"]
    with pytest.raises(ConfigError, match="exists already"):
        convert(corpus, out, ConvertConfig())


def _leave(out: Path) -> None:
    files.temporary_path(out).mkdir()
