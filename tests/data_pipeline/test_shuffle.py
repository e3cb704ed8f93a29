from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shuffle import (
    KEY,
    merge_runs,
    ordered_buckets,
    shuffle_keys,
    shuffled_buckets,
    sorted_dictionary,
    write_run,
)
from scgpt.data.content import content_hashes
from scgpt.data.schema import CELL_ID, CONTENT_HASH, SOURCE_ROW, RaggedBatch, cell_ids, offsets_of
from scgpt.errors import DataError


def random_cells(seed: int, n_cells: int, source: str = "a") -> RaggedBatch:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, 9, n_cells)
    rows = np.arange(n_cells)
    ids = cell_ids(source, rows)
    cells = RaggedBatch(draw.integers(0, 60_000, lengths.sum()).astype(np.uint16),
                        draw.integers(1, 99, lengths.sum()).astype(np.uint32), offsets_of(lengths),
                        {CELL_ID: ids, SOURCE_ROW: rows, KEY: shuffle_keys(7, ids)})
    cells.columns[CONTENT_HASH] = content_hashes(cells)[0]
    return cells


def as_lists(cells: RaggedBatch) -> dict[int, tuple[list[int], list[float]]]:
    return {int(cells.columns[CELL_ID][i]): (cells.genes[a:b].tolist(), cells.expressions[a:b].tolist())
            for i, (a, b) in enumerate(zip(cells.offsets[:-1], cells.offsets[1:], strict=True))}


def test_keys_are_the_cell_s_own_and_the_seed_s() -> None:
    ids = cell_ids("a", np.arange(1000))
    keys = shuffle_keys(3, ids)
    assert np.array_equal(keys[::-1], shuffle_keys(3, ids[::-1].copy()))
    assert len(np.unique(keys)) == 1000
    assert (keys != shuffle_keys(4, ids)).all()


@pytest.mark.parametrize("n_shards", [1, 2, 7, 100])
def test_shards_are_ranges_of_the_keys_of_equal_size(n_shards: int) -> None:
    keys = np.sort(shuffle_keys(3, cell_ids("a", np.arange(50_000))))
    buckets = shuffled_buckets(keys, np.full(len(keys), n_shards))
    assert (np.diff(buckets) >= 0).all()
    sizes = np.bincount(buckets, minlength=n_shards)
    assert len(sizes) == n_shards
    assert np.abs(sizes - 50_000 / n_shards).max() < 6 * np.sqrt(50_000 / n_shards) + 1


def test_the_largest_and_smallest_keys_have_a_shard() -> None:
    keys = np.array([0, 2**64 - 1], np.uint64)
    assert shuffled_buckets(keys, np.array([5, 5])).tolist() == [0, 4]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(1, 8))
def test_unshuffled_shards_are_ranges_of_the_sources_of_equal_values(lengths: list[int], n_shards: int) -> None:
    before = np.concatenate([[0], np.cumsum(lengths)])
    buckets = ordered_buckets(before[:-1], int(before[-1]), np.full(len(lengths), n_shards))
    assert (np.diff(buckets) >= 0).all()
    assert buckets.min() >= 0
    assert buckets.max() < n_shards
    sizes = np.bincount(buckets, weights=lengths, minlength=n_shards)
    assert sizes.max() <= before[-1] / n_shards + max(lengths)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 40), st.integers(1, 4))
def test_runs_cut_in_any_way_merge_to_the_same_shards(tmp_path_factory: pytest.TempPathFactory, seed: int, n_cells: int,
                                                      n_runs: int) -> None:
    folder = tmp_path_factory.mktemp("runs")
    cells = random_cells(seed, n_cells)
    draw = np.random.default_rng(seed)
    splits, buckets = draw.integers(0, 2, n_cells).astype(np.int8), draw.integers(0, 3, n_cells)
    labels = pa.array([["x", "y", None][i % 3] for i in range(n_cells)], pa.string()).dictionary_encode()
    owner = draw.integers(0, n_runs, n_cells)
    parts: dict[tuple[int, int], list[tuple[Path, int, str]]] = {}
    for run in range(n_runs):
        path = folder / f"{run}.arrow"
        for part in write_run(path, cells, {"label": labels}, kept=owner == run, splits=splits, buckets=buckets):
            parts.setdefault((part.split, part.bucket), []).append((path, part.batch, "source"))
    seen = 0
    for (split, bucket), runs in parts.items():
        merged, known = merge_runs(runs, np.dtype(np.uint16), ["label"])
        wanted = np.flatnonzero((splits == split) & (buckets == bucket))
        order = wanted[np.argsort(cells.columns[KEY][wanted])]
        assert as_lists(merged) == as_lists(cells.take(order))
        assert list(as_lists(merged)) == cells.columns[CELL_ID][order].tolist()
        assert known.column("label").to_pylist() == labels.take(pa.array(order)).to_pylist()
        assert known.column(SOURCE_ROW).to_pylist() == order.tolist()
        assert merged.expressions.dtype == np.uint16
        seen += len(merged)
    assert seen == n_cells


def test_a_cell_that_comes_twice_is_refused(tmp_path: Path) -> None:
    cells = random_cells(0, 5)
    zeros = np.zeros(5, np.int64)
    for name in ("a", "b"):
        write_run(tmp_path / name, cells, {}, kept=zeros == 0, splits=zeros.astype(np.int8), buckets=zeros)
    with pytest.raises(DataError, match="was written twice"):
        merge_runs([(tmp_path / "a", 0, "s"), (tmp_path / "b", 0, "s")], np.dtype(np.uint32), [])


def test_dictionaries_are_sorted_and_hold_only_what_occurs() -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([2, 0, None, 2]), pa.array(["z", "unused", "a"]))
    found = sorted_dictionary(column)
    assert found.dictionary.to_pylist() == ["a", "z"]
    assert found.to_pylist() == ["a", "z", None, "a"]


@pytest.mark.parametrize("values", [np.uint32, np.float32])
def test_content_hashes_are_those_of_the_stored_values(tmp_path: Path, values: type[np.generic]) -> None:
    cells = random_cells(3, 50)
    cells.expressions[::7] = (1 << 24) + 1   # no float32
    cells.columns[CONTENT_HASH] = content_hashes(cells)[0]
    parts = write_run(tmp_path / "run.arrow", cells, {}, kept=np.ones(50, bool), splits=np.zeros(50, np.int8),
                      buckets=np.zeros(50, np.int64))
    stored, known = merge_runs([(tmp_path / "run.arrow", parts[0].batch, "a")], np.dtype(values), [])
    assert np.array_equal(known.column(CONTENT_HASH).to_numpy(), content_hashes(stored)[0])


def test_cells_that_are_left_out_must_be_there(tmp_path: Path) -> None:
    cells = random_cells(3, 50)
    parts = write_run(tmp_path / "run.arrow", cells, {}, kept=np.ones(50, bool), splits=np.zeros(50, np.int8),
                      buckets=np.zeros(50, np.int64))
    runs = [(tmp_path / "run.arrow", parts[0].batch, "a")]
    ids = cells.columns[CELL_ID].astype(np.uint64)
    fewer, _ = merge_runs(runs, np.dtype(np.uint16), [], ids[[3, 40]])
    assert as_lists(fewer).keys() == set(ids.tolist()) - {ids[3], ids[40]}
    with pytest.raises(DataError, match="2 cells to be left out, of which are there: 1"):
        merge_runs(runs, np.dtype(np.uint16), [], np.array([ids[3], 5], np.uint64))
