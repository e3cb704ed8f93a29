"""The corpora that ship: each loads, its filters keep what was published, and what is missing is told in a sentence."""
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data_pipeline.config import CorpusConfig
from data_pipeline.obs_filter import ObsFilter
from launch import cli
from scgpt.config import load_config, shipped_configs
from tests.data_pipeline.atlases import GENES, build_here, cells_of, random_counts, write_h5ad

TISSUES = ("heart", "blood", "brain", "lung", "kidney", "intestine", "pancreas")
CENSUS = (*TISSUES, "others", "whole-human", "pan-cancer")
CELLS = list(itertools.product((*TISSUES, "eye", "skin of body"), ("normal", "glioblastoma", "COVID-19"),
                               ("cell", "nucleus", "na"), (True, False)))


def shipped(name: str) -> CorpusConfig:
    return load_config(CorpusConfig, name, kind="corpus")


def kept(name: str) -> np.ndarray:
    """Which of CELLS the filter of a corpus keeps."""
    columns = [list(values) for values in zip(*CELLS, strict=True)]
    obs = dict(zip(("tissue_general", "disease", "suspension_type", "is_primary_data"), map(pa.array, columns),
                   strict=True))
    text = shipped(name).cells.filter
    assert text is not None
    return ObsFilter.parse(text).keep(obs, where=name)


def test_these_ship() -> None:
    assert {*CENSUS, "demo", "tahoe-100m", "mouse"} <= set(shipped_configs("corpus"))


def test_whole_human_is_the_union_of_its_parts_and_no_cell_is_in_two() -> None:
    parts = np.stack([kept(name) for name in (*TISSUES, "others")])
    assert np.array_equal(parts.sum(axis=0), kept("whole-human").astype(int))
    assert kept("whole-human").tolist() == [disease == "normal" and suspension != "na"
                                            for _, disease, suspension, _ in CELLS]


@pytest.mark.parametrize("tissue", TISSUES)
def test_a_tissue_is_that_tissue(tissue: str) -> None:
    assert {cell[0] for cell, keep in zip(CELLS, kept(tissue), strict=True) if keep} == {tissue}


def test_pan_cancer_takes_listed_cancers_of_any_tissue_and_mouse_each_cell_once() -> None:
    assert kept("pan-cancer").tolist() == [disease == "glioblastoma" and suspension != "na"
                                           for _, disease, suspension, _ in CELLS]
    assert kept("mouse").tolist() == [disease == "normal" and suspension != "na" and primary
                                      for _, disease, suspension, primary in CELLS]


def test_parts_and_whole_read_one_source_so_that_a_cell_has_one_id() -> None:
    assert len({str(shipped(name).sources) for name in CENSUS}) == 1


@pytest.mark.parametrize("name", sorted(set(shipped_configs("corpus")) - {"demo"}))
def test_data_that_are_not_there_are_one_sentence(name: str, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "plan", name, f"sources=[{tmp_path}/census/none]"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "there is no such file" in said
    assert f"{tmp_path}/census/none" in said


def census_obs() -> dict[str, list[Any]]:
    """CELLS as the Census tells of them."""
    columns = dict(zip(("tissue_general", "disease", "suspension_type", "is_primary_data"), zip(*CELLS, strict=True),
                       strict=True))
    return {**{key: list(values) for key, values in columns.items()}, "donor_id": ["d"] * len(CELLS),
            "dataset_id": ["s"] * len(CELLS)}


@pytest.mark.parametrize("kind", ["h5ad", "soma"])
def test_a_copy_is_built_by_one_key(tmp_path: Path, kind: str) -> None:
    """A copy of the Census, or cells of it with its columns as a file."""
    counts = random_counts(5, len(CELLS), 60)
    if kind == "soma":
        pytest.importorskip("tiledbsoma", reason="the extra [census] is not installed")
        from tests.data_pipeline.sources.test_soma import write_soma

        path = write_soma(tmp_path / "homo_sapiens", counts, obs=census_obs())
    else:
        path = write_h5ad(tmp_path / "homo_sapiens.h5ad", counts, obs=census_obs())
    built = {}
    for name in ("heart", "others", "whole-human"):
        config = load_config(CorpusConfig, name, [f"sources=[{path}]", "shards.max_bytes=1MiB"], kind="corpus")
        source = build_here(config, tmp_path / name).sources[0]
        assert (source.name, source.cells_written) == ("homo_sapiens", kept(name).sum())
        assert source.filtered == {"filter": len(CELLS) - source.cells_written}
        built[name] = cells_of(tmp_path / name)
    for name in ("heart", "others"):
        assert built[name].items() <= built["whole-human"].items()
        assert {row for _, row in built[name]} == set(np.flatnonzero(kept(name)))


def test_tahoe_is_built_of_its_tables_of_ids_too(tmp_path: Path) -> None:
    """The layout of the Parquet form: `<cls>` as a first entry of -2 that the table of genes does not name."""
    counts = random_counts(6, 20, 60).astype(int)
    (tmp_path / "data").mkdir()
    rows = [counts[i] for i in range(20)]
    table = pa.table({"genes": [[1, *(row.indices + 3).tolist()] for row in rows],
                      "expressions": [[-2.0, *row.data.astype(float).tolist()] for row in rows],
                      "drug": ["DMSO"] * 20, "plate": [f"plate{i % 2}" for i in range(20)]})
    parquet.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    parquet.write_table(pa.table({"gene_symbol": GENES[:60], "token_id": list(range(3, 63))}),
                        tmp_path / "gene_metadata.parquet")
    source = f"{{path: {tmp_path}/data, name: tahoe, gene_table: {tmp_path}/gene_metadata.parquet}}"
    config = load_config(CorpusConfig, "tahoe-100m", ["cells.filter=null", "cells.min_genes=1", f"sources=[{source}]"],
                         kind="corpus")
    manifest = build_here(config, tmp_path / "corpus")
    assert (manifest.sources[0].cells_written, manifest.sources[0].expression_sum) == (20, counts.sum())
    assert manifest.columns == ["plate", "sample", "cell_line", "drug"]
