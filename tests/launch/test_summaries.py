import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from launch import cli
from launch.summaries import corpus_summary, describe_corpus
from tests.data_pipeline.atlases import BLOOD, build_here, config_of, write_h5ad


def test_a_plan_tells_limits_memory_time_and_what_is_left_out(tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "corpus.yaml"
    path.write_text(f"sources: [{{path: {BLOOD}, filter: 'phase == \"G1\"'}}, gone.h5ad]\non_error: skip\n"
                    "cells: {max_value: 500, remove_duplicates: true}\n")
    assert cli.main(["data", "plan", str(path)]) == 0
    text = capsys.readouterr().out
    assert 'of blood-pbmc68k the cells with phase == "G1"' in text
    assert "of all: min_genes 50, max_value 500.0, remove_duplicates True" in text
    assert "gone would be left out: there is no such file (gone.h5ad)" in text
    assert "GB a worker\n" in text
    assert re.search(r"time: about \d+ s on the \d+ cores of this machine, .* by the first 700 cells of blood", text)
    assert "train at most" in text
    assert cli.main(["data", "plan", str(path), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["time"]["core_s"] > value["time"]["wall_s"] > 0 or value["time"]["cores"] == 1
    assert value["splits"]["train"]["bytes"] > value["splits"]["valid"]["bytes"] > 0
    assert value["sources"][0]["columns"]["donor"] == "donor"


def test_a_plan_tells_of_sources_and_corpora_that_its_filters_empty(tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "corpus.yaml"
    other = f"{{path: {BLOOD}, name: other}}"
    path.write_text(f"sources: [{{path: {BLOOD}, filter: 'phase == \"G9\"'}}, {other}]\n"
                    "cells: {filter: 'n_genes > 0'}\n")
    assert cli.main(["data", "plan", str(path)]) == 0
    none = 'of blood-pbmc68k no cell would be kept: none has (n_genes > 0) and (phase == "G9")'
    assert none in capsys.readouterr().out.splitlines()
    assert cli.main(["data", "plan", str(path), "--json"]) == 0
    assert [source["cells_passing"] for source in json.loads(capsys.readouterr().out)["sources"]] == [0, 700]
    for command in (["plan"], ["build", "--out", str(tmp_path / "out")]):
        assert cli.main(["data", *command, str(path), "cells.filter=phase == 'G9'"]) == 1
        assert capsys.readouterr().err.startswith(
            "error: no cell passes the filters (blood-pbmc68k: (phase == 'G9') and (phase == ")
    assert not (tmp_path / "out").exists()


def test_a_file_of_which_nothing_can_be_compared_is_not_answered_with_no(tmp_path: Path, capsys) -> None:
    build_here(config_of(BLOOD), tmp_path / "out")
    few = write_h5ad(tmp_path / "few.h5ad", sparse.csr_matrix(np.eye(40, dtype=np.float32)))
    assert cli.main(["data", "inspect", str(tmp_path / "out"), "--was-seen", str(few)]) == 0
    assert capsys.readouterr().out.startswith("cells: cannot be told, 0 compared (40 in the file, X): each has too few")


def test_a_corpus_says_which_cells_are_equal_and_which_source_is_missing(tmp_path: Path) -> None:
    again = {"path": str(BLOOD), "name": "again"}
    poor = config_of(BLOOD, again, tmp_path / "gone.h5ad", on_error="skip", splits={"valid": 0.5})
    text = describe_corpus(corpus_summary(build_here(poor, tmp_path / "poor")))
    lines = text.splitlines()
    assert "700 cells equal an earlier one, " in lines[1]
    assert lines[2] == "left out: gone: there is no such file (gone.h5ad)"
    tidy = config_of(BLOOD, again, cells={"remove_duplicates": True})
    text = describe_corpus(corpus_summary(build_here(tidy, tmp_path / "tidy")))
    assert "700 of 1,400 cells kept, filtered: 700 duplicate" in text
    assert "\n" not in text
