from pathlib import Path

import pytest

from data_pipeline.config import CorpusConfig
from scgpt.config import load_config, shipped_configs
from scgpt.errors import ConfigError
from scgpt.vocab import GeneVocab


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "corpus.yaml"
    path.write_text(text)
    return path


def load(path: Path, *overrides: str) -> CorpusConfig:
    return load_config(CorpusConfig, path, overrides, kind="corpus")


def test_a_bare_path_is_a_source_beside_the_file(tmp_path: Path) -> None:
    config = load(written(tmp_path, "sources: [atlas/*.h5ad, {path: lung.h5ad, name: lung, layer: raw}]"))
    assert [source.path for source in config.sources] == [str(tmp_path / "atlas/*.h5ad"), str(tmp_path / "lung.h5ad")]
    assert (config.sources[0].name, config.sources[1].name, config.sources[1].layer) == (None, "lung", "raw")


def test_a_url_is_kept_as_it_is_written_and_its_folder_is_not_published(tmp_path: Path) -> None:
    config = load(written(tmp_path, "sources: ['s3://lake//deep/a.h5ad', {path: 'https://host/b.h5ad?key=s3cret'}]"))
    assert [source.path for source in config.sources] == ["s3://lake//deep/a.h5ad", "https://host/b.h5ad?key=s3cret"]
    assert [source["path"] for source in config.portable()["sources"]] == ["a.h5ad", "b.h5ad"]


def test_a_kind_that_there_is_not_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sources.0.kind.*choose auto, h5ad, zarr"):
        load(written(tmp_path, "sources: [{path: a, kind: h5da}]"))


def test_the_keys_that_scripts_rely_on_have_these_defaults(tmp_path: Path) -> None:
    config = load(written(tmp_path, "sources: [a.h5ad]"))
    values = config.model_dump(mode="json")
    del values["sources"]
    assert values == {
        "vocab": "scgpt-human", "columns": ["dataset", "donor", "tissue", "cell_type", "assay"],
        "genes": {"min_gene_overlap": 0.3, "duplicates": "sum"},
        "cells": {"filter": None, "min_genes": 50, "max_genes": None, "min_counts": None, "max_counts": None,
                  "max_value": None, "max_mito_fraction": None, "remove_duplicates": False,
                  "duplicate_min_genes": 20, "expression_kind": "counts"},
        "splits": {"valid": 0.03, "by": "cell", "seed": 0},
        "shards": {"form": "arrow", "max_bytes": 512 << 20, "compression": "none", "shuffle": True},
        "on_error": "fail", "seed": 0, "workers": "auto"}


@pytest.mark.parametrize("override", ["cells.min_gene=3", "splits.by=tissue", "shards.max_bytes=3", "splits.valid=2",
                                      "cells.filter='a ='", "columns=[donor,donor]", "columns=[source]", "sources=[]",
                                      "splits.valid=true", "cells.max_mito_fraction=true", "columns=donor",
                                      "cells.expression_kind=logs", "vocab=3"])
def test_wrong_settings_are_refused_with_their_key(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, "sources: [a.h5ad]"), override)
    assert override.partition("=")[0] in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("override", [
    "sources=[{path: 'https://me:s3cret@host/a.h5ad?key=s3cret', filter: 'a ='}]",
    "sources='https://me:s3cret@host/a.h5ad?key=s3cret'", "sources=[{paht: 's3://me:s3cret@bucket/a.h5ad'}]"])
def test_wrong_settings_are_shown_without_the_secrets_of_a_url(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="sources") as caught:
        load(written(tmp_path, ""), override)
    assert "s3cret" not in str(caught.value)


def test_no_folder_is_left_in_what_a_corpus_publishes(tmp_path: Path) -> None:
    GeneVocab(["A", "B"]).save_json(tmp_path / "mine.json")
    config = load(written(tmp_path, "sources: [deep/down/a.h5ad]\nvocab: mine.json"))
    assert len(config.load_vocab()) == 2
    assert str(tmp_path) not in str(config.portable())
    assert config.portable()["vocab"] == "mine.json"
    assert config.portable()["sources"][0]["path"] == "a.h5ad"


def test_the_resolved_configuration_reads_back(tmp_path: Path) -> None:
    config = load(written(tmp_path, "sources: [a.h5ad]\nshards: {max_bytes: 4MiB}\ncells: {filter: 'x == 1'}"))
    assert load(written(tmp_path, config.to_yaml())) == config


@pytest.mark.parametrize("name", sorted(shipped_configs("corpus")))
def test_what_ships_is_valid(name: str) -> None:
    assert load_config(CorpusConfig, name, kind="corpus").sources
