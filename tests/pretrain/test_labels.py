from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.data import Loader
from pretrain.labels import Labels, number
from scgpt.config import load_config
from scgpt.data import TokenDataset
from scgpt.errors import ConfigError, DataError
from tests.pretrain import runs
from tests.scgpt.data.cells import random_cells, write_corpus


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Donors d0, d1, d2 and nulls in both splits."""
    return runs.make_corpus(tmp_path_factory.mktemp("labels") / "corpus")


def config_of(corpus_dir: Path | str, *settings: str) -> TrainConfig:
    return load_config(TrainConfig, "demo", [f"data.corpus={corpus_dir}", *runs.SETTINGS, *settings], kind="pretrain")


CLASSES = ("data.class_column=donor", "model.n_cls=3", "objective.weights.cls=1")


def test_codes_number_the_values_of_all_splits_alike_and_nulls_are_unknown(corpus_dir):
    corpus = Corpus.open(config_of(corpus_dir, *CLASSES))
    assert corpus.label_values == {"donor": ["d0", "d1", "d2"]}
    for split, labels in ((corpus.train, corpus.train_labels), (corpus.valid, corpus.valid_labels)):
        donors = split.obs(["donor"]).column(0).to_pylist()
        named = [None if code < 0 else corpus.label_values["donor"][code] for code in labels.classes.tolist()]
        assert named == donors
        assert None in donors
        assert labels.batches is None
    assert corpus.facts()["labels"] == corpus.label_values


def test_a_value_that_one_split_or_corpus_lacks_keeps_its_number(tmp_path):
    class Column:
        def __init__(self, *values):
            self.values = list(values)

        def codes(self, column):
            names = sorted(set(self.values) - {None})
            return np.array([names.index(v) if v is not None else -1 for v in self.values], np.int32), names

    codes, values = number([Column("b", None, "a"), Column("c", "a")], "x")
    assert values == ["a", "b", "c"]
    assert [part.tolist() for part in codes] == [[1, -1, 0], [2, 0]]


def test_a_mixture_numbers_its_corpora_together(corpus_dir, tmp_path):
    write_corpus(tmp_path / "second", {"train": [random_cells([4] * 7, source="s")], "valid": []})
    config = config_of(f"[{{path: {corpus_dir}}}, {{path: {tmp_path / 'second'}}}]", *CLASSES)
    corpus = Corpus.open(config)
    parts = [TokenDataset.open(folder).obs(["donor"]).column(0).to_pylist() for folder in (
        corpus_dir, tmp_path / "second")]
    named = [None if code < 0 else corpus.label_values["donor"][code] for code in corpus.train_labels.classes.tolist()]
    assert named == parts[0] + parts[1]


def test_a_micro_batch_carries_the_labels_of_its_cells(corpus_dir):
    corpus = Corpus.open(config_of(corpus_dir, *CLASSES))
    labels = replace(corpus.train_labels, batches=np.arange(len(corpus.train), dtype=np.int32))
    corpus = replace(corpus, train_labels=labels)
    place = {cell: i for i, cell in enumerate(
        corpus.train.fetch(np.arange(len(corpus.train))).columns["cell_id"].tolist())}
    loader = Loader.of_run(config_of(corpus_dir, *CLASSES), corpus, rank=0, world_size=1)
    for batch in loader.load(3).micro_batches:
        places = [place[cell] for cell in batch.cell_ids.tolist()]
        assert batch.batch_labels.tolist() == places
        assert batch.class_labels.tolist() == labels.classes[places].tolist()


def test_without_labels_a_batch_is_left_as_it_is(corpus_dir):
    corpus = Corpus.open(config_of(corpus_dir))
    (batch, *_) = Loader.of_run(config_of(corpus_dir), corpus, rank=0, world_size=1).load(0).micro_batches
    assert Labels().attach(batch, np.arange(len(batch))) is batch


@pytest.mark.parametrize(("settings", "error", "says"), [
    (("data.batch_column=donor", "model.use_batch_labels=true", "model.n_batch_labels=3"), ConfigError,
     "cells have no value in column 'donor'"),
    (("data.batch_column=source", "model.use_batch_labels=true", "model.n_batch_labels=1"), None, ""),
    (("data.class_column=donor", "model.n_cls=2", "objective.weights.cls=1"), ConfigError, "set model.n_cls=3"),
    (("data.class_column=tissue", "model.n_cls=2", "objective.weights.cls=1"), DataError,
     "choose one of: source, donor"),
])
def test_labels_that_do_not_fit_are_refused_in_one_sentence(corpus_dir, settings, error, says):
    config = config_of(corpus_dir, *settings)
    if error is None:
        assert set(Corpus.open(config).train_labels.batches.tolist()) == {0}
        return
    with pytest.raises(error) as caught:
        Corpus.open(config)
    assert says in str(caught.value)


def test_domains_with_norms_of_their_own_must_not_share_a_micro_batch(corpus_dir, tmp_path):
    two = runs.write_two_sources(tmp_path / "two")
    domains = ("data.batch_column=source", "model.n_batch_labels=2")
    with pytest.raises(ConfigError, match=r"2 domains whose cells share a micro-batch.*domain_spec_batchnorm"):
        Corpus.open(config_of(two, *domains, "model.domain_spec_batchnorm=true"))
    assert Corpus.open(config_of(two, *domains, "model.domain_spec_batchnorm=batchnorm")).label_values == {
        "source": ["a", "b"]}
    Corpus.open(config_of(corpus_dir, *domains, "model.domain_spec_batchnorm=dsbn"))   # one domain
    alone = config_of(two, *domains, "model.domain_spec_batchnorm=dsbn", "data.one_domain_batches=true")
    opened = Corpus.open(alone)
    for step in range(30):
        for batch in Loader.of_run(alone, opened, rank=0, world_size=1).load(step).micro_batches:
            assert len(batch) == alone.batch.micro_batch_size
            assert len(set(batch.batch_labels.tolist())) == 1


@pytest.mark.slow
def test_classes_domains_similarity_contrast_and_batch_norm_train_on_two_ranks_and_validate_alike(tmp_path):
    """All terms at once: the losses of training fall, and validation has the terms that need no second pass."""
    corpus = runs.write_two_sources(tmp_path / "corpus")
    settings = (*CLASSES, "data.batch_column=source", "model.n_batch_labels=2", "model.use_batch_labels=true",
                "model.dab=true", "model.domain_spec_batchnorm=batchnorm", "model.explicit_zero_prob=true",
                "objective.weights.ecs=10", "objective.weights.cce=10", "train.max_steps=20", "train.eval_every=20",
                "deepspeed.zero_stage=2", "model.dropout=0.1")
    code, errors = runs.train(corpus, tmp_path / "run", *settings, ranks=2)
    assert code == 0, errors
    curve = runs.curve(tmp_path / "run")
    terms = {f"loss_{term}" for term in ("expression", "mvc", "zero", "mvc_zero", "cls", "dab", "ecs", "cce")}
    assert terms <= set(curve["train", 20])
    assert terms - {"loss_cce"} <= set(curve["valid", 20])
    assert "loss_cce" not in curve["valid", 20]
    assert curve["train", 20]["loss"] < curve["train", 5]["loss"]
    first, last = curve["valid", 0], curve["valid", 20]
    assert last["loss"] < first["loss"]
    statistics = runs.weights(tmp_path / "run")["bn.running_mean"]
    assert float(statistics.abs().max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    ("model.domain_spec_batchnorm=dsbn", "deepspeed.zero_stage=3"),
    ("model.domain_spec_batchnorm=do_affine", "model.generative=true", "objective.task=gen", "deepspeed.zero_stage=2"),
], ids=["masked, ZeRO 3", "generative, weights of their own, ZeRO 2"])
def test_a_model_with_a_norm_for_each_domain_trains_alike_on_one_rank_and_on_two(tmp_path, settings):
    """Two ranks are in different domains at a time, and the losses do not tell."""
    corpus = runs.write_two_sources(tmp_path / "corpus")
    settings = (*settings, "data.batch_column=source", "model.n_batch_labels=2", "data.one_domain_batches=true",
                "model.dropout=0", "train.max_steps=40", "train.eval_every=40")
    curves = []
    for ranks in (1, 2):
        code, errors = runs.train(corpus, tmp_path / f"run-{ranks}", *settings, ranks=ranks)
        assert code == 0, errors
        curves.append(runs.curve(tmp_path / f"run-{ranks}"))
    alone, spread = curves
    assert alone["train", 40]["loss"] < alone["train", 5]["loss"]
    assert alone["valid", 40]["loss"] < alone["valid", 0]["loss"]
    for step in (5, 10, 20, 40):
        assert spread["train", step]["loss"] == pytest.approx(alone["train", step]["loss"], rel=1e-4)
    assert spread["valid", 40]["loss"] == pytest.approx(alone["valid", 40]["loss"], rel=1e-3)
