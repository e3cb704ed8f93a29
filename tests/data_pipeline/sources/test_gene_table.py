import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data_pipeline.config import CorpusConfig
from data_pipeline.sources.gene_table import SPECIAL, UNKNOWN, GeneTable
from scgpt.config import load_config
from scgpt.errors import ScgptError
from tests.data_pipeline.atlases import VOCAB


def test_tokens_in_brackets_are_no_genes_and_gaps_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"B": 4, "<cls>": 1, "A": 2, "<drug>": 5}))
    table = GeneTable.read(str(tmp_path / "vocab.json"))
    assert table.columns == {"index": ["A", "B"]}
    assert table.places.tolist() == [UNKNOWN, SPECIAL, 0, UNKNOWN, 1, SPECIAL]


def test_the_published_vocabulary_is_known_by_its_name() -> None:
    table = GeneTable.read("scgpt-human")
    assert table.n_genes == len(VOCAB) - 3
    assert table.columns["index"][table.places[VOCAB["CD3D"]]] == "CD3D"
    assert table.places[VOCAB["<cls>"]] == SPECIAL


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv"])
def test_tables_of_names_are_read_in_the_order_of_their_ids(tmp_path: Path, suffix: str) -> None:
    columns = {"gene_symbol": ["B", "A", "C"], "token_id": [5, 3, 9], "length": [10, 20, 30],
               "ensembl_id": ["b", "a", "c"]}
    path = tmp_path / f"genes.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pa.table(columns), path)
    else:
        mark = {"csv": ",", "tsv": "\t"}[suffix]
        rows = [list(columns), *zip(*columns.values(), strict=True)]
        path.write_text("\n".join(mark.join(map(str, row)) for row in rows))
    table = GeneTable.read(str(path))
    assert table.columns == {"index": ["A", "B", "C"], "gene_symbol": ["A", "B", "C"], "ensembl_id": ["a", "b", "c"]}
    assert np.flatnonzero(table.places >= 0).tolist() == [3, 5, 9]


@pytest.mark.parametrize(("content", "message"), [
    ('{"A": 1, "B": 1}', "the id 1 stands for two genes"), ('{"A": -1}', "an id outside"),
    ('{"A": 99999999}', "an id outside"), ('{"<cls>": 0}', "lists no genes"), ("{}", "lists no genes"),
    ('["A"]', "not a mapping"), ('{"A": "x"}', "not a mapping"), ("{", "cannot be read")])
def test_a_wrong_vocabulary_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(ScgptError, match=f"{message}.*vocab.json, gene table") as caught:
        GeneTable.read(str(tmp_path / "vocab.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("columns", [{"a": [1], "b": [2], "name": ["x"]}, {"token_id": [1]}, {"name": ["x"]}])
def test_a_table_without_ids_or_names_is_refused_with_its_columns(tmp_path: Path,
                                                                  columns: dict[str, list[object]]) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "genes.parquet")
    with pytest.raises(ScgptError, match=f"among {', '.join(columns)}"):
        GeneTable.read(str(tmp_path / "genes.parquet"))


def test_a_missing_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(ScgptError, match="no such file"):
        GeneTable.read(str(tmp_path / "genes.parquet"))


def test_a_configuration_names_it_beside_itself_or_as_published(tmp_path: Path) -> None:
    (tmp_path / "corpus.yaml").write_text("sources: [{path: a, gene_table: genes.parquet}, "
                                          "{path: b, gene_table: scgpt-human}, c]")
    config = load_config(CorpusConfig, tmp_path / "corpus.yaml", kind="corpus")
    assert [source.gene_table for source in config.sources] == [str(tmp_path / "genes.parquet"), "scgpt-human", None]
    assert [source["gene_table"] for source in config.portable()["sources"]] == ["genes.parquet", "scgpt-human", None]
