import numpy as np
import pytest

from data_pipeline import ledger as books
from data_pipeline.cells import KEPT
from data_pipeline.genes import map_source
from data_pipeline.ledger import Ledger
from data_pipeline.sources import open_source
from data_pipeline.tokenization import tokenize_block
from scgpt.data.schema import RaggedBatch
from scgpt.errors import DataError
from tests.data_pipeline.atlases import BLOOD, VOCAB


@pytest.fixture(scope="module")
def cells() -> RaggedBatch:
    with open_source(BLOOD) as source:
        return tokenize_block(source, map_source(source, VOCAB), 0, 100)


def test_a_block_s_books_add_up_to_what_the_file_holds(cells: RaggedBatch) -> None:
    reasons = np.full(100, KEPT, np.int8)
    reasons[:10], reasons[10:13] = 2, 0
    splits = (np.arange(100) % 4 == 0).astype(np.int8)
    ledger = books.of_block(cells, reasons, splits, where="test")
    with open_source(BLOOD) as source:
        rows = source.read_rows(0, 100)
    assert (ledger.cells_in, ledger.filtered) == (100, {"filter": 3, "min_genes": 10})
    assert ledger.cells_written == {"train": 66, "valid": 21}
    assert (ledger.values_in, ledger.sum_in) == (rows.nnz, rows.sum())
    assert ledger.sum_written + ledger.sum_filtered + ledger.sum_unmapped == rows.sum()
    assert ledger.values_written == cells.lengths[13:].sum()


def test_ledgers_add_up(cells: RaggedBatch) -> None:
    reasons, splits = np.full(100, KEPT, np.int8), np.zeros(100, np.int8)
    reasons[50:] = 3
    halves = [books.of_block(cells.take(part), reasons[part], splits[part], where="test")
              for part in (np.arange(40), np.arange(40, 100))]
    assert books.total(halves) == books.of_block(cells, reasons, splits, where="test")


def test_a_lost_value_is_noticed(cells: RaggedBatch) -> None:
    fewer = RaggedBatch(cells.genes, cells.expressions.copy(), cells.offsets, cells.columns)
    fewer.expressions[1234] -= 1
    with pytest.raises(DataError, match="counts of .* came in.*rows 0 to 100"):
        books.of_block(fewer, np.full(100, KEPT, np.int8), np.zeros(100, np.int8), where="rows 0 to 100")


def test_a_lost_cell_is_noticed() -> None:
    with pytest.raises(DataError, match="5 cells came in, accounted for: 4"):
        books.check(Ledger(5, {"train": 3}, {"filter": 1}), where="test")


def test_sums_of_fractions_agree_to_rounding_and_counts_exactly() -> None:
    books.same(1e9 + 0.5, (1e9 + 0.5) * (1 + 1e-9), what="sum", where="")
    for wrong in (1e9 + 1, 1e9 * (1 + 1e-5) + 0.5):
        with pytest.raises(DataError):
            books.same(1e9, wrong, what="sum", where="")
