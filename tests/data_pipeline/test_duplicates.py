from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from data_pipeline import duplicates
from data_pipeline import plan as planning
from data_pipeline.duplicates import HashFile, find_equals, read_equals, write_equals, write_hashes
from scgpt.data import TokenDataset, verify_corpus
from scgpt.data.content import content_hashes
from scgpt.data.schema import CELL_ID, RaggedBatch, cell_ids, offsets_of
from tests.data_pipeline.atlases import (
    BLOOD,
    GENES,
    PANCREAS,
    Here,
    build_here,
    bytes_of,
    cells_of,
    config_of,
    random_counts,
    write_h5ad,
)

Cell = tuple[tuple[int, int], ...]   # (gene, value), ascending
# A block: its source, the first row, and of each cell the content, the split and the shard.
CELL = st.tuples(st.sampled_from([((1, 1),), ((1, 2),), ((2, 1), (5, 3)), ((7, 1),), ((9, 4),)]), st.integers(0, 1),
                 st.integers(0, 2))
BLOCKS = st.lists(st.tuples(st.integers(0, 2), st.lists(CELL, max_size=9)), min_size=1, max_size=5)


def slow_equals(blocks: list[tuple[int, int, list[tuple[Cell, int, int]]]]) -> tuple[list[tuple[int, int]], int]:
    """(source, row) of each cell that equals an earlier one, sorted; cells of split 1 whose content split 0 has too."""
    cells = sorted((source, first + i, *cell) for source, first, found in blocks for i, cell in enumerate(found))
    seen: set[Cell] = set()
    equal = []
    for source, row, content, *_ in cells:
        if content in seen:
            equal.append((source, row))
        seen.add(content)
    train = {content for _, _, content, split, _ in cells if split == 0}
    return equal, sum(split == 1 and content in train for _, _, content, split, _ in cells)


@settings(deadline=None, max_examples=60)
@given(BLOCKS, st.integers(1, 4), st.randoms(use_true_random=False))
def test_equal_cells_are_those_of_a_slow_twin_in_any_number_of_parts(
        tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, list[tuple[Cell, int, int]]]], parts: int,
        shuffler: object) -> None:
    folder = tmp_path_factory.mktemp("hashes")
    rows = [0, 0, 0]
    blocks = []
    for source, cells in drawn:
        blocks.append((source, rows[source], cells))
        rows[source] += len(cells)
    files = [written(folder / f"{number}.arrow", *block) for number, block in enumerate(blocks)]
    expected, across = slow_equals(blocks)
    shuffler.shuffle(files)  # type: ignore[attr-defined]
    found = [find_equals(files, part, parts) for part in range(parts)]
    assert sum(part.n_cells for part in found) == sum(rows)
    assert sum(part.n_across for part in found) == across
    ids = {int(cell_id) for part in found for cell_id in part.cell_ids}
    assert ids == {int(cell_ids(f"source{source}", np.array([row]))[0]) for source, row in expected}
    assert sum(len(part.cell_ids) for part in found) == len(expected)
    paths = [folder / f"equals{part}.arrow" for part in range(parts)]
    for path, part in zip(paths, found, strict=True):
        write_equals(path, part)
    by_shard = [int(cell_id) for split in (0, 1) for shard in range(3) for cell_id in read_equals(paths, split, shard)]
    assert sorted(by_shard) == sorted(ids)


def written(path: Path, source: int, first: int, cells: list[tuple[Cell, int, int]]) -> HashFile:
    pairs = [pair for content, *_ in cells for pair in content]
    batch = RaggedBatch(np.array([gene for gene, _ in pairs], np.uint16), np.array([n for _, n in pairs], np.uint32),
                        offsets_of(np.array([len(content) for content, *_ in cells], np.int64)),
                        {CELL_ID: cell_ids(f"source{source}", np.arange(first, first + len(cells)))})
    write_hashes(path, batch, np.arange(len(cells)), splits=np.array([split for _, split, _ in cells], np.int8),
                 shards=np.array([shard for *_, shard in cells], np.int64), sums=np.ones(len(cells)),
                 hashes=content_hashes(batch))
    return HashFile(path, source)


def test_a_file_given_twice_is_in_the_corpus_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BLOCK_VALUES", 30_000)
    monkeypatch.setattr(duplicates, "PART_CELLS", 500)
    twice = config_of(BLOOD, {"path": str(BLOOD), "name": "again"}, splits={"valid": 0.2},
                      cells={"remove_duplicates": True}, shards={"max_bytes": "64KiB"})
    manifest = build_here(twice, tmp_path / "twice")
    assert verify_corpus(tmp_path / "twice", deep=True) == manifest
    once = build_here(config_of(BLOOD, splits={"valid": 0.2}), tmp_path / "once")
    assert cells_of(tmp_path / "twice") == cells_of(tmp_path / "once")
    first, again = manifest.sources
    assert (first.filtered, again.filtered) == ({}, {"duplicate": 700})
    assert (again.cells_in, again.cells_written, again.values, again.expression_sum) == (700, 0, 0, 0.0)
    assert {name: split.cells for name, split in manifest.splits.items()} == {
        name: split.cells for name, split in once.splits.items()}
    assert manifest.duplicates is not None
    assert manifest.duplicates.model_dump() == {"compared": 1400, "equal": 700, "removed": True,
                                                "across_splits": manifest.duplicates.across_splits}
    assert manifest.duplicates.across_splits > 0
    for seed in (1, 2):
        build_here(twice, tmp_path / str(seed), workers=Here(seed))
        assert bytes_of(tmp_path / str(seed)) == bytes_of(tmp_path / "twice")


def test_equal_cells_are_kept_and_told_unless_removal_is_asked_for(tmp_path: Path) -> None:
    manifest = build_here(config_of(BLOOD, {"path": str(BLOOD), "name": "again"}, splits={"valid": 0.5}),
                          tmp_path / "out")
    assert sum(split.cells for split in manifest.splits.values()) == 1400
    assert manifest.duplicates is not None
    assert (manifest.duplicates.equal, manifest.duplicates.removed) == (700, False)
    splits = {key: split for split in manifest.splits
              for key in ((row["source"], row["source_row"])
                          for row in TokenDataset.open(tmp_path / "out", split).obs().to_pylist())}
    across = sum(splits[BLOOD.stem, row] != splits["again", row] for row in range(700))
    assert 0 < across == manifest.duplicates.across_splits


def test_the_ledger_of_each_source_counts_its_own_duplicates(tmp_path: Path) -> None:
    counts = random_counts(1, 120, 60, 0.6)
    stacked = sparse.vstack([counts[:20], counts[5:15], counts[:3]], "csr")   # rows 20 to 32 are copies
    first = write_h5ad(tmp_path / "first.h5ad", counts[:10])
    second = write_h5ad(tmp_path / "second.h5ad", stacked)
    manifest = build_here(config_of(first, second, cells={"remove_duplicates": True}), tmp_path / "out")
    assert [source.filtered for source in manifest.sources] == [{}, {"duplicate": 23}]
    assert {row for name, row in cells_of(tmp_path / "out") if name == "second"} == set(range(10, 20))
    assert manifest.sources[1].expression_sum == counts[10:20].sum()


def test_cells_of_few_genes_are_never_duplicates(tmp_path: Path) -> None:
    counts = sparse.csr_matrix(np.tile(np.eye(30, dtype=np.float32), (3, 1)))
    path = write_h5ad(tmp_path / "a.h5ad", counts)
    kept = build_here(config_of(path, cells={"remove_duplicates": True}), tmp_path / "kept")
    assert (kept.sources[0].cells_written, kept.duplicates.compared) == (90, 0)  # type: ignore[union-attr]
    cells = {"remove_duplicates": True, "duplicate_min_genes": 1}
    strict = build_here(config_of(path, cells=cells), tmp_path / "strict")
    assert strict.sources[0].filtered == {"duplicate": 60}


def test_shards_that_duplicates_leave_empty_are_not_written(tmp_path: Path) -> None:
    config = config_of(PANCREAS, {"path": str(PANCREAS), "name": "again"}, splits={"valid": 0.0},
                       cells={"remove_duplicates": True}, shards={"max_bytes": "1MiB", "shuffle": False})
    manifest = build_here(config, tmp_path / "out")
    shards = manifest.splits["train"].shards
    assert all(shard.cells for shard in shards)
    assert [shard.file for shard in shards] == [f"train/part-{number:05d}.arrow" for number in range(len(shards))]
    assert sum(shard.cells for shard in shards) == manifest.sources[0].cells_in
    assert verify_corpus(tmp_path / "out", deep=True) == manifest


def test_duplicates_go_by_content_whatever_the_genes_are_called(tmp_path: Path) -> None:
    counts = random_counts(2, 40, 60, 0.6)
    order = np.random.default_rng(0).permutation(60)
    genes = GENES[:60]
    first = write_h5ad(tmp_path / "a.h5ad", counts, genes)
    second = write_h5ad(tmp_path / "b.h5ad", counts[:, order].astype(np.float64), [genes[i] for i in order])
    manifest = build_here(config_of(first, second, cells={"remove_duplicates": True}), tmp_path / "out")
    assert manifest.sources[1].filtered == {"duplicate": 40}
