import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.plan import make_plan
from data_pipeline.sources import Location, hdf5_structure, open_source
from data_pipeline.sources.hdf5_structure import check_structure
from scgpt.errors import ScgptError, SourceError
from tests.data_pipeline.atlases import BLOOD, CHR21, PANCREAS, config_of, random_counts, write_h5ad


@pytest.fixture(scope="module", autouse=True)
def _little_patience() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hdf5_structure, "LIMIT_S", 2.0)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_h5ad(tmp_path_factory.mktemp("whole") / "a.h5ad", random_counts(1, 30, 20),
                      obs={"text": ["x", "y", "z"] * 10})


@pytest.mark.parametrize("path", [PANCREAS, BLOOD, CHR21, Path(__file__), Path("/nowhere"), Path("/tmp")])
def test_sound_files_and_no_files_pass(path: Path) -> None:
    check_structure(Location.of(path))


def test_a_file_that_the_library_reads_for_ever_is_one_sentence(whole: Path, tmp_path: Path) -> None:
    """Texts of length 0 in the heap of attributes: HDF5 turns in a circle."""
    content = bytearray(whole.read_bytes())
    heap = content.find(b"GCOL")
    content[heap + 16:heap + 600:8] = bytes(73)
    path = tmp_path / "poor.h5ad"
    path.write_bytes(content)
    with pytest.raises(SourceError, match="reading its structure does not end within 2 s .*poor.h5ad"):
        make_plan(config_of(path))


def test_a_child_that_the_library_ends_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_structure, "_walk", lambda *arguments: os.kill(os.getpid(), signal.SIGSEGV))
    with pytest.raises(SourceError, match="reading its structure ends the HDF5 library"):
        check_structure(Location.of(BLOOD))


def test_chunks_beyond_the_end_are_told_before_any_work(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "poor.h5ad"
    shutil.copy(PANCREAS, path)
    with h5py.File(path) as file:
        chunks = file["X/data"].id
        place = chunks.get_chunk_info(chunks.get_num_chunks() // 2).byte_offset
    content = bytearray(path.read_bytes())
    address = place.to_bytes(8, "little")
    held = content.find(address)
    content[held:held + 8] = (len(content) * 3).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(SourceError, match="1 chunk of /X/data lies beyond its end.*poor.h5ad"):
        make_plan(config_of(path))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_random_bytes_in_a_file_give_an_error_or_values(tmp_path_factory: pytest.TempPathFactory, whole: Path,
                                                        seed: int, n_bytes: int) -> None:
    path = tmp_path_factory.mktemp("g") / "a.h5ad"
    draw = np.random.default_rng(seed)
    content = bytearray(whole.read_bytes())
    for place in draw.integers(0, len(content), n_bytes):
        content[place] = draw.integers(256)
    path.write_bytes(content)
    try:
        check_structure(Location.of(path))
        with open_source(path) as source:
            rows = source.read_rows(0, source.n_cells)
            source.gene_names()
            assert rows.shape == (source.n_cells, source.n_genes)
    except ScgptError as error:
        assert str(path) in str(error)  # noqa: PT017 some damage does not show
