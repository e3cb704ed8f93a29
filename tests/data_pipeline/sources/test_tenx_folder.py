from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_pipeline import plan
from data_pipeline.sources import matrix_market, open_source
from scgpt.errors import ScgptError, SourceError
from tests.data_pipeline.atlases import build_here, cells_of, config_of, random_counts, write_h5ad
from tests.data_pipeline.sources.formats import gene_names, on_memory, write_tenx_folder

COUNTS = random_counts(1, 60, 40)


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 9)), elements=st.integers(0, 3).map(float)),
       st.booleans(), st.booleans(), st.integers(0, 2**31), st.data())
def test_any_matrix_in_any_order_reads_back(tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, v2: bool,
                                            compressed: bool, seed: int, data: st.DataObject) -> None:
    order = np.random.default_rng(seed).permutation(int((values > 0).sum()))
    folder = write_tenx_folder(tmp_path_factory.mktemp("m"), values, v2=v2, compressed=compressed, order=order,
                               prefix=data.draw(st.sampled_from(["", "GSM1_lung_"])))
    first = data.draw(st.integers(0, len(values)))
    last = data.draw(st.integers(first, len(values)))
    with open_source(folder) as source:
        assert (source.kind, source.n_cells, source.n_genes) == ("10x_mtx", *values.shape)
        assert np.array_equal(source.read_rows(first, last).toarray(), values[first:last])
        assert len(source.value_offsets(first, last)) == last - first + 1
        assert sorted(source.probe()) == sorted(values[values > 0])
        assert source.obs(["barcode"], first, last)["barcode"].to_pylist() == [f"AAAC{i}-1" for i in range(first, last)]


@pytest.mark.parametrize("piece_bytes", [29, 1 << 20])
def test_cut_row_blocks_equal_the_rows(tmp_path: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_market, "PIECE_BYTES", piece_bytes)
    with open_source(write_tenx_folder(tmp_path / "m", COUNTS)) as source:
        bounds = [0, 1, 20, 21, 60]
        assert len(source.cut_row_blocks(bounds[:-1], tmp_path / "cut")) == 4
        source.use_row_blocks(tmp_path / "cut")
        for first, last in pairwise(bounds):
            assert np.array_equal(source.read_rows(first, last).toarray(), COUNTS[first:last].toarray())


def test_fractions_and_wide_blanks_are_read(tmp_path: Path) -> None:
    halves = COUNTS.multiply(0.5).tocsr()
    folder = write_tenx_folder(tmp_path / "m", halves, compressed=False)
    text = (folder / "matrix.mtx").read_text()
    head, lines = text[:text.index("\n40 60")], text[text.index("\n40 60"):]
    (folder / "matrix.mtx").write_text(head + lines.replace(" ", "\t ").replace("\n", "\r\n"))
    with open_source(folder) as source:
        assert np.array_equal(source.read_rows(0, 60).toarray(), halves.toarray())


def test_only_gene_expression_is_read(tmp_path: Path) -> None:
    types = ["Multiplexing Capture" if i < 3 else "Gene Expression" for i in range(40)]
    with open_source(write_tenx_folder(tmp_path / "m", COUNTS, types=types)) as source:
        assert source.gene_names() == gene_names(40)[3:]
        assert np.array_equal(source.read_rows(0, 60).toarray(), COUNTS[:, 3:].toarray())
        assert source.remarks() == ["3 features of 'Multiplexing Capture' left out"]


def test_a_third_column_of_something_else_leaves_no_gene_out(tmp_path: Path) -> None:
    with open_source(write_tenx_folder(tmp_path / "m", COUNTS, types=["chr1"] * 40)) as source:
        assert (source.n_genes, source.remarks()) == (40, [])


@pytest.mark.parametrize("block_values", [200, 1 << 22])
def test_a_build_has_the_cells_of_the_same_h5ad(tmp_path: Path, block_values: int,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BLOCK_VALUES", block_values)
    build_here(config_of(write_h5ad(tmp_path / "a.h5ad", COUNTS)), tmp_path / "expected")
    build_here(config_of(write_tenx_folder(tmp_path / "a", COUNTS)), tmp_path / "found")
    assert cells_of(tmp_path / "found") == cells_of(tmp_path / "expected")


def test_a_folder_behind_a_url_reads_the_same(tmp_path: Path) -> None:
    with on_memory(write_tenx_folder(tmp_path / "lung", COUNTS)) as url, open_source(url) as source:
        assert (source.kind, source.name) == ("10x_mtx", "lung")
        assert np.array_equal(source.read_rows(17, 44).toarray(), COUNTS[17:44].toarray())


def change(file: str, old: bytes, new: bytes) -> object:
    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        assert old in content
        (folder / file).write_bytes(content.replace(old, new, 1))
    return damage


BAD = {
    "no barcodes": (lambda folder: (folder / "barcodes.tsv").unlink(), "it holds no barcodes.tsv"),
    "two matrices": (lambda folder: (folder / "b_matrix.mtx").touch(), "several of matrix.mtx: b_matrix.mtx, matrix.m"),
    "few barcodes": (change("barcodes.tsv", b"AAAC7-1\n", b""), "40 x 60 with 40 features and 59 barcodes"),
    "few features": (change("features.tsv", b"id0\t", b"extra\textra\tGene Expression\nid0\t"), "with 41 features"),
    "no features": (lambda folder: (folder / "features.tsv").write_bytes(b""), "it lists no genes"),
    "no banner": (change("matrix.mtx", b"%%Matrix", b"%Matrix"), "no MatrixMarket file"),
    "symmetric": (change("matrix.mtx", b"general", b"symmetric"), "'coordinate integer symmetric'"),
    "no sizes": (lambda folder: (folder / "matrix.mtx").write_bytes(
        b"%%MatrixMarket matrix coordinate integer general\n%\n"), "without its line of three sizes"),
    "more entries": (change("matrix.mtx", b"40 60 480\n", b"40 60 479\n"), "480 entries where the header says 479"),
    "fewer entries": (change("matrix.mtx", b"40 60 480\n", b"40 60 481\n"), "480 entries where the header says 481"),
    "too many": (change("matrix.mtx", b"40 60 480\n", b"40 60 1000000000000000000000\n"),
                 "entries in a matrix of 40 x 60"),
    "a word": (change("matrix.mtx", b"\n40 60 480\n", b"\n40 60 480\n3 x 1\n"), "cannot be read"),
    "zero": (change("matrix.mtx", b"\n40 60 480\n", b"\n40 60 480\n0 1 1\n"), "row index outside the 40"),
    "beyond": (change("matrix.mtx", b"\n40 60 480\n", b"\n40 60 480\n1 61 1\n"), "column index outside the 60"),
    "two words": (change("matrix.mtx", b"\n40 60 480\n", b"\n40 60 480\n1 2\n"), "cannot be read"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_damaged_folder_is_one_sentence_with_its_place(tmp_path: Path, fault: str) -> None:
    folder = write_tenx_folder(tmp_path / "poor", COUNTS, compressed=False)
    damage, message = BAD[fault]
    damage(folder)
    with pytest.raises(SourceError, match=message) as caught, open_source(folder, kind="10x_mtx") as source:
        source.read_rows(0, source.n_cells)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_gzip_file_makes_no_corpus(tmp_path: Path) -> None:
    folder = write_tenx_folder(tmp_path / "a", COUNTS)
    content = (folder / "matrix.mtx.gz").read_bytes()
    (folder / "matrix.mtx.gz").write_bytes(content[:-200])
    with pytest.raises(SourceError, match="cannot be read: Compressed file ended"):
        build_here(config_of(folder), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["matrix.mtx", "barcodes.tsv", "features.tsv"]), st.integers(0, 2**31), st.integers(1, 8))
def test_random_bytes_in_a_file_give_an_error_or_values(tmp_path_factory: pytest.TempPathFactory, name: str, seed: int,
                                                        n_bytes: int) -> None:
    folder = write_tenx_folder(tmp_path_factory.mktemp("g"), random_counts(1, 30, 20), compressed=seed % 2 == 0)
    path = next(folder.glob(f"{name}*"))
    draw = np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    for place in draw.integers(0, len(content), n_bytes):
        content[place] = draw.integers(256)
    path.write_bytes(content)
    try:
        with open_source(folder) as source:
            rows = source.read_rows(0, source.n_cells)
            assert rows.shape == (source.n_cells, len(source.gene_names()))
    except ScgptError as error:
        assert str(folder) in str(error)  # noqa: PT017 some damage does not show
