from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse

from data_pipeline import duplicates
from data_pipeline import plan as planning
from data_pipeline.duplicates import write_hashes
from scgpt.data import RaggedBatch, TokenDataset, verify_corpus
from scgpt.errors import DataError, SourceError
from tests.data_pipeline.atlases import (
    GENES,
    VOCAB,
    Here,
    build_here,
    bytes_of,
    cells_of,
    config_of,
    random_counts,
    write_h5ad,
)

ROWS = st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=8)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.lists(ROWS, min_size=1, max_size=3), st.booleans(), st.booleans(), st.integers(1, 3), st.integers(1, 2))
def test_what_came_in_is_written_or_filtered_and_is_in_the_corpus(
        tmp_path_factory: pytest.TempPathFactory, drawn: list[list[list[int]]], remove: bool, shuffle: bool,
        least: int, max_value: int) -> None:
    """The whole pipeline against plain loops: cells of four genes, so that many are equal, empty or too large."""
    folder = tmp_path_factory.mktemp("books")
    paths = [write_h5ad(folder / f"{name}.h5ad", sparse.csr_matrix(np.array(rows, np.float32)), GENES[:4])
             for name, rows in zip("abc", drawn, strict=False)]
    expected: dict[tuple[str, int], list[int]] = {}
    reasons: dict[str, dict[str, int]] = {name: {} for name, _ in zip("abc", drawn, strict=False)}
    seen: set[tuple[int, ...]] = set()
    for name, rows in zip("abc", drawn, strict=False):
        for row, cell in enumerate(rows):
            n_genes = sum(value > 0 for value in cell)
            reason = ("no_genes" if not n_genes else "min_genes" if n_genes < least else
                      "max_value" if max(cell) > max_value else
                      "duplicate" if remove and tuple(cell) in seen else None)
            if reason is None:
                expected[name, row] = cell
                seen.add(tuple(cell))
            else:
                reasons[name][reason] = reasons[name].get(reason, 0) + 1
    config = config_of(*paths, splits={"valid": 0.5}, shards={"shuffle": shuffle}, cells={
        "min_genes": least, "max_value": max_value, "remove_duplicates": remove, "duplicate_min_genes": 0})
    if not expected:
        with pytest.raises(SourceError, match="no cell is left"):
            build_here(config, folder / "out")
        return
    manifest = build_here(config, folder / "out")
    assert verify_corpus(folder / "out", deep=True) == manifest
    assert cells_of(folder / "out") == {
        key: {VOCAB[gene]: value for gene, value in zip(GENES[:4], cell, strict=True) if value}
        for key, cell in expected.items()}
    for source in manifest.sources:
        assert source.filtered == reasons[source.name]
        assert source.cells_in == source.cells_written + sum(source.filtered.values())
        mine = [cell for (name, _), cell in expected.items() if name == source.name]
        assert (source.cells_written, source.expression_sum) == (len(mine), sum(map(sum, mine)))


@pytest.mark.parametrize("by", ["cell", "donor"])
def test_adding_a_source_moves_no_cell_between_splits(tmp_path: Path, by: str) -> None:
    donors = [f"d{i % 20}" for i in range(200)]
    obs = {"donor_id": donors, "dataset": [donor.replace("d", "set") for donor in donors]}
    paths = [write_h5ad(tmp_path / f"{name}.h5ad", random_counts(seed, 200, 30), obs=obs)
             for seed, name in enumerate("abc")]
    splits = {"valid": 0.4, "by": by}
    few = build_here(config_of(*paths[:2], splits=splits), tmp_path / "few")
    many = build_here(config_of(*paths[::-1], splits=splits), tmp_path / "many")
    for split in ("train", "valid"):
        known = [TokenDataset.open(tmp_path / name, split).obs().to_pylist() for name in ("few", "many")]
        rows = [{(row["source"], row["source_row"]) for row in table} for table in known]
        assert rows[0] == {row for row in rows[1] if row[0] != "c"}
        assert len(rows[0]) > 20
    for manifest in (few, many):
        groups = [split.groups for split in manifest.splits.values()]
        if by == "cell":
            assert groups == [None, None]
            continue
        train, valid = map(set, groups)  # type: ignore[arg-type]
        assert (train & valid, len(train | valid)) == (set(), 20)
        assert manifest.sources[0].columns is not None
        assert manifest.sources[0].columns["donor"] == "donor_id"


def test_a_group_in_two_splits_is_noticed_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(0, 50, 30), obs={"donor": ["x"] * 50})
    monkeypatch.setattr("data_pipeline.cells._group_draw", lambda *_: np.random.default_rng().random())
    monkeypatch.setattr(planning, "BLOCK_VALUES", 30)
    with pytest.raises(DataError, match="the donor 'x' is in (train and in valid|valid and in train)"):
        build_here(config_of(path, splits={"valid": 0.5, "by": "donor"}), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_no_folder_is_in_the_manifest_and_the_parts_of_the_hashes_do_not_matter(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", sparse.vstack([random_counts(0, 50, 60, 0.6)] * 3, "csr"))
    config = config_of(path, cells={"remove_duplicates": True})
    build_here(config, tmp_path / "one")
    monkeypatch.setattr(duplicates, "PART_CELLS", 20)
    build_here(config, tmp_path / "many", workers=Here(1))
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "many")
    assert str(tmp_path).encode() not in bytes_of(tmp_path / "one")["manifest.json"]


def test_a_lost_content_hash_is_noticed_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(path: Path, cells: RaggedBatch, chosen: NDArray[np.intp], **more: Any) -> None:
        write_hashes(path, cells, chosen[1:], **more)

    monkeypatch.setattr("data_pipeline.tasks.write_hashes", forgetful)
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(0, 50, 60, 0.6))
    with pytest.raises(DataError, match="content hashes of 50 came in, 49 are accounted for"):
        build_here(config_of(path), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_integers_that_float32_rounds_are_no_lost_counts(tmp_path: Path) -> None:
    """One value of a source is too wide for uint32: all are stored as float32, also the other source's."""
    paths = [write_h5ad(tmp_path / f"{name}.h5ad", sparse.csr_matrix(np.array([[1, 2, value], [3, 0, 1]])), GENES[:3])
             for name, value in (("a", 2.0**53 + 2), ("b", 2.0**24 + 1))]
    manifest = build_here(config_of(*paths), tmp_path / "out")
    assert [source.cells_written for source in manifest.sources] == [2, 2]
    assert manifest.sources[1].expression_sum == 2**24 + 8
