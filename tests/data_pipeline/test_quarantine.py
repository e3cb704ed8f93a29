import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy import sparse

from data_pipeline import plan as planning
from data_pipeline.commit import refuse_mended
from data_pipeline.config import CorpusConfig
from data_pipeline.plan import make_plan
from data_pipeline.quarantine import Quarantined
from data_pipeline.sources.location import Location
from scgpt.data import Manifest, TokenDataset, verify_corpus
from scgpt.errors import ConfigError, SourceError
from tests.data_pipeline.atlases import (
    Here,
    build_here,
    bytes_of,
    cells_of,
    config_of,
    random_counts,
    write_h5ad,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BLOCK_VALUES", 8_000)
    monkeypatch.setattr("data_pipeline.sources.base.PROBE_VALUES", 100)


def good(folder: Path) -> Path:
    return write_h5ad(folder / "poor.h5ad", random_counts(5, 300, 400))


def negative_late(folder: Path) -> Path:
    counts = random_counts(5, 300, 400)
    counts.data[counts.indptr[250]] = -2
    counts.data[counts.indptr[290]] = np.nan
    return write_h5ad(folder / "poor.h5ad", counts)


def broken_chunk(folder: Path) -> Path:
    path = good(folder)
    with h5py.File(path) as file:
        data = file["X/data"]
        place = data.id.get_chunk_info(data.id.get_num_chunks() - 1)
    with path.open("r+b") as stream:
        stream.seek(place.byte_offset + 2)
        stream.write(bytes(max(place.size // 2, 40)))
    return path


def column_beyond(folder: Path) -> Path:
    path = write_h5ad(folder / "poor.h5ad", random_counts(5, 300, 400))
    with h5py.File(path, "r+") as file:
        indices = file["X/indices"][()]
        indices[-5] = 400
        file["X/indices"][...] = indices
    return path


def by_columns(folder: Path) -> Path:
    counts = random_counts(5, 300, 400)
    counts.data[counts.indptr[300] - 1] = 0.5   # of the last column that the cell has
    return write_h5ad(folder / "poor.h5ad", sparse.csc_matrix(counts))


def missing(folder: Path) -> Path:
    return folder / "poor.h5ad"


def no_atlas(folder: Path) -> Path:
    (folder / "poor.h5ad").write_text("a,b\n1,2\n")
    return folder / "poor.h5ad"


def mouse(folder: Path) -> Path:
    return write_h5ad(folder / "poor.h5ad", random_counts(0, 30, 5), ["Lypla1", "Tcea1", "Atp6v1h", "Rgs20", "Rb1cc1"])


LATE = [negative_late, broken_chunk, column_beyond, by_columns]
EARLY = [missing, no_atlas, mouse]


def settings(*sources: Path) -> CorpusConfig:
    return config_of(*sources, on_error="skip", splits={"valid": 0.2})


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two atlases that can be read."""
    folder = tmp_path_factory.mktemp("others")
    return (write_h5ad(folder / "first.h5ad", random_counts(1, 60, 400)),
            write_h5ad(folder / "second.h5ad", random_counts(2, 50, 400)))


@pytest.fixture(scope="module")
def without(others: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of the two alone."""
    out = tmp_path_factory.mktemp("without") / "corpus"
    build_here(settings(*others), out)
    return out


@pytest.mark.parametrize("make", [*EARLY, *LATE])
def test_a_source_that_cannot_be_read_is_left_out_whole_and_told(tmp_path: Path, make: Any, others: tuple[Path, Path],
                                                                 without: Path) -> None:
    first, second = others
    manifest = build_here(settings(first, make(tmp_path), second), tmp_path / "out")
    assert verify_corpus(tmp_path / "out", deep=True) == manifest
    assert manifest.quarantined is not None
    entry, = manifest.quarantined
    assert (entry.name, entry.file) == ("poor", "poor.h5ad")
    assert (entry.cells, entry.sha256 is None) == ((300, False) if make in LATE else (None, True))
    assert str(tmp_path) not in manifest.to_bytes().decode()
    assert [source.name for source in manifest.sources] == ["first", "second"]
    assert cells_of(tmp_path / "out") == cells_of(without)
    for split in ("train", "valid"):   # no cell moves between splits
        ids = [np.sort(TokenDataset.open(corpus, split).obs(["cell_id"]).column(0).to_numpy())
               for corpus in (tmp_path / "out", without)]
        assert np.array_equal(*ids)
    if make in EARLY:
        found, expected = bytes_of(tmp_path / "out"), bytes_of(without)
        assert {name for name in found if found[name] != expected[name]} == {"manifest.json"}


@pytest.mark.parametrize("make", [missing, negative_late, by_columns])
def test_it_ends_the_build_unless_skip_is_asked_for(tmp_path: Path, make: Any, others: tuple[Path, Path]) -> None:
    with pytest.raises(SourceError, match=r"poor\.h5ad"):
        build_here(config_of(others[0], make(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_first_failure_is_told_whoever_is_faster(tmp_path: Path, others: tuple[Path, Path]) -> None:
    config = settings(others[0], negative_late(tmp_path))
    manifest = build_here(config, tmp_path / "out")
    assert manifest.quarantined is not None
    assert manifest.quarantined[0].reason.startswith("row 250 holds -2, ")
    for seed in (1, 2, 3):
        build_here(config, tmp_path / str(seed), workers=Here(seed))
        assert bytes_of(tmp_path / str(seed)) == bytes_of(tmp_path / "out")


def test_where_no_source_can_be_read_there_is_no_corpus(tmp_path: Path) -> None:
    for make in (negative_late, missing):
        poor = make(tmp_path)
        with pytest.raises(SourceError, match=r"row 250 holds -2|poor is left out: there is no such file"):
            build_here(settings(poor), tmp_path / "out")
        assert not (tmp_path / "out" / "manifest.json").exists()
        poor.unlink(missing_ok=True)


@pytest.mark.parametrize("stage_of_change", ["cut", "tokenise"])
def test_a_source_that_changes_in_the_middle_is_left_out(tmp_path: Path, stage_of_change: str,
                                                         others: tuple[Path, Path]) -> None:
    path = write_h5ad(tmp_path / "poor.h5ad", sparse.csc_matrix(random_counts(5, 300, 400)))

    class Touching(Here):
        def run(self, stage: str, *rest: Any) -> list[dict[str, Any]]:
            if stage == stage_of_change:
                os.utime(path, ns=(0, 1))
            return super().run(stage, *rest)

    manifest = build_here(settings(others[0], path), tmp_path / "out", workers=Touching())
    assert manifest.quarantined is not None
    assert "changed while the corpus was being built" in manifest.quarantined[0].reason
    assert manifest.quarantined[0].sha256 is None


def test_what_was_planned_without_a_source_is_another_plan_once_it_is_mended(
        tmp_path: Path, others: tuple[Path, Path]) -> None:
    config = settings(others[0], missing(tmp_path))
    build_here(config, tmp_path / "out")
    good(tmp_path)
    with pytest.raises(ConfigError, match="a corpus of another plan.*--fresh"):
        build_here(config, tmp_path / "out")


def test_damage_between_the_ends_of_a_file_that_is_mended_is_noticed_too(
        tmp_path: Path, others: tuple[Path, Path]) -> None:
    config = settings(others[0], negative_late(tmp_path))
    manifest = build_here(config, tmp_path / "out")
    refuse_mended(make_plan(config), manifest)   # as it was: nothing to say
    with (tmp_path / "poor.h5ad").open("r+b") as stream:
        stream.seek(5000)
        byte = stream.read(1)[0]
        stream.seek(5000)
        stream.write(bytes([byte ^ 1]))
    with pytest.raises(ConfigError, match="'poor' was left out of this corpus and is another now.*--fresh"):
        refuse_mended(make_plan(config), Manifest.read(tmp_path / "out"))
    (tmp_path / "poor.h5ad").unlink()
    refuse_mended(make_plan(config), manifest)   # gone: it was left out anyway


def test_an_unfinished_build_begins_anew_once_a_source_was_touched(tmp_path: Path, others: tuple[Path, Path]) -> None:
    path = negative_late(tmp_path)
    config = settings(others[0], path)

    class Interrupted(Here):
        def run(self, stage: str, *rest: Any) -> list[dict[str, Any]]:
            if stage == "merge":
                raise KeyboardInterrupt
            return super().run(stage, *rest)

    for touch in (False, False, True):
        if touch:
            os.utime(path, ns=(0, 1))
        with pytest.raises(KeyboardInterrupt):
            build_here(config, tmp_path / "out", workers=Interrupted())
        mark = tmp_path / "out" / ".build" / "mark"
        if touch:
            assert not mark.exists()
        mark.touch()
    build_here(config, tmp_path / "out")
    build_here(config, tmp_path / "whole")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_no_folder_of_this_machine_is_in_the_reason(tmp_path: Path) -> None:
    place = Location.of(tmp_path / "a.h5ad")
    error = SourceError(f"cannot open '{place}'", where=f"{place}, X", fix="mend it")
    assert Quarantined.of(error, place, "a").reason == "cannot open 'a.h5ad' (a.h5ad, X)"
