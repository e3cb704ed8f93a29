import copy
import dataclasses
import hashlib
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scgpt.collate import CollateConfig, collate
from scgpt.data.schema import CellViews, RaggedBatch, cell_ids, check_cells, expression_dtype, gene_dtype
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


@pytest.mark.parametrize(("changed", "says"), [
    ({"offsets": np.array([0, 4, 10, 16])}, "boundaries"), ({"offsets": np.array([1, 4, 10, 15])}, "boundaries"),
    ({"offsets": np.array([0, 11, 10, 15])}, "boundaries"), ({"expressions": np.ones(14, np.uint16)}, "boundaries"),
    ({"columns": {"cell_id": np.arange(4, dtype=np.uint64)}}, "'cell_id' has 4 values for 3 cells"),
    ({"genes": np.arange(15)}, "'genes' are of type int64, not uint16 or uint32"),
    ({"genes": np.arange(15, dtype=">u2")}, "'genes' are of type >u2"),
    ({"expressions": np.ones(15)}, "'expressions' are of type float64, not uint16 or uint32 or float32"),
    ({"expressions": np.ones(15, np.int32)}, "'expressions' are of type int32"),
])
def test_what_compiled_loops_would_misread_is_refused(changed: dict[str, np.ndarray], says: str):
    cells = random_cells([4, 6, 5])
    cells.views()
    with pytest.raises(DataError, match=says):
        dataclasses.replace(cells, **changed).views()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_views_are_not_taken_where_their_addresses_mean_nothing(duplicate: Callable[[CellViews], object]):
    with pytest.raises(TypeError, match="addresses in this process"):
        duplicate(random_cells([4, 6, 5]).views())


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.float32])
def test_arrays_with_gaps_or_between_words_give_the_same_batch(dtype: type):
    cells = random_cells([40, 0, 6], dtype=dtype)
    genes, ids = np.repeat(cells.genes, 2)[::2], np.repeat(cells.columns["cell_id"], 3)[::3]
    between_words = np.frombuffer(b"x" + cells.expressions.tobytes(), np.uint8)[1:].view(dtype)
    assert not any((genes.flags.c_contiguous, ids.flags.c_contiguous, between_words.flags.aligned))
    other = RaggedBatch(genes, between_words, cells.offsets, {"cell_id": ids})
    found, expected = (collate(one, CollateConfig(30), cls_id=0, seed=0, epochs=0) for one in (other, cells))
    for name in ("gene_ids", "values", "targets", "target_mask", "cell_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


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
