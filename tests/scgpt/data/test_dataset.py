import gc
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from scgpt.collate import CollateConfig, collate
from scgpt.data import TokenDataset, verify_corpus, zarr_format
from scgpt.data.convert import ConvertConfig, convert
from scgpt.errors import DataError

from .cells import N_TOKENS, random_cells, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", {
        "train": [random_cells([5, 9, 1]), random_cells([3] * 9, seed=1, source="b")],
        "valid": [random_cells([7, 2], seed=2, source="c")],
    })
    return tmp_path / "corpus"


def files_of(corpus: Path) -> list[Path]:
    return sorted(path for path in corpus.rglob("*") if path.is_file())


def test_verify_accepts_a_whole_corpus(corpus: Path):
    manifest = verify_corpus(corpus, deep=True)
    assert {name: split.cells for name, split in manifest.splits.items()} == {"train": 12, "valid": 2}
    assert len(files_of(corpus)) == 8


@pytest.mark.parametrize("index", range(8))
def test_verify_finds_one_changed_byte_in_any_file(corpus: Path, index: int):
    path = files_of(corpus)[index]
    content = path.read_bytes()
    for position in {0, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1:])
        with pytest.raises(DataError):
            verify_corpus(corpus)
    path.write_bytes(content)
    verify_corpus(corpus)


@pytest.mark.parametrize("index", range(8))
def test_verify_finds_a_missing_file(corpus: Path, index: int):
    files_of(corpus)[index].unlink()
    with pytest.raises(DataError):
        verify_corpus(corpus)


def test_verify_finds_a_file_that_does_not_belong(corpus: Path):
    (corpus / "train" / "part-00009.arrow").write_bytes(b"")
    with pytest.raises(DataError, match=r"'train/part-00009\.arrow' does not belong"):
        verify_corpus(corpus)


def test_gene_ids_beyond_the_vocabulary_are_told_before_a_model_sees_them(corpus: Path):
    genes = TokenDataset.open(corpus).fetch(np.array([1])).genes
    part = corpus / "train" / "part-00000.arrow"
    content = part.read_bytes()
    assert content.count(genes.tobytes()) == 1
    part.write_bytes(content.replace(genes.tobytes(), b"\xff" * genes.nbytes))
    dataset = TokenDataset.open(corpus)
    dataset.fetch(np.array([0, 2]))
    with pytest.raises(DataError, match="cell 1 of split 'train' .* beyond the vocabulary .*scgpt data verify"):
        dataset.fetch(np.array([0, 1]))


@pytest.mark.parametrize("unexpressed_genes", [0, 5])
@pytest.mark.parametrize(("dtype", "gene"), [
    (np.uint16, N_TOKENS - 1), (np.uint16, N_TOKENS), (np.uint32, N_TOKENS - 1), (np.uint32, N_TOKENS),
    (np.uint32, 1 << 31), (np.uint32, (1 << 32) - 1),   # negative as the int32 of a batch
])
def test_gene_ids_beyond_the_vocabulary_are_told_where_cells_are_read_in_place(tmp_path: Path, dtype: type, gene: int,
                                                                               unexpressed_genes: int):
    cells = random_cells([5, 9, 1])
    write_corpus(tmp_path, {"train": [replace(cells, genes=cells.genes.astype(dtype))]})
    genes = TokenDataset.open(tmp_path).fetch(np.array([1])).genes
    damaged = genes.copy()
    damaged[len(genes) // 2] = gene   # as ids ascend, the last one is not the largest any more
    part = tmp_path / "train" / "part-00000.arrow"
    part.write_bytes(part.read_bytes().replace(genes.tobytes(), damaged.tobytes()))
    dataset = TokenDataset.open(tmp_path)
    config = CollateConfig(20, unexpressed_genes=unexpressed_genes, gene_ids=np.arange(N_TOKENS - 3, dtype=np.int32))
    collate(dataset.views(np.array([0, 2])), config, cls_id=N_TOKENS - 2, seed=0, epochs=0)
    if gene < N_TOKENS:
        batch = collate(dataset.views(np.array([2, 1, 0])), config, cls_id=N_TOKENS - 2, seed=0, epochs=0)
        assert gene in batch.gene_ids
        return
    with pytest.raises(DataError, match="cell 1 of split 'train' .* beyond the vocabulary .*scgpt data verify"):
        collate(dataset.views(np.array([2, 1, 0])), config, cls_id=N_TOKENS - 2, seed=0, epochs=0)


def test_views_outlive_what_they_were_asked_of(corpus: Path):
    dataset = TokenDataset.open(corpus)
    expected = collate(dataset.fetch(np.arange(12)), CollateConfig(20), cls_id=0, seed=0, epochs=0)
    views = dataset.views(np.arange(12))
    del dataset
    gc.collect()
    np.testing.assert_array_equal(collate(views, CollateConfig(20), cls_id=0, seed=0, epochs=0).targets,
                                  expected.targets)


def test_one_cell_by_index(corpus: Path):
    dataset = TokenDataset.open(corpus)
    last = dataset[-1]
    assert last["genes"].tolist() == dataset.fetch(np.array([11])).genes.tolist()
    with pytest.raises(IndexError):
        dataset[12]
    for read in (dataset.fetch, dataset.views):
        with pytest.raises(IndexError):
            read(np.array([0, -1]))


def test_codes_number_the_sorted_values_over_all_shards(corpus: Path):
    codes, donors = TokenDataset.open(corpus).codes("donor")
    assert donors == ["d0", "d1", "d2"]
    assert codes.tolist() == [0, 1, 2, 0, 1, 2, 0, -1, 2, 0, 1, 2]
    with pytest.raises(DataError, match=r"no column 'doner'.*choose one of: source, donor"):
        TokenDataset.open(corpus).codes("doner")


def test_hugging_face_datasets_opens_the_shards(corpus: Path):
    dataset = TokenDataset.open(corpus)
    hf = dataset.to_hf(columns=["donor"])
    assert isinstance(hf, datasets.Dataset)
    assert len(hf) == 12
    assert hf[4]["genes"] == dataset[4]["genes"].tolist()
    assert hf[4]["expressions"] == dataset[4]["expressions"].tolist()
    assert hf[4]["cell_id"] == dataset[4]["cell_id"]
    assert hf[4]["donor"] == "d1"
    assert [Path(file["filename"]).name for file in dataset.to_hf().cache_files] == ["part-00000.arrow",
                                                                                   "part-00001.arrow"]


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda c: (c / "manifest.json").unlink(), "not a corpus"),
    (lambda c: (c / "train" / "part-00001.arrow").unlink(), "is missing"),
])
def test_opening_what_is_no_corpus_says_so(corpus: Path, spoil, says: str):
    spoil(corpus)
    with pytest.raises(DataError, match=says):
        TokenDataset.open(corpus)


def test_a_corpus_that_may_not_be_read_is_not_called_none(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(DataError, match=r"^the file cannot be read: Permission denied .*; check .* permissions"):
        TokenDataset.open(corpus)


def test_an_unknown_split_lists_the_splits(corpus: Path):
    with pytest.raises(DataError, match="no split 'test'.*train, valid"):
        TokenDataset.open(corpus, "test")


FORKED = """
import os, signal, sys
import numpy as np
from scgpt.data import TokenDataset, record_batches, zarr_chunks
from tests.scgpt.data.cells import in_memory

record_batches.CACHE_BYTES = zarr_chunks.CACHE_BYTES = 0   # the child reads
for folder in sys.argv[1:]:
    for place in (folder, in_memory(folder)):
        dataset, cells = TokenDataset.open(place), np.array([0, 1])
        expected = dataset.fetch(cells).genes
        dataset.fetch(np.array([11]))   # one chunk is kept all the same
        child = os.fork()
        if child == 0:
            signal.alarm(30)   # one that waits for threads that are not there
            same = np.array_equal(dataset.fetch(cells).genes, expected) and len(dataset.obs()) == len(dataset)
            os._exit(0 if same else 1)
        print(place, os.waitpid(child, 0)[1])
"""


def test_a_forked_process_reads_what_its_parent_opened(corpus: Path, tmp_path: Path, monkeypatch):
    """As the workers of a PyTorch DataLoader do: zarr, its codecs and fsspec leave their threads behind."""
    monkeypatch.setattr(zarr_format, "CHUNK_ITEMS", 8)
    folders = [corpus]
    for form, compression in (("arrow", "zstd"), ("zarr", "none"), ("zarr", "lz4")):
        folders.append(tmp_path / f"{form}-{compression}")
        convert(corpus, folders[-1], ConvertConfig(form=form, compression=compression))
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", FORKED, *map(str, folders)], capture_output=True, text=True,
                          check=False, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    assert [line.rpartition(" ")[2] for line in done.stdout.splitlines()] == ["0"] * 8, done.stdout + done.stderr


@pytest.mark.parametrize("indices", [np.array([True, False]), np.array([1.0])])
def test_what_is_no_index_is_refused(corpus: Path, indices: np.ndarray):
    with pytest.raises(IndexError, match="integer indices, not by values of type"):
        TokenDataset.open(corpus).fetch(indices)


def test_another_vocabulary_is_refused(corpus: Path):
    path = corpus / "vocab.json"
    path.write_text(path.read_text().replace('"g7"', '"h7"'))
    with pytest.raises(DataError, match="not the vocabulary"):
        TokenDataset.open(corpus).vocab  # noqa: B018
