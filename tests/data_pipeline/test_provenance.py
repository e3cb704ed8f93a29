import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from data_pipeline import plan as planning
from data_pipeline.config import SourceConfig
from data_pipeline.provenance import stored_hashes, was_seen
from data_pipeline.sources import hdf5_structure
from data_pipeline.vocabulary import build_vocab
from scgpt.data import Manifest, TokenDataset
from scgpt.data.content import content_hashes
from scgpt.data.corpus_files import CorpusFiles
from scgpt.errors import ConfigError, SourceError
from tests.data_pipeline.atlases import BLOOD, GENES, PANCREAS, build_here, config_of, random_counts, write_h5ad
from tests.scgpt.data.cells import in_memory


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("seen") / "corpus"
    build_here(config_of(BLOOD, splits={"valid": 0.3}), out)
    return out


def test_the_file_itself_is_found_whole_and_by_split(corpus: Path) -> None:
    found = was_seen(corpus, str(BLOOD))
    splits = {name: split.cells for name, split in Manifest.read(corpus).splits.items()}
    assert (found["seen"], found["found"], found["share"], found["same_file"]) == (True, 700, 1.0, BLOOD.stem)
    assert found["splits"] == splits
    assert found["groups"]["donor"]["in_corpus"] == {"10x-donor-A": splits}


def test_cells_are_found_under_other_names_in_another_order_and_form(corpus: Path, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BLOCK_VALUES", 20_000)
    atlas = anndata.read_h5ad(BLOOD)
    draw = np.random.default_rng(0)
    part = atlas[draw.permutation(700)[:200], draw.permutation(atlas.n_vars)]
    more = sparse.vstack([part.X, random_counts(1, 50, atlas.n_vars)], "csc")
    path = write_h5ad(tmp_path / "other.h5ad", more, list(part.var_names))
    found = was_seen(corpus, str(path))
    assert (found["compared"], found["found"], found["same_file"]) == (250, 200, None)
    assert sum(found["splits"].values()) == 200
    assert found["groups"] == {}


def test_cells_of_a_table_of_lists_are_found_by_its_gene_table(corpus: Path, tmp_path: Path) -> None:
    atlas = anndata.read_h5ad(BLOOD)[:100]
    ids = {name: 7 + 2 * place for place, name in enumerate(atlas.var_names)}
    rows = [atlas.X[row] for row in range(100)]
    pq.write_table(pa.table({"genes": [[ids[atlas.var_names[place]] for place in row.indices] for row in rows],
                             "expressions": [row.data for row in rows]}), tmp_path / "a.parquet")
    (tmp_path / "genes.json").write_text(json.dumps(ids))
    found = was_seen(corpus, str(tmp_path / "a.parquet"), gene_table=str(tmp_path / "genes.json"))
    assert (found["found"], found["compared"], found["seen"]) == (100, 100, True)


@pytest.mark.parametrize("look", [lambda corpus: was_seen(corpus, str(BLOOD)),
                                  lambda corpus: build_vocab([SourceConfig(path=str(BLOOD))])])
def test_a_file_that_ends_its_reader_is_one_sentence(corpus: Path, monkeypatch: pytest.MonkeyPatch,
                                                     look: Callable[[Path], object]) -> None:
    monkeypatch.setattr(hdf5_structure, "_walk", lambda *arguments: os.abort())
    with pytest.raises(SourceError, match="reading its structure ends the HDF5 library"):
        look(corpus)


def test_another_file_is_not_found(corpus: Path) -> None:
    found = was_seen(corpus, str(PANCREAS))
    assert (found["seen"], found["found"], found["compared"]) == (False, 0, 1369)
    assert found["groups"]["donor"]["in_corpus"] == {}


@pytest.mark.parametrize("sample", [1, 100, 256, 257, 600, 700, 5000])
def test_a_sample_has_its_size_and_is_spread(corpus: Path, sample: int) -> None:
    found = was_seen(corpus, str(BLOOD), sample=sample)
    assert found["compared"] == found["found"] == min(sample, 700)


def test_cells_of_few_genes_are_not_compared(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "few.h5ad", sparse.csr_matrix(np.eye(40, dtype=np.float32)))
    build_here(config_of(path), tmp_path / "out")
    found = was_seen(tmp_path / "out", str(path))
    assert (found["compared"], found["seen"], found["same_file"]) == (0, True, "few")
    other = write_h5ad(tmp_path / "other.h5ad", sparse.csr_matrix(2 * np.eye(40, dtype=np.float32)))
    assert was_seen(tmp_path / "out", str(other))["seen"] is None


def test_a_corpus_without_stored_hashes_answers_the_same(corpus: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(corpus, old)
    for path in old.rglob("*.obs.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["content_hash"]), path)
    assert was_seen(old, str(BLOOD)) == was_seen(corpus, str(BLOOD))


def test_stored_hashes_are_those_of_the_stored_cells(corpus: Path) -> None:
    files, manifest = CorpusFiles(corpus), Manifest.read(corpus)
    for split in manifest.splits:
        dataset = TokenDataset.open(corpus, split)
        expected = content_hashes(dataset.fetch(np.arange(len(dataset))))[0]
        assert np.array_equal(np.concatenate(list(stored_hashes(files, manifest, split))), expected)


def test_fractions_are_found_although_they_are_stored_as_float32(tmp_path: Path) -> None:
    counts = random_counts(2, 40, 60, 0.6).astype(np.float64)
    counts.data[::3] += 0.1
    counts.data[1] = (1 << 24) + 1
    path = write_h5ad(tmp_path / "a.h5ad", counts, GENES[:60])
    build_here(config_of(path, cells={"expression_kind": "expected_counts"}), tmp_path / "out")
    assert was_seen(tmp_path / "out", str(path))["found"] == 40
    whole = write_h5ad(tmp_path / "whole.h5ad", sparse.csr_matrix(np.floor(counts.toarray())), GENES[:60])
    assert was_seen(tmp_path / "out", str(whole))["found"] == 0


def test_a_group_is_found_in_its_column_or_in_any(corpus: Path) -> None:
    splits = {name: split.cells for name, split in Manifest.read(corpus).splits.items()}
    for asked in ("10x-donor-A", "donor=10x-donor-A"):
        assert was_seen(corpus, asked)["cells"] == {"donor": splits}
    assert not was_seen(corpus, "10x-donor-B")["seen"]
    assert not was_seen(corpus, "tissue=10x-donor-A")["seen"]
    with pytest.raises(ConfigError, match="keeps no column 'sex'.*source, dataset"):
        was_seen(corpus, "sex=male")


@pytest.mark.parametrize("asked", ["", "donor="])
def test_an_empty_name_is_not_answered_with_no(corpus: Path, asked: str) -> None:
    with pytest.raises(ConfigError, match="names no file and no group"):
        was_seen(corpus, asked)


def test_donors_are_known_by_the_published_groups_where_their_column_is_not_kept(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(0, 60, 60), obs={"donor_id": [f"d{i % 6}" for i in range(60)]})
    manifest = build_here(config_of(path, columns=[], splits={"valid": 0.5, "by": "donor"}), tmp_path / "out")
    held_out = manifest.splits["valid"].groups
    assert held_out
    assert sorted([*held_out, *(manifest.splits["train"].groups or [])]) == [f"d{i}" for i in range(6)]
    assert was_seen(tmp_path / "out", held_out[0])["cells"] == {"donor": {"valid": None}}
    assert not was_seen(tmp_path / "out", "d6")["seen"]


def test_a_source_that_was_left_out_is_told(tmp_path: Path) -> None:
    build_here(config_of(BLOOD, tmp_path / "gone.h5ad", on_error="skip"), tmp_path / "out")
    found = was_seen(tmp_path / "out", "gone")
    assert (found["seen"], found["left_out"]) == (False, ["there is no such file (gone.h5ad)"])


def test_a_file_that_holds_no_counts_is_refused_and_not_unseen(corpus: Path, tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "logs.h5ad", random_counts(0, 60, 60).log1p())
    with pytest.raises(SourceError, match="log-normalised"):
        was_seen(corpus, str(path))


@pytest.mark.parametrize("asked", ["nowhere.h5ad", "no/where", "memory://no/such.h5ad", "no/where=1/a.h5ad"])
def test_a_path_with_a_slip_in_it_is_not_answered_with_no(corpus: Path, asked: str) -> None:
    with pytest.raises(SourceError, match="there is no such file"):
        was_seen(corpus, asked)


def test_a_corpus_behind_a_url_answers_the_same(corpus: Path) -> None:
    assert was_seen(in_memory(corpus), str(BLOOD), sample=50) == was_seen(corpus, str(BLOOD), sample=50)
