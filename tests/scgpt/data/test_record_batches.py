import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt.data import RaggedBatch, TokenDataset, record_batches, verify_corpus
from scgpt.data.arrow_format import write_shard
from scgpt.data.corpus_files import CorpusFiles
from scgpt.data.ipc_message import read_metadata
from scgpt.errors import ConfigError, DataError

from .cells import cells_strategy, in_memory, random_cells, same_cells, write_corpus

CODECS = (None, "zstd", "lz4")


@settings(deadline=None, max_examples=25)
@given(st.lists(cells_strategy, min_size=1, max_size=3), st.integers(1, 200), st.sampled_from(CODECS), st.booleans(),
       st.integers(1, 3000), st.data())
def test_any_cells_come_back_compressed_or_from_a_url_in_any_order(tmp_path_factory, batches, max_batch_values, codec,
                                                                   remote, cache_bytes, data):
    batches = [RaggedBatch(b.genes, b.expressions.astype(np.uint32), b.offsets, b.columns) for b in batches]
    folder, whole = tmp_path_factory.mktemp("corpus"), RaggedBatch.concatenate(batches)
    write_corpus(folder, {"train": batches}, max_batch_values=max_batch_values, compression=codec)
    order = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=50)), int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_batches, "CACHE_BYTES", cache_bytes)
        patch.setattr(record_batches, "_GROUP_BYTES", cache_bytes // 2 + 1)
        patch.setattr(record_batches, "_WHOLE_SHARE", data.draw(st.sampled_from([1, 3, 1000])))
        dataset = TokenDataset.open(in_memory(folder) if remote else folder)
        assert np.array_equal(dataset.lengths_of(order), whole.lengths[order])
        for _ in range(2):   # from the files, and from what was kept of them
            same_cells(dataset.fetch(order), whole.take(order))
        assert np.array_equal(dataset.lengths, whole.lengths)
        dataset.verify()


@pytest.mark.parametrize("codec", CODECS)
def test_what_a_message_says_of_its_buffers_is_where_they_are(tmp_path: Path, codec):
    cells = random_cells([30, 0, 80, 5], dtype=np.float32)
    entry = write_shard(tmp_path / "a.arrow", cells, compression=codec)[0]
    content = memoryview((tmp_path / "a.arrow").read_bytes())[entry.offset:]
    message = pa.ipc.read_message(pa.py_buffer(content))
    n_cells, found, buffers = read_metadata(memoryview(message.metadata))
    assert (n_cells, found, len(buffers)) == (4, codec, 10)
    for place, values in ((1, cells.offsets.astype(np.int32)), (3, cells.genes), (5, cells.offsets.astype(np.int32)),
                          (7, cells.expressions), (9, cells.columns["cell_id"])):
        part = message.body.to_pybytes()[buffers[place, 0]:buffers[place].sum()]
        if codec is not None:
            part = pa.decompress(part[8:], decompressed_size=values.nbytes, codec=codec, asbytes=True)
        assert part == values.tobytes()


def test_few_cells_of_a_batch_behind_a_url_cost_their_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_corpus(tmp_path, {"train": [random_cells([200] * 2000)]}, max_batch_values=100_000)
    dataset = TokenDataset.open(in_memory(tmp_path))
    dataset.lengths  # noqa: B018
    read = []
    whole = CorpusFiles._read_merged
    monkeypatch.setattr(CorpusFiles, "_read_merged", lambda self, ranges: read.extend(
        stop - start for _, start, stop in ranges) or whole(self, ranges))
    monkeypatch.setattr("scgpt.data.corpus_files._GAP_BYTES", 0)
    dataset.fetch(np.array([3, 900, 1999, 901]))
    assert sum(read) == 4 * (200 * 4 + 8)
    read.clear()
    dataset.fetch(np.arange(500))   # a whole batch, which is kept
    assert 0 < sum(read) <= 500 * (200 * 4 + 16) + 2000
    read.clear()
    dataset.fetch(np.array([7, 450]))
    assert read == []


@pytest.mark.parametrize("codec", CODECS)
def test_ids_alone_are_read_without_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec):
    cells = random_cells([200] * 500)
    write_corpus(tmp_path, {"train": [cells.take(np.arange(300)), cells.take(np.arange(300, 500))]},
                 max_batch_values=10_000, compression=codec)
    monkeypatch.setattr(record_batches, "_GROUP_BYTES", 100_000)
    monkeypatch.setattr("scgpt.data.corpus_files._GAP_BYTES", 0)
    shards = TokenDataset.open(in_memory(tmp_path)).shards
    monkeypatch.setattr(record_batches.BatchShards, "fetch", None)   # would hold all values
    shards.lengths(np.arange(500))
    read = []
    whole = CorpusFiles._read_merged
    monkeypatch.setattr(CorpusFiles, "_read_merged", lambda self, ranges: read.extend(
        stop - start for _, start, stop in ranges) or whole(self, ranges))
    order = np.random.default_rng(0).permutation(500)
    assert np.array_equal(shards.cell_ids(order), cells.columns["cell_id"][order])
    if codec is None:
        assert sum(read) == 8 * 500
    assert shards.cell_ids(np.empty(0, np.int64)).tolist() == []


def test_neighbouring_record_batches_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_corpus(tmp_path, {"train": [random_cells([50] * 400)]}, max_batch_values=500)
    dataset = TokenDataset.open(in_memory(tmp_path))
    read = []
    whole = CorpusFiles._read_merged
    monkeypatch.setattr(CorpusFiles, "_read_merged",
                        lambda self, ranges: read.append(len(ranges)) or whole(self, ranges))
    dataset.fetch(np.arange(400))
    assert read == [1, 1]   # the list boundaries, then all batches


def test_a_shard_that_changes_while_it_is_read_is_told(tmp_path: Path):
    """Boundaries are read before values: those of another shard must not be followed into this one's memory."""
    for name, lengths in (("a", [10, 50, 30, 10]), ("b", [30, 30, 30, 10])):   # as many values in files of one size
        write_corpus(tmp_path / name, {"train": [random_cells(lengths)]})
    dataset = TokenDataset.open(in_memory(tmp_path / "a"))
    dataset.lengths  # noqa: B018
    dataset.files._remote.put_file(str(tmp_path / "b" / "train" / "part-00000.arrow"),
                                   dataset.files.url("train/part-00000.arrow"))
    with pytest.raises(DataError, match="the record batch at byte .* is damaged"):
        dataset.fetch(np.arange(4))


def test_what_is_kept_of_a_corpus_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_corpus(tmp_path, {"train": [random_cells([50] * 400)]}, max_batch_values=500, compression="zstd")
    monkeypatch.setattr(record_batches, "CACHE_BYTES", 20_000)
    dataset = TokenDataset.open(tmp_path)
    for first in range(0, 400, 10):
        dataset.fetch(np.arange(first, first + 10))
    assert 5_000 < dataset.shards._cache.n_bytes <= 20_000


@pytest.mark.parametrize("codec", CODECS)
def test_any_damage_to_a_shard_is_told_or_changes_no_boundary(tmp_path: Path, codec):
    """Whatever bytes stand in a shard, reading ends in a DataError or in cells, never outside the memory."""
    manifest = write_corpus(tmp_path, {"train": [random_cells([20] * 40)]}, compression=codec)
    path = tmp_path / manifest.splits["train"].shards[0].file
    content, draw, told = path.read_bytes(), np.random.default_rng(3), 0
    for _ in range(40):
        damaged = bytearray(content)
        for place in draw.integers(0, len(content), 3):
            damaged[place] = draw.integers(0, 256)
        path.write_bytes(bytes(damaged))
        for location in (tmp_path, in_memory(tmp_path)):
            try:
                assert len(TokenDataset.open(location).fetch(np.arange(40))) == 40
            except DataError:
                told += 1
            with pytest.raises(DataError):
                verify_corpus(location)
    assert told


def test_faults_of_a_remote_corpus_are_told_in_one_sentence(tmp_path: Path):
    write_corpus(tmp_path, {"train": [random_cells([5] * 9)], "valid": [random_cells([5], source="b")]})
    url = in_memory(tmp_path)
    with pytest.raises(DataError, match="not a corpus: the file 'manifest.json' is missing"):
        TokenDataset.open(url + "/train")
    with pytest.raises(DataError, match="no split 'test'"):
        TokenDataset.open(url, "test")
    files = CorpusFiles(url)
    files._remote.rm(url + "/train/part-00000.arrow")
    with pytest.raises(DataError, match="part-00000.arrow.* is missing"):
        TokenDataset.open(url)
    with pytest.raises(DataError, match=r"'train/part-00000\.arrow' is missing"):
        verify_corpus(url)
    files._remote.pipe_file(url + "/train/part-00000.arrow", b"short")
    with pytest.raises(DataError, match="the file has 5 bytes, the manifest says"):
        TokenDataset.open(url)
    assert len(TokenDataset.open(url, "valid")) == 1
    files._remote.pipe_file(url + "/valid/more.arrow", b"")
    files._remote.put_file(str(tmp_path / "train" / "part-00000.arrow"), url + "/train/part-00000.arrow")
    with pytest.raises(DataError, match=r"'valid/more\.arrow' does not belong"):
        verify_corpus(url)
    with pytest.raises(ConfigError, match="'nowhere://' is no kind of URL that can be read"):
        TokenDataset.open("nowhere://corpus")


def test_a_url_serves_metadata_vocabulary_and_pickles_as_a_folder_does(tmp_path: Path):
    write_corpus(tmp_path, {"train": [random_cells([5] * 9), random_cells([7] * 3, source="b")]})
    here, there = TokenDataset.open(tmp_path), TokenDataset.open(in_memory(tmp_path))
    assert there.obs().equals(here.obs())
    assert there.codes("donor")[1] == here.codes("donor")[1]
    assert there.vocab.get_itos() == here.vocab.get_itos()
    assert there[-1]["genes"].tolist() == here[11]["genes"].tolist()
    carried = pickle.dumps(there)
    assert len(carried) < 1000
    same_cells(pickle.loads(carried).fetch(np.arange(12)), here.fetch(np.arange(12)))
    assert TokenDataset.open(f"file://{tmp_path}").path == tmp_path
    with pytest.raises(DataError, match="only an Arrow corpus in a folder"):
        there.to_hf()
