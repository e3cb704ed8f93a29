import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt.data import TokenDataset
from scgpt.data.arrow_format import value_types, write_shard
from scgpt.data.corpus_files import CorpusFiles
from scgpt.data.schema import RaggedBatch
from scgpt.errors import DataError

from .cells import cells_strategy, random_cells, write_corpus


@settings(deadline=None, max_examples=60)
@given(st.lists(cells_strategy, min_size=1, max_size=3), st.integers(1, 60), st.data())
def test_any_cells_come_back_from_disk_in_any_order(tmp_path_factory, batches, max_batch_values, data):
    batches = [RaggedBatch(b.genes, b.expressions.astype(np.uint32), b.offsets, b.columns) for b in batches]
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, {"train": batches}, max_batch_values=max_batch_values)
    dataset, whole = TokenDataset.open(folder), RaggedBatch.concatenate(batches)
    order = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=50)), int)
    got, want = dataset.fetch(order), whole.take(order)
    for name in ("genes", "expressions", "offsets"):
        assert np.array_equal(getattr(got, name), getattr(want, name)), name
        assert getattr(got, name).dtype == getattr(want, name).dtype
    assert np.array_equal(got.columns["cell_id"], want.columns["cell_id"])
    assert np.array_equal(dataset.lengths, whole.lengths)
    dataset.verify()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.float32])
def test_a_shard_is_a_plain_arrow_stream_of_bounded_batches(tmp_path: Path, dtype: type):
    cells = random_cells([30, 0, 80, 5, 200, 5], dtype=dtype)
    entries = write_shard(tmp_path / "a.arrow", cells, max_batch_values=100)
    table = pa.ipc.open_stream(tmp_path / "a.arrow").read_all()
    assert table.column_names == ["genes", "expressions", "cell_id"]
    assert table["genes"].combine_chunks().flatten().to_pylist() == cells.genes.tolist()
    assert table["expressions"].combine_chunks().flatten().to_pylist() == cells.expressions.tolist()
    assert [batch.num_rows for batch in table.to_batches()] == [entry.cells for entry in entries] == [2, 2, 1, 1]
    content = (tmp_path / "a.arrow").read_bytes()
    for entry in entries:   # what a remote reader does: schema from the front, one batch from its offset
        schema = pa.ipc.open_stream(content).schema
        message = pa.ipc.read_message(pa.py_buffer(content[entry.offset:]))
        assert pa.ipc.read_record_batch(message, schema).num_rows == entry.cells


def test_list_offsets_that_would_overflow_are_refused(tmp_path: Path):
    cells = RaggedBatch(np.empty(0, np.uint16), np.empty(0, np.uint16), np.array([0, 1 << 31]), {})
    with pytest.raises(DataError, match="32-bit list offsets"):
        write_shard(tmp_path / "a.arrow", cells)


def test_a_stream_cut_between_two_messages_is_refused(tmp_path: Path):
    manifest = write_corpus(tmp_path, {"train": [random_cells([50] * 20)]})
    shard = manifest.splits["train"].shards[0]
    path = tmp_path / shard.file
    path.write_bytes(path.read_bytes()[:shard.batches[5].offset])
    with pytest.raises(DataError, match=r"bytes, the manifest says .*part-00000\.arrow"):
        TokenDataset.open(tmp_path)


def test_a_pickled_dataset_carries_its_path_and_opens_again(tmp_path: Path):
    write_corpus(tmp_path, {"train": [random_cells([3] * 2000)]})
    dataset = TokenDataset.open(tmp_path)
    dataset.fetch(np.arange(10))
    carried = pickle.dumps(dataset)
    assert len(carried) < 1000
    assert pickle.loads(carried).fetch(np.array([7])).genes.tolist() == dataset.fetch(np.array([7])).genes.tolist()


@pytest.mark.parametrize(("genes", "expressions", "ids", "says"), [
    (pa.list_(pa.uint16()), pa.list_(pa.float64()), pa.uint64(), "'expressions' are of type float64, not uint16"),
    (pa.list_(pa.int32()), pa.list_(pa.uint16()), pa.uint64(), "'genes' are of type int32, not uint16 or uint32"),
    (pa.list_(pa.uint16()), pa.large_list(pa.uint16()), pa.uint64(), "not as two lists and uint64"),
    (pa.list_(pa.uint16()), pa.list_(pa.uint16()), pa.uint32(), "not as two lists and uint64"),
])
def test_types_that_are_not_of_the_format_are_refused_before_a_value_is_read(tmp_path, genes, expressions, ids, says):
    files = CorpusFiles(tmp_path)
    good = pa.schema([("genes", pa.list_(pa.uint16())), ("expressions", pa.list_(pa.float32())),
                      ("cell_id", pa.uint64())])
    assert value_types([good, good], files) == (np.uint16, np.float32)
    with pytest.raises(DataError, match=says):
        value_types([pa.schema([("genes", genes), ("expressions", expressions), ("cell_id", ids)])], files)
