import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data_pipeline.inspection import inspect
from data_pipeline.sources import hdf5_structure
from launch.inspection import describe_facts
from scgpt.errors import ConfigError, SourceError
from tests.data_pipeline.atlases import BLOOD, CHR21, VOCAB, build_here, config_of, random_counts, spoil, write_h5ad
from tests.data_pipeline.sources.formats import lists_of, write_vocab


def test_a_corpus_is_told_as_its_manifest_and_its_cells_are(tmp_path: Path) -> None:
    config = config_of(BLOOD, tmp_path / "gone.h5ad", {"path": str(BLOOD), "name": "again"}, on_error="skip",
                       cells={"remove_duplicates": True}, splits={"valid": 0.5, "by": "dataset"})
    manifest = build_here(config, tmp_path / "out")
    facts = inspect(tmp_path / "out", VOCAB)
    assert sum(split["cells"] for split in facts["splits"].values()) == 700
    assert [split["groups"] for split in facts["splits"].values()] == [1]
    assert [source["filtered"] for source in facts["sources"]] == [{}, {"duplicate": 700}]
    assert facts["sha256"] == manifest.sha256
    assert facts["quarantined"][0]["name"] == "gone"
    assert facts["columns"]["tissue"] == {"values": 1, "missing": 0, "commonest": {"blood (PBMC)": 700}}
    assert facts["columns"]["cell_type"]["values"] == 10
    assert next(iter(facts["columns"]["cell_type"]["commonest"].items())) == ("Dendritic", 240)
    text = describe_facts(facts)
    assert "left out: gone: there is no such file (gone.h5ad)" in text
    assert "700 cells that equal an earlier one are left out" in text


def test_an_atlas_is_told_with_all_its_matrices_and_genes(tmp_path: Path) -> None:
    counts = random_counts(0, 50, 60)
    path = write_h5ad(tmp_path / "a.h5ad", counts.log1p(), raw=counts, layers={"scaled": counts.toarray() - 3},
                      obs={"sex": ["f", "m"] * 25, "age": np.arange(50), "score": np.linspace(0, 1, 50)},
                      var={"symbol": ["x"] * 60})
    facts = inspect(path, VOCAB)
    assert {layer: matrix["looks_like"].split(" such")[0] for layer, matrix in facts["matrices"].items()} == {
        "raw": "counts", "X": "log-normalised values", "scaled": "negative values"}
    assert (facts["layer"], facts["cells"], facts["genes"], facts["refused"]) == ("raw", 50, 60, None)
    assert facts["gene_columns"]["index"]["mapped"] == 60
    assert facts["obs"]["sex"] == {"type": "text", "values": 2, "missing": 0, "commonest": {"f": 25, "m": 25}}
    assert facts["obs"]["age"]["range"] == [0, 49]
    assert "obs score (double): 0 to 1" in describe_facts(facts)


def test_what_a_build_would_refuse_is_told_with_the_reason(tmp_path: Path) -> None:
    mouse = write_h5ad(tmp_path / "mouse.h5ad", random_counts(0, 30, 5), ["Lypla1", "Tcea1", "Atp6v1h", "Rgs20",
                                                                          "Rb1cc1"])
    assert "mouse genes" in inspect(mouse, VOCAB)["refused"]
    logs = write_h5ad(tmp_path / "logs.h5ad", random_counts(0, 30, 40).log1p())
    assert "X holds log-normalised values" in inspect(logs, VOCAB)["refused"]
    assert inspect(CHR21, VOCAB)["refused"] is None


def test_a_column_that_cannot_be_read_is_told_in_its_place(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(0, 30, 40), obs={"sex": ["f", "m"] * 15, "age": range(30)})
    spoil(path, "obs/sex/codes", lambda codes: codes + 100)
    facts = inspect(path, VOCAB)
    assert "a category code outside the 2 categories" in facts["obs"]["sex"]["unreadable"]
    assert facts["obs"]["age"]["values"] == 30
    assert "obs sex: cannot be read" in describe_facts(facts)


def test_a_table_of_lists_is_told_by_its_gene_table(tmp_path: Path) -> None:
    parquet.write_table(pa.table({**lists_of(random_counts(0, 30, 40)), "tissue": ["lung"] * 30}),
                        tmp_path / "a.parquet")
    table = str(write_vocab(tmp_path / "genes.json", 40))
    facts = inspect(tmp_path / "a.parquet", VOCAB, gene_table=table)
    assert (facts["kind"], facts["cells"], facts["genes"], facts["refused"]) == ("lists", 30, 40, None)
    assert facts["gene_columns"]["index"]["mapped"] == 40
    assert facts["matrices"]["X"]["looks_like"] == "counts"
    assert facts["obs"]["tissue"]["commonest"] == {"lung": 30}
    with pytest.raises(ConfigError, match="gene ids, not what they stand for"):
        inspect(tmp_path / "a.parquet", VOCAB)
    with pytest.raises(SourceError, match="no such file.*gone.json"):
        inspect(tmp_path / "a.parquet", VOCAB, gene_table=str(tmp_path / "gone.json"))


def test_a_bank_is_no_corpus_although_it_has_a_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "a.scb"
    folder.mkdir()
    parquet.write_table(pa.table(lists_of(random_counts(0, 30, 40))), folder / "X.datatable.parquet")
    write_vocab(folder / "gene_vocab.json", 40)
    (folder / "manifest.json").write_text('{"main_data": "X"}')
    facts = inspect(folder, VOCAB)
    assert (facts["kind"], facts["cells"], facts["refused"]) == ("scbank", 30, None)


def test_a_source_without_cells_would_be_refused(tmp_path: Path) -> None:
    facts = inspect(write_h5ad(tmp_path / "a.h5ad", random_counts(0, 30, 40)[:0]), VOCAB)
    assert facts["refused"] == "it holds no cells"


def test_names_and_values_are_told_in_one_line_each(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(0, 30, 3), ["G" * 10_000, "two\nlines", "CD3D"],
                      obs={"x\ny": ["long " * 1000] * 30})
    facts = inspect(path, VOCAB)
    lines = describe_facts(facts).splitlines()
    assert len(lines) == 5
    assert max(map(len, lines)) < 400


def test_what_hangs_or_ends_a_reader_is_found_before_it_is_read(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.h5ad")
    with pytest.raises(SourceError, match="neither a file nor a folder"):
        inspect(tmp_path / "pipe.h5ad", VOCAB)
    monkeypatch.setattr(hdf5_structure, "_walk", lambda *arguments: os.abort())
    with pytest.raises(SourceError, match="reading its structure ends the HDF5 library"):
        inspect(BLOOD, VOCAB)


def test_what_is_neither_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no such file"):
        inspect(tmp_path / "nothing", VOCAB)


def test_values_that_are_not_finite_are_told_and_are_json(tmp_path: Path) -> None:
    matrix = random_counts(0, 30, 40)
    matrix.data[:2] = np.nan, np.inf
    path = write_h5ad(tmp_path / "a.h5ad", matrix, obs={"score": [np.inf, 2.5, *[1.5] * 28], "none": [np.nan] * 30})
    facts = inspect(path, VOCAB)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["matrices"]["X"]["looks_like"] == "NaN or infinite values"
    assert facts["obs"]["score"]["range"] == [1.5, 2.5]
    assert "obs none (double): no value" in describe_facts(facts)
