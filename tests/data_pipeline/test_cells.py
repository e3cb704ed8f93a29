import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.cells import (
    KEPT,
    REASONS,
    ObsReader,
    as_text,
    groups_in_splits,
    judge,
    own_name,
    splits_of_groups,
)
from data_pipeline.config import CellsConfig, SourceConfig, SplitsConfig
from data_pipeline.genes import map_source
from data_pipeline.sources import open_source
from data_pipeline.tokenization import SUM_IN, SUM_MITO, SUM_UNMAPPED, tokenize_block
from scgpt.config import validate
from scgpt.data.schema import RaggedBatch, offsets_of
from scgpt.errors import ConfigError
from tests.data_pipeline.atlases import BLOOD, CHR21, PANCREAS, VOCAB


def cells_with(lengths: list[int], sums: list[float], mito: list[float], unmapped: list[float]) -> RaggedBatch:
    offsets = offsets_of(np.array(lengths))
    return RaggedBatch(np.zeros(offsets[-1], np.uint16), np.ones(offsets[-1], np.uint32), offsets, {
        SUM_IN: np.array(sums), SUM_MITO: np.array(mito), SUM_UNMAPPED: np.array(unmapped)})


def test_each_limit_filters_under_its_own_name_and_the_first_counts() -> None:
    cells = cells_with([0, 5, 20, 20, 20, 20, 3], [9, 9, 30, 100, 100, 100, 0], [0, 0, 0, 60, 50, 0, 0],
                       [9, 0, 0, 0, 0, 85, 0])
    passes = np.array([True, True, True, True, True, True, False])
    reasons = judge(cells, passes, CellsConfig(min_genes=10, min_counts=40, max_mito_fraction=0.5))
    names = ["kept" if reason == KEPT else REASONS[reason] for reason in reasons]
    assert names == ["no_genes", "min_genes", "min_counts", "max_mito_fraction", "kept", "min_counts", "filter"]


def slow_judge(genes: list[int], values: list[float], outside: list[float], mito: float, config: CellsConfig) -> str:
    """What `judge` says of one cell, a limit after the other."""
    if not genes:
        return "no_genes"
    if len(genes) < config.min_genes:
        return "min_genes"
    if config.max_genes is not None and len(genes) > config.max_genes:
        return "max_genes"
    if config.min_counts is not None and sum(values) < config.min_counts:
        return "min_counts"
    if config.max_counts is not None and sum(values) > config.max_counts:
        return "max_counts"
    if config.max_value is not None and max(values) > config.max_value:
        return "max_value"
    everything = sum(values) + sum(outside)
    if config.max_mito_fraction is not None and mito / everything > config.max_mito_fraction:
        return "max_mito_fraction"
    return "kept"


@settings(deadline=None)   # compiles on the first call
@given(st.lists(st.tuples(st.lists(st.integers(1, 30), max_size=8), st.lists(st.integers(1, 30), max_size=3)),
                min_size=1, max_size=20),
       st.builds(CellsConfig, min_genes=st.integers(0, 3), max_genes=st.none() | st.integers(3, 7),
                 min_counts=st.none() | st.integers(0, 30), max_counts=st.none() | st.integers(31, 90),
                 max_value=st.none() | st.integers(1, 30), max_mito_fraction=st.none() | st.floats(0, 1)))
def test_judge_agrees_with_a_slow_twin(drawn: list[tuple[list[int], list[int]]], config: CellsConfig) -> None:
    values = [value for inside, _ in drawn for value in inside]
    offsets = offsets_of(np.array([len(inside) for inside, _ in drawn]))
    mito = [float(sum(outside)) for _, outside in drawn]   # all of it outside the vocabulary
    cells = RaggedBatch(np.zeros(len(values), np.uint16), np.array(values, np.uint32), offsets, {
        SUM_IN: np.array([float(sum(inside) + sum(outside)) for inside, outside in drawn]),
        SUM_MITO: np.array(mito), SUM_UNMAPPED: np.array(mito)})
    found = ["kept" if reason == KEPT else REASONS[reason]
             for reason in judge(cells, np.ones(len(drawn), bool), config)]
    assert found == [slow_judge(list(range(len(inside))), list(map(float, inside)), list(map(float, outside)), share,
                                config) for (inside, outside), share in zip(drawn, mito, strict=True)]


def test_limits_that_no_cell_can_meet_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_genes is 50, above max_genes, 40: no cell has both"):
        validate(CellsConfig, {"max_genes": 40})
    with pytest.raises(ConfigError, match="min_counts"):
        validate(CellsConfig, {"min_counts": 3, "max_counts": 2})


@pytest.mark.parametrize(("name", "present", "expected"), [
    ("donor", ["donor_id", "donor"], "donor"), ("donor", ["patient", "donor_id"], "donor_id"),
    ("donor", ["Patient"], "Patient"), ("cell_type", ["Cell.Type"], "Cell.Type"), ("cell_type", ["type"], None),
    ("cell_type", ["Cell.Type", "celltype"], None), ("dataset", ["dataset_id"], "dataset_id"),
    ("donor", ["donor_id", "DonorID"], "donor_id"), ("tissue", [], None)])
def test_columns_are_found_under_their_other_names(name: str, present: list[str], expected: str | None) -> None:
    assert own_name(name, present) == expected


def test_without_limits_only_empty_cells_go() -> None:
    reasons = judge(cells_with([0, 1], [0, 1], [0, 1], [0, 0]), np.ones(2, bool), CellsConfig(min_genes=0))
    assert [REASONS[0 if reason == KEPT else reason] for reason in reasons] == ["no_genes", REASONS[0]]
    assert reasons[1] == KEPT


def test_min_genes_counts_the_genes_of_the_vocabulary() -> None:
    with open_source(CHR21) as source:
        cells = tokenize_block(source, map_source(source, VOCAB), 0, source.n_cells)
    reasons = judge(cells, np.ones(len(cells), bool), CellsConfig(min_genes=10))
    assert (cells.lengths[reasons == KEPT] >= 10).all()
    assert (cells.lengths[reasons != KEPT] < 10).all()
    assert 0 < (reasons == KEPT).sum() < len(cells)


def test_splits_by_cell_have_the_share_asked_for_and_move_no_cell() -> None:
    with open_source(PANCREAS) as source:
        reader = ObsReader.of(source, SourceConfig(path=PANCREAS), [], CellsConfig())
        whole = reader.splits(source, SplitsConfig(valid=0.2), 0, 1369)
        part = reader.splits(source, SplitsConfig(valid=0.2), 100, 300)
        more = reader.splits(source, SplitsConfig(valid=0.3), 0, 1369)
        other = reader.splits(source, SplitsConfig(valid=0.2, seed=1), 0, 1369)
    assert whole.mean() == pytest.approx(0.2, abs=0.04)
    assert np.array_equal(whole[100:300], part)
    assert (more >= whole).all()
    assert not np.array_equal(whole, other)


def test_a_group_is_in_one_split_in_every_source() -> None:
    config = SplitsConfig(valid=0.5, by="donor")
    names = [f"donor{i}" for i in range(200)]
    forward = splits_of_groups(pa.array(names).dictionary_encode(), "a", config)
    backward = splits_of_groups(pa.array(names[::-1] * 2).dictionary_encode(), "b", config)
    assert np.array_equal(forward, backward[:200][::-1])
    assert forward.mean() == pytest.approx(0.5, abs=0.12)


def test_cells_without_the_value_go_by_their_source() -> None:
    config = SplitsConfig(valid=0.5, by="donor")
    missing = pa.array(["x", None, None]).dictionary_encode()
    drawn = {source: splits_of_groups(missing, source, config).tolist() for source in map(str, range(40))}
    assert all(splits[1] == splits[2] for splits in drawn.values())
    assert len({splits[0] for splits in drawn.values()}) == 1
    assert {splits[1] for splits in drawn.values()} == {0, 1}


def test_metadata_take_the_names_of_the_corpus() -> None:
    config = SourceConfig(path=BLOOD, columns={"cell_type": "bulk_labels", "cycle": "phase"})
    with open_source(BLOOD) as source:
        reader = ObsReader.of(source, config, ["cell_type", "cycle", "disease"], CellsConfig())
        found = reader.metadata(source, ["cell_type", "cycle", "disease"], 0, 3)
        expected = source.obs(["bulk_labels", "phase"], 0, 3)
    assert found["cell_type"].to_pylist() == expected["bulk_labels"].to_pylist()
    assert found["cycle"].to_pylist() == expected["phase"].to_pylist()
    assert found["disease"].to_pylist() == [None] * 3
    assert {column.type for column in found.values()} == {pa.dictionary(pa.int32(), pa.string())}


def test_filters_of_source_and_corpus_both_hold_under_either_name() -> None:
    config = SourceConfig(path=BLOOD, columns={"cycle": "phase"}, filter='cycle == "G1"')
    with open_source(BLOOD) as source:
        passes = ObsReader.of(source, config, [], CellsConfig(filter="n_genes > 900")).passes(source, 0, 700)
        obs = source.obs(["phase", "n_genes"])
    expected = [phase == "G1" and n > 900 for phase, n in zip(obs["phase"].to_pylist(), obs["n_genes"].to_pylist(),
                                                               strict=True)]
    assert passes.tolist() == expected
    assert 0 < sum(expected) < 700


@pytest.mark.parametrize(("config", "cells", "message"), [
    (SourceConfig(path=BLOOD, columns={"donor": "donr"}), CellsConfig(), "columns.donor.*'donr'.*did you mean 'donor'"),
    (SourceConfig(path=BLOOD, filter='disease == "x"'), CellsConfig(), "the filter.*'disease'.*its columns: assay"),
    (SourceConfig(path=BLOOD), CellsConfig(filter="n_gene > 3"), "did you mean 'n_genes'")])
def test_a_column_that_a_source_lacks_is_told_before_any_work(config: SourceConfig, cells: CellsConfig,
                                                              message: str) -> None:
    with open_source(BLOOD) as source, pytest.raises(ConfigError, match=message) as caught:
        ObsReader.of(source, config, [], cells)
    assert str(BLOOD) in str(caught.value)


def test_numbers_and_truth_become_words() -> None:
    assert as_text(pa.array([1, None, 10])).to_pylist() == ["1", None, "10"]
    assert as_text(pa.array([True, False])).to_pylist() == ["True", "False"]
    assert as_text(pa.array([0.5, None])).to_pylist() == ["0.5", None]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text("abc", min_size=1, max_size=3) | st.none(), min_size=1, max_size=30),
       st.lists(st.text("abc", min_size=1, max_size=3) | st.none(), max_size=30), st.sampled_from(["donor", "dataset"]),
       st.floats(0, 1), st.integers(0, 1 << 62))
def test_adding_a_source_moves_no_cell_and_no_group(first: list[str | None], second: list[str | None], by: str,
                                                    valid: float, seed: int) -> None:
    config = SplitsConfig(valid=valid, by=by, seed=seed)  # type: ignore[arg-type]
    alone = splits_of_groups(pa.array(first, pa.string()).dictionary_encode(), "first", config)
    joined = pa.array([*second, *first], pa.string()).dictionary_encode()   # categories in another order, more of them
    assert np.array_equal(splits_of_groups(joined, "first", config)[len(second):], alone)
    other = splits_of_groups(pa.array(second, pa.string()).dictionary_encode(), "second", config)
    of = {name: split for name, split in zip(first, alone.tolist(), strict=True) if name is not None}
    assert all(of.get(name, split) == split for name, split in zip(second, other.tolist(), strict=True)
               if name is not None)


def test_groups_of_the_kept_cells_are_told_by_split() -> None:
    groups = pa.array(["b", None, "a", "b", "c", None]).dictionary_encode()
    splits, kept = np.array([0, 1, 0, 0, 1, 1], np.int8), np.array([True, True, True, True, False, True])
    assert groups_in_splits(groups, splits, kept) == {"train": ["a", "b"], "valid": [None]}
