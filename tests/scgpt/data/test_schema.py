import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scgpt.data.schema import RaggedBatch, cell_ids, check_cells, expression_dtype, gene_dtype
from scgpt.errors import DataError

from .cells import N_TOKENS, cells_strategy, random_cells


@given(cells_strategy, st.data())
def test_take_gives_the_asked_cells_in_the_asked_order(cells: RaggedBatch, data: st.DataObject):
    order = np.array(data.draw(st.lists(st.integers(0, len(cells) - 1), max_size=40)), int)
    taken = cells.take(order)
    assert taken.columns["cell_id"].tolist() == cells.columns["cell_id"][order].tolist()
    for position, cell in enumerate(order):
        got = slice(*taken.offsets[position:position + 2])
        want = slice(*cells.offsets[cell:cell + 2])
        assert taken.genes[got].tolist() == cells.genes[want].tolist()
        assert taken.expressions[got].tolist() == cells.expressions[want].tolist()


@given(cells_strategy, st.integers(0, 30))
def test_concatenating_the_parts_of_a_batch_gives_the_batch(cells: RaggedBatch, cut: int):
    cut = min(cut, len(cells))
    whole = RaggedBatch.concatenate([cells.take(np.arange(cut)), cells.take(np.arange(cut, len(cells)))])
    for name in ("genes", "expressions", "offsets"):
        assert np.array_equal(getattr(whole, name), getattr(cells, name))


@given(cells_strategy)
def test_valid_cells_pass_the_check(cells: RaggedBatch):
    check_cells(cells, n_tokens=N_TOKENS, where="here")
    assert cells.offsets[-1] == cells.lengths.sum()


@pytest.mark.parametrize(("field", "index", "value", "says"), [
    ("genes", 5, 0, "do not ascend"), ("genes", 9, N_TOKENS, "outside the vocabulary"),
    ("expressions", 3, 0, "above 0"), ("expressions", 3, np.nan, "above 0"), ("expressions", 3, np.inf, "above 0"),
    ("offsets", 2, 0, "boundaries"), ("offsets", 3, 99, "boundaries"),
])
def test_a_cell_that_breaks_an_invariant_is_named(field: str, index: int, value: float, says: str):
    cells = random_cells([4, 6, 5], dtype=np.float32)
    broken = getattr(cells, field).copy()
    broken[index] = value
    with pytest.raises(DataError, match=says) as caught:
        check_cells(dataclasses.replace(cells, **{field: broken}), n_tokens=N_TOKENS, where="part-00000.arrow")
    assert "part-00000.arrow" in str(caught.value)


def test_cell_ids_hold_the_source_above_and_the_row_below():
    ids = cell_ids("lung", np.array([0, 1, (1 << 32) - 1]))
    assert ids.dtype == np.uint64
    assert {int(i) >> 32 for i in ids} == {int(hashlib.sha256(b"lung").hexdigest()[:8], 16)}
    assert (ids & np.uint64(0xFFFFFFFF)).tolist() == [0, 1, (1 << 32) - 1]


@pytest.mark.parametrize(("integer", "largest", "dtype"), [
    (True, 65_535, np.uint16), (True, 65_536, np.uint32), (True, 2.0**32, np.float32), (False, 3, np.float32),
])
def test_one_value_type_is_the_smallest_that_holds_all(integer: bool, largest: float, dtype: type):
    assert expression_dtype(integer=integer, largest=largest) == dtype
    assert (gene_dtype(65_536), gene_dtype(65_537)) == (np.uint16, np.uint32)
