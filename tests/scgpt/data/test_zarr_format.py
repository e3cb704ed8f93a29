import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt.data import RaggedBatch, TokenDataset, verify_corpus, zarr_chunks, zarr_format
from scgpt.data.convert import ConvertConfig, convert
from scgpt.data.open_shards import open_shards
from scgpt.errors import DataError

from .cells import cells_strategy, in_memory, random_cells, same_cells, write_corpus

CODECS = ("none", "zstd", "lz4")


def bytes_of(corpus: Path) -> dict[str, bytes]:
    return {path.relative_to(corpus).as_posix(): path.read_bytes() for path in sorted(corpus.rglob("*"))
            if path.is_file()}


def as_zarr(corpus: Path, out: Path, codec: str = "none") -> Path:
    convert(corpus, out, ConvertConfig(form="zarr", compression=codec))
    return out


@settings(deadline=None, max_examples=8)
@given(st.lists(cells_strategy, min_size=1, max_size=3), st.sampled_from(CODECS), st.booleans(), st.booleans(),
       st.data())
def test_any_cells_come_back_from_a_store_in_any_order(tmp_path_factory, batches, codec, remote, zarrs, data):
    batches = [RaggedBatch(b.genes, b.expressions.astype(np.uint32), b.offsets, b.columns) for b in batches]
    folder, whole = tmp_path_factory.mktemp("corpus"), RaggedBatch.concatenate(batches)
    write_corpus(folder / "arrow", {"train": batches})
    order = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=50)), int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarr_format, "CHUNK_ITEMS", data.draw(st.integers(8, 60)))
        patch.setattr(zarr_chunks, "CACHE_BYTES", data.draw(st.integers(1, 2000)))
        patch.setattr(zarr_chunks, "_GROUP_BYTES", data.draw(st.integers(1, 500)))
        patch.setattr("scgpt.data.convert.MAX_BYTES", data.draw(st.integers(1, 2000)))
        if not zarrs:
            patch.setattr(zarr_format, "find_spec", lambda name: None)
        as_zarr(folder / "arrow", folder / "zarr", codec)
        dataset = TokenDataset.open(in_memory(folder / "zarr") if remote else folder / "zarr")
        same_cells(dataset.fetch(order), whole.take(order))
        assert np.array_equal(dataset.lengths_of(order), whole.lengths[order])
        assert np.array_equal(dataset.lengths, whole.lengths)
        dataset.verify()


def test_a_store_is_plain_zarr_of_bounded_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zarr_format, "CHUNK_ITEMS", 100)
    monkeypatch.setattr("scgpt.data.convert.MAX_BYTES", 1600)
    cells = random_cells([30, 0, 80, 5, 200, 299, 0], dtype=np.uint16)
    write_corpus(tmp_path / "arrow", {"train": [cells]})
    manifest = convert(tmp_path / "arrow", tmp_path / "zarr", ConvertConfig(form="zarr"))
    group = zarr.open_group(tmp_path / "zarr" / "train.zarr", mode="r")
    assert group["indptr"][:].tolist() == cells.offsets.tolist()
    assert group["genes"][:].tolist() == cells.genes.tolist()
    assert group["expressions"][:].tolist() == cells.expressions.tolist()
    assert group["cell_id"][:].tolist() == cells.columns["cell_id"].tolist()
    assert (group["genes"].chunks, group["genes"].shards) == ((100,), (400,))
    store = manifest.splits["train"].store
    assert [file.file for file in store.files if "/genes/c" in file.file] == [f"train.zarr/genes/c/{i}" for i in (0, 1)]
    assert all(file.bytes <= 1600 for file in store.files if "/c/" in file.file)
    assert verify_corpus(tmp_path / "zarr", deep=True) == manifest


@pytest.mark.parametrize("codec", CODECS)
def test_two_conversions_give_equal_bytes_and_the_way_back_the_first_ones(tmp_path: Path, codec: str):
    cells = random_cells([200] * 900, dtype=np.uint32)
    parts = [cells.take(np.arange(500)), cells.take(np.arange(500, 900))]
    write_corpus(tmp_path / "first", {"train": parts, "valid": [random_cells([7, 2], dtype=np.uint32, source="c")]},
                 max_batch_values=1 << 20)
    plain = convert(tmp_path / "first", tmp_path / "arrow", ConvertConfig(form="arrow"))
    assert plain.splits == verify_corpus(tmp_path / "first").splits
    for name in ("one", "two"):
        as_zarr(tmp_path / "arrow", tmp_path / name, codec)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    convert(tmp_path / "one", tmp_path / "back", ConvertConfig(form="arrow"))
    assert bytes_of(tmp_path / "back") == bytes_of(tmp_path / "arrow")
    packed = convert(in_memory(tmp_path / "one"), tmp_path / "packed", ConvertConfig(form="arrow", compression="zstd"))
    assert packed.sources == plain.sources
    convert(tmp_path / "packed", tmp_path / "again", ConvertConfig(form="zarr", compression=codec))
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "one")


def test_the_cold_form_is_much_smaller_than_the_plain_one(tmp_path: Path):
    draw = np.random.default_rng(0)
    cells = random_cells([250] * 800)
    cells = RaggedBatch(cells.genes, draw.geometric(0.6, len(cells.genes)).astype(np.uint16), cells.offsets,
                        cells.columns)
    write_corpus(tmp_path / "arrow", {"train": [cells]})
    sizes = {codec: sum(file.bytes for file in convert(
        tmp_path / "arrow", tmp_path / codec, ConvertConfig(form="zarr", compression=codec)).splits["train"].files())
        for codec in CODECS}
    assert sizes["lz4"] < sizes["none"] / 2
    assert sizes["zstd"] < sizes["none"] / 2


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    write_corpus(folder / "arrow", {"train": [random_cells([20] * 40)]})
    for codec in CODECS:
        as_zarr(folder / "arrow", folder / codec, codec)
    return folder


@pytest.mark.parametrize("codec", CODECS)
def test_any_damage_to_a_store_is_found(stores: Path, tmp_path: Path, codec: str):
    """Whatever bytes stand in a store, reading ends in a DataError or in cells; verify finds each of them."""
    corpus = tmp_path / "corpus"
    shutil.copytree(stores / codec, corpus)
    draw, told = np.random.default_rng(3), 0
    paths = sorted(path for path in (corpus / "train.zarr").rglob("*") if path.is_file())
    for path in paths * 4:
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[int(draw.integers(0, len(content)))] ^= int(draw.integers(1, 256))
        path.write_bytes(bytes(damaged))
        try:
            assert len(TokenDataset.open(corpus).fetch(np.arange(40))) == 40
        except DataError:
            told += 1
        with pytest.raises(DataError):
            verify_corpus(corpus)
        path.write_bytes(content)
    assert told
    verify_corpus(corpus, deep=True)


def test_a_missing_shortened_or_additional_file_is_told(stores: Path, tmp_path: Path):
    corpus = tmp_path / "corpus"
    shutil.copytree(stores / "none", corpus)
    shard = corpus / "train.zarr" / "genes" / "c" / "0"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match="the file has .* bytes, the manifest says"):
        TokenDataset.open(corpus)
    shard.unlink()
    for read in (TokenDataset.open, verify_corpus):
        with pytest.raises(DataError, match=r"'train\.zarr/genes/c/0' is missing"):
            read(corpus)
    shard.write_bytes(content)
    shard.with_name("1").write_bytes(b"")
    with pytest.raises(DataError, match=r"'train\.zarr/genes/c/1' does not belong"):
        verify_corpus(corpus)


def test_a_store_that_does_not_fit_its_manifest_is_told(stores: Path, tmp_path: Path):
    write_corpus(tmp_path / "arrow", {"train": [random_cells([20] * 39)]})
    manifest = convert(tmp_path / "arrow", tmp_path / "zarr", ConvertConfig(form="zarr"))
    for name in ("indptr", "genes", "expressions", "cell_id"):
        shutil.rmtree(tmp_path / "zarr" / "train.zarr" / name)
        shutil.copytree(stores / "none" / "train.zarr" / name, tmp_path / "zarr" / "train.zarr" / name)
    files = zarr_format.store_files(tmp_path / "zarr", "train.zarr")
    split = manifest.splits["train"]
    store = split.store.model_copy(update={"files": files})
    splits = {"train": split.model_copy(update={"store": store})}
    manifest.model_copy(update={"splits": splits}).write(tmp_path / "zarr")
    with pytest.raises(DataError, match=r"'indptr' has shape \(41,\), the manifest says 40"):
        TokenDataset.open(tmp_path / "zarr")


@pytest.mark.parametrize(("name", "data_type"), [("genes", "int32"), ("expressions", "float64")])
def test_types_that_are_not_of_the_format_are_refused_before_a_value_is_read(tmp_path: Path, name: str, data_type: str):
    write_corpus(tmp_path / "arrow", {"train": [random_cells([20] * 39)]})
    manifest = convert(tmp_path / "arrow", tmp_path / "zarr", ConvertConfig(form="zarr"))
    described = tmp_path / "zarr" / "train.zarr" / name / "zarr.json"
    array = json.loads(described.read_text())
    described.write_text(json.dumps(array | {"data_type": data_type}))
    split = manifest.splits["train"]
    store = split.store.model_copy(update={"files": zarr_format.store_files(tmp_path / "zarr", "train.zarr")})
    splits = {"train": split.model_copy(update={"store": store})}
    manifest.model_copy(update={"splits": splits}).write(tmp_path / "zarr")
    with pytest.raises(DataError, match=f"'{name}' are of type {data_type}, not uint16 or uint32"):
        TokenDataset.open(tmp_path / "zarr")


def test_neither_cells_without_values_nor_zeros_alone_are_lost(tmp_path: Path):
    ids = random_cells([0, 0, 0]).columns
    empty = RaggedBatch(np.empty(0, np.uint16), np.empty(0, np.uint16), np.zeros(4, np.int64), ids)
    first_gene = RaggedBatch(np.zeros(3, np.uint16), np.ones(3, np.uint16), np.arange(4), ids)
    for name, cells in (("empty", empty), ("first", first_gene)):
        write_corpus(tmp_path / name, {"train": [cells]})
        for codec in CODECS:
            out = as_zarr(tmp_path / name, tmp_path / f"{name}-{codec}", codec)
            same_cells(TokenDataset.open(out).fetch(np.arange(3)), cells)
            verify_corpus(out, deep=True)


def test_a_store_cannot_be_mapped_for_hugging_face(stores: Path):
    with pytest.raises(DataError, match="only an Arrow corpus in a folder.*scgpt data convert"):
        TokenDataset.open(stores / "none").to_hf()


def test_threads_that_open_stores_leave_zarrs_settings_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another's pipeline left behind would write shards whose bytes differ from time to time."""
    pytest.importorskip("zarrs")
    write_corpus(tmp_path / "arrow", {"train": [random_cells([30, 40])]})
    dataset = TokenDataset.open(as_zarr(tmp_path / "arrow", tmp_path / "zarr"))
    before, open_group = zarr.config.get("codec_pipeline.path"), zarr.open_group
    within, first_done = threading.Barrier(2), threading.Event()

    def open_together(*args, **options):
        try:
            place = within.wait(timeout=1)   # both have changed the settings; they end one after the other
        except threading.BrokenBarrierError:
            place = 0                        # the other is kept out
        if place:
            first_done.wait(timeout=10)
        return open_group(*args, **options)

    def open_store(_: int) -> int:
        found = len(open_shards(dataset.files, dataset.entry).lengths(np.arange(2)))
        first_done.set()
        return found

    monkeypatch.setattr(zarr, "open_group", open_together)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(open_store, range(2))) == [2, 2]
    assert zarr.config.get("codec_pipeline.path") == before


def test_blosc_stays_on_one_thread_until_the_last_of_the_writers_has_ended(monkeypatch: pytest.MonkeyPatch):
    from numcodecs import blosc

    monkeypatch.setattr(blosc, "use_threads", True)
    first, second = zarr_format._single_threaded_blosc(), zarr_format._single_threaded_blosc()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert blosc.use_threads is False
    second.__exit__(None, None, None)
    assert blosc.use_threads is True
