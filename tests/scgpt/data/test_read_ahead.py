import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from scgpt.data import TokenDataset, gather, read_ahead
from tests.scgpt.data.cells import random_cells, write_corpus


@pytest.fixture
def dataset(tmp_path):
    write_corpus(tmp_path / "corpus", {"train": [random_cells([30] * 100)]}, max_batch_values=700)
    return TokenDataset.open(tmp_path / "corpus")


@pytest.fixture
def told(monkeypatch):
    """The rows of each telling of the kernel, one a column."""
    calls, tell = [], gather.will_need

    def noted(addresses, offsets, batches, rows, width):
        calls.append(rows.tolist())
        tell(addresses, offsets, batches, rows, width)

    monkeypatch.setattr(gather, "will_need", noted)
    return calls


def test_the_kernel_is_told_of_cells_while_pages_are_missing(dataset, told, monkeypatch):
    monkeypatch.setattr(read_ahead, "_missing_pages", lambda: 0)
    cells, told_fetches = np.array([3, 1, 2]), -(-read_ahead._TOLD_CELLS // 3)
    for _ in range(told_fetches + 3):   # nothing is missing: the first ones only
        dataset.fetch(cells)
    assert len(told) == 2 * told_fetches
    faults = iter(range(1_000))
    monkeypatch.setattr(read_ahead, "_missing_pages", lambda: next(faults))
    dataset.fetch(cells)   # finds some missing
    assert len(told) == 2 * told_fetches
    dataset.fetch(cells)
    assert told[2 * told_fetches:] == [[1, 2, 3]] * 2   # as they are stored


def test_each_thread_tells_the_pages_that_it_missed_itself(dataset, told, monkeypatch):
    missing = threading.local()
    monkeypatch.setattr(read_ahead, "_missing_pages", lambda: getattr(missing, "pages", 0))
    cells = np.arange(8)
    for _ in range(-(-read_ahead._TOLD_CELLS // 8) + 1):
        dataset.views(cells)
    told.clear()
    missing.pages = 100
    with ThreadPoolExecutor(1) as other:   # has missed none, whatever this thread has
        other.submit(dataset.views, cells).result()
        other.submit(dataset.views, cells).result()
    assert not told
    dataset.views(cells)
    assert len(told) == 2


def test_a_page_missing_now_and_then_is_not_worth_telling(dataset, told, monkeypatch):
    faults = iter(range(1_000))
    monkeypatch.setattr(read_ahead, "_missing_pages", lambda: next(faults))   # one between two looks
    told_fetches = -(-read_ahead._TOLD_CELLS // 20)
    for _ in range(told_fetches + 3):
        dataset.fetch(np.arange(20))
    assert len(told) == 2 * told_fetches


def test_cells_that_memory_does_not_hold_are_the_same_cells(dataset, told):
    order = np.random.default_rng(0).permutation(100)
    expected = dataset.fetch(order)
    for shard in dataset.entry.shards:
        with (dataset.path / shard.file).open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found = TokenDataset.open(dataset.path).fetch(order)
    np.testing.assert_array_equal(found.genes, expected.genes)
    np.testing.assert_array_equal(found.expressions, expected.expressions)
    assert len(told) == 4   # two columns of either fetch
