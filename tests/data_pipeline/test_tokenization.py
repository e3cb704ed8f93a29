from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numba import njit
from scipy import sparse

from data_pipeline import tokenization
from data_pipeline.genes import UNMAPPED, map_source, match_genes
from data_pipeline.sources import open_source
from data_pipeline.sources.anndata_files import AnnDataFile
from data_pipeline.tokenization import SUM_IN, SUM_MITO, SUM_UNMAPPED, VALUES_IN, tokenize_block
from scgpt.data.schema import CELL_ID, SOURCE_ROW, cell_ids, check_cells
from scgpt.errors import SourceError
from tests.data_pipeline.atlases import BLOOD, CHR21, GENES, PANCREAS, VOCAB, random_counts, write_h5ad

# two columns of one token, two without any, an order that is not the vocabulary's, a mitochondrial gene
NAMES = ["MT-CO1", "CD8A", "CD3D", "nonsense", "ENSG00000167286", "A1BG", "ERCC-00002", "ZZZ3"]


def slow_tokens(row: np.ndarray, names: list[str]) -> dict[int, float]:
    """One cell by dictionaries: what the compiled loop must agree with."""
    tokens = match_genes(names, VOCAB).tokens
    found: dict[int, float] = {}
    for value, token in zip(row.tolist(), tokens.tolist(), strict=True):
        if value and token != UNMAPPED:
            found[token] = found.get(token, 0.0) + value
    return dict(sorted(found.items()))


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.just(len(NAMES))), elements=st.integers(0, 5).map(float)),
       st.sampled_from(["csr", "csc", "dense"]))
def test_the_compiled_loop_agrees_with_dictionaries(tmp_path_factory: pytest.TempPathFactory, values: np.ndarray,
                                                    form: str) -> None:
    matrix = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[form](values)
    path = write_h5ad(tmp_path_factory.mktemp("t") / "a.h5ad", matrix, NAMES)
    with open_source(path) as source:
        cells = tokenize_block(source, match_genes(NAMES, VOCAB), 0, len(values))
    check_cells(cells, n_tokens=len(VOCAB), where="test")
    unmapped = match_genes(NAMES, VOCAB).tokens == UNMAPPED
    for i, row in enumerate(values):
        part = slice(cells.offsets[i], cells.offsets[i + 1])
        found = dict(zip(cells.genes[part].tolist(), cells.expressions[part].tolist(), strict=True))
        assert list(found.items()) == list(slow_tokens(row, NAMES).items())
    assert np.array_equal(cells.columns[VALUES_IN], (values > 0).sum(axis=1))
    assert np.array_equal(cells.columns[SUM_IN], values.sum(axis=1))
    assert np.array_equal(cells.columns[SUM_MITO], values[:, 0])
    assert np.array_equal(cells.columns[SUM_UNMAPPED], values[:, unmapped].sum(axis=1))
    assert cells.expressions.dtype == np.uint16
    assert cells.genes.dtype == np.uint16


@pytest.mark.parametrize("path", [PANCREAS, BLOOD, CHR21], ids=lambda path: path.stem)
def test_real_cells_agree_with_dictionaries_and_lose_no_count(path: Path) -> None:
    with open_source(path) as source:
        gene_map = map_source(source, VOCAB)
        names = source.gene_names(gene_map.column)
        cells = tokenize_block(source, gene_map, 100, 110)
        rows = source.read_rows(100, 110).toarray()
    check_cells(cells, n_tokens=len(VOCAB), where=str(path))
    for i, row in enumerate(rows):
        part = slice(cells.offsets[i], cells.offsets[i + 1])
        found = dict(zip(cells.genes[part].tolist(), cells.expressions[part].tolist(), strict=True))
        assert found == slow_tokens(row, names)
    assert cells.expressions.sum(dtype=np.float64) + cells.columns[SUM_UNMAPPED].sum() == rows.sum(dtype=np.float64)
    assert cells.columns[SOURCE_ROW].tolist() == list(range(100, 110))
    assert np.array_equal(cells.columns[CELL_ID], cell_ids(path.stem, np.arange(100, 110)))


def test_a_block_is_the_same_however_the_rows_are_cut() -> None:
    with open_source(BLOOD) as source:
        gene_map = map_source(source, VOCAB)
        whole = tokenize_block(source, gene_map, 0, 300)
        parts = [tokenize_block(source, gene_map, *rows) for rows in ((0, 1), (1, 120), (120, 120), (120, 300))]
    joined = type(whole).concatenate(parts)
    for name in ("genes", "expressions", "offsets"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name))


@pytest.mark.parametrize(("value", "message"), [
    (-3.0, "row 7 holds -3, one of negative values.*counts are expected"),
    (np.nan, "row 7 holds nan, one of NaN or infinite values"), (np.inf, "row 7 holds inf"),
    (2.5, "row 7 holds 2.5, one of .*counts are expected")])
def test_a_value_that_is_no_count_names_its_row(tmp_path: Path, value: float, message: str) -> None:
    matrix = random_counts(2, 20, 30)
    matrix.data[matrix.indptr[8] - 1] = value
    path = write_h5ad(tmp_path / "poor.h5ad", matrix)
    with open_source(path) as source, pytest.raises(SourceError, match=message) as caught:
        tokenize_block(source, map_source(source, VOCAB), 5, 20)
    assert "poor.h5ad, X" in str(caught.value)


def test_a_layer_or_raw_that_holds_counts_is_suggested(tmp_path: Path) -> None:
    counts = random_counts(3, 20, 30)
    for name, others, better in (("a", {"layers": {"spliced": counts, "counts": counts}}, "counts"),
                                 ("b", {"raw": counts, "layers": {"counts": counts}}, "raw"),
                                 ("c", {"layers": {"scaled": counts.log1p()}}, None)):
        path = write_h5ad(tmp_path / f"{name}.h5ad", counts.log1p(), **others)
        with open_source(path, layer="X") as source, pytest.raises(SourceError) as caught:
            tokenize_block(source, map_source(source, VOCAB), 0, 20)
        suggested = caught.value.fix.partition("set layer: ")[2].partition(",")[0]
        assert suggested == (better or "")


def test_other_values_are_stored_as_float32(tmp_path: Path) -> None:
    matrix = random_counts(4, 20, 30).log1p()
    with open_source(write_h5ad(tmp_path / "a.h5ad", matrix)) as source:
        cells = tokenize_block(source, map_source(source, VOCAB), 0, 20, counts=False)
    assert cells.expressions.dtype == np.float32
    assert np.allclose(np.sort(cells.expressions), np.sort(matrix.data))


def test_large_counts_keep_every_digit(tmp_path: Path) -> None:
    matrix = sparse.csr_matrix(np.array([[2.0**31, 1, 0], [0, 7, 2.0**24 + 1]]))
    with open_source(write_h5ad(tmp_path / "a.h5ad", matrix, GENES[:3])) as source:
        cells = tokenize_block(source, map_source(source, VOCAB), 0, 2)
    assert cells.expressions.tolist() == [2**31, 1, 7, 2**24 + 1]


@pytest.mark.parametrize(("last", "kind"), [(2.0**16 - 1, np.uint16), (2.0**16, np.uint32), (2.0**32 - 1, np.uint32),
                                            (2.0**32, np.float32)])
def test_one_value_too_wide_for_an_integer_widens_the_block(tmp_path: Path, last: float, kind: type) -> None:
    matrix = sparse.csr_matrix(np.array([[3.0, 1, 0], [0, 7, last]]))
    with open_source(write_h5ad(tmp_path / "a.h5ad", matrix, GENES[:3])) as source:
        cells = tokenize_block(source, map_source(source, VOCAB), 0, 2)
    assert cells.expressions.dtype == kind
    assert cells.expressions.tolist() == [3, 1, 7, last]
    assert cells.columns[SUM_IN].tolist() == [4, 7 + last]


@pytest.mark.parametrize("counts", [True, False])
def test_a_value_that_float32_may_not_hold_is_refused(tmp_path: Path, counts: bool) -> None:
    matrix = sparse.csr_matrix(np.array([[3.0, 1, 0], [0, 7, 1e300]]))
    with (open_source(write_h5ad(tmp_path / "a.h5ad", matrix, GENES[:3])) as source,
          pytest.raises(SourceError, match="row 1 holds 1e.300, one of values above 1e.30, where")):
        tokenize_block(source, map_source(source, VOCAB), 0, 2, counts=counts)


def test_halves_of_one_gene_that_add_up_are_an_integer(tmp_path: Path) -> None:
    halves = np.array([[0, 0, 0.5, 0, 0.5, 2, 0, 0]])   # two columns of CD3D
    with open_source(write_h5ad(tmp_path / "a.h5ad", sparse.csr_matrix(halves), NAMES)) as source:
        cells = tokenize_block(source, match_genes(NAMES, VOCAB), 0, 1, counts=False)
    assert (cells.expressions.dtype, sorted(cells.expressions.tolist())) == (np.uint16, [1, 2])


def test_a_block_is_the_same_in_pieces_and_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_counts(5, 60, 40)
    matrix.data[matrix.indptr[20]] = 2.0**16   # from here on wider
    path = write_h5ad(tmp_path / "a.h5ad", sparse.vstack([matrix, sparse.csr_matrix((3, 40)), matrix]).tocsr())
    found = []
    for values in (1, 50, None):
        monkeypatch.setattr(AnnDataFile, "piece_values", values)
        with open_source(path) as source:
            found.append(tokenize_block(source, map_source(source, VOCAB), 2, 123))
    for other in found[:2]:
        assert other.expressions.dtype == np.uint32
        for name in ("genes", "expressions", "offsets"):
            assert np.array_equal(getattr(other, name), getattr(found[2], name))
        assert all(np.array_equal(other.columns[name], column) for name, column in found[2].columns.items())


@pytest.mark.parametrize("values", [1, 50])
def test_a_poor_value_names_its_row_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    matrix = random_counts(2, 20, 30)
    matrix.data[matrix.indptr[8] - 1] = -3
    monkeypatch.setattr(AnnDataFile, "piece_values", values)
    path = write_h5ad(tmp_path / "a.h5ad", matrix)
    with open_source(path) as source, pytest.raises(SourceError, match="row 7 holds"):
        tokenize_block(source, map_source(source, VOCAB), 5, 20)


def test_the_lowest_bit_is_found_at_every_place() -> None:
    words = np.array([(1 << place) | (1 << 63) for place in range(64)], np.uint64)
    assert _lowest_bits(words).tolist() == list(range(64))


@njit
def _lowest_bits(words: np.ndarray) -> np.ndarray:
    return np.array([tokenization._lowest_bit(word) for word in words])
