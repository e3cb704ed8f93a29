from pathlib import Path

import numpy as np
import pytest

from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.probe import Probe
from pretrain.world import join_world
from scgpt.config import load_config
from scgpt.errors import ConfigError
from tests.pretrain import runs

PROBE = ("train.probe_every=4", "data.class_column=donor")


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_corpus(tmp_path_factory.mktemp("probe") / "corpus", n_valid=41)


@pytest.fixture
def world():   # for one test: it sets RANK, which the ranks of a program would take for theirs
    with join_world(timeout_s=10) as joined:
        yield joined


def config_of(corpus_dir: Path, *settings: str) -> TrainConfig:
    return load_config(TrainConfig, "demo", [f"data.corpus={corpus_dir}", *runs.SETTINGS, *settings], kind="pretrain")


def test_it_takes_held_out_cells_of_known_class_evenly(corpus_dir, world):
    config = config_of(corpus_dir, *PROBE, "train.probe_cells=17")
    corpus = Corpus.open(config)
    probe = Probe.of(corpus, config, world)
    assert probe is not None
    assert len(probe.chosen) == len(np.unique(probe.chosen)) == 17
    assert (probe.classes >= 0).all()
    np.testing.assert_array_equal(probe.classes, corpus.valid_labels.classes[probe.chosen])
    assert 0 <= probe.baseline() <= 1
    assert Probe.of(corpus, config_of(corpus_dir), world) is None


@pytest.mark.parametrize(("settings", "says"), [
    (("train.probe_every=4",), "needs held-out cells of known class"),
    ((*PROBE, "data.valid_split=null"), "needs held-out cells of known class"),
    ((*PROBE, "model.kind=generator"), "no cell embedding to probe"),
])
def test_what_cannot_be_probed_is_refused(corpus_dir, settings, says):
    with pytest.raises(ConfigError, match=says):
        config_of(corpus_dir, *settings)


def test_too_few_cells_are_refused(tmp_path, world):
    config = config_of(runs.make_corpus(tmp_path / "corpus", n_valid=13), *PROBE)
    with pytest.raises(ConfigError, match="more than 15 held-out cells of known class"):
        Probe.of(Corpus.open(config), config, world)


@pytest.mark.slow
@pytest.mark.system
def test_the_probe_is_the_same_on_any_ranks_and_stage_and_changes_no_other_number(corpus_dir, tmp_path):
    curves = {}
    for name, ranks, settings in (("none", 1, ()), ("one", 1, PROBE), ("two", 2, (*PROBE, "deepspeed.zero_stage=3"))):
        code, errors = runs.train(corpus_dir, tmp_path / name, "train.max_steps=10", *settings, ranks=ranks)
        assert code == 0, errors
        curves[name] = runs.curve(tmp_path / name)
    probes = {name: {key: row for key, row in curve.items() if key[0] == "probe"} for name, curve in curves.items()}
    assert [step for _, step in probes["one"]] == [0, 4, 8, 10]
    assert probes["one"] == probes["two"]
    assert {key: row for key, row in curves["one"].items() if key[0] != "probe"} == curves["none"]
