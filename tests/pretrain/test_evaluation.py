from pathlib import Path

import numpy as np
import pytest

from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.evaluation import EVALUATION_SEED, HeldOut
from pretrain.run_directory import total_steps
from pretrain.world import join_world
from scgpt.collate import collate
from scgpt.config import load_config
from scgpt.errors import ConfigError
from scgpt.vocab import CLS
from tests.pretrain import runs


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_corpus(tmp_path_factory.mktemp("evaluation") / "corpus")


def config_of(corpus_dir: Path, *settings: str) -> TrainConfig:
    return load_config(TrainConfig, "demo", [f"data.corpus={corpus_dir}", *runs.SETTINGS, *settings], kind="pretrain")


@pytest.fixture(scope="module")
def world():
    with join_world(timeout_s=10) as joined:
        yield joined


def everything(cells, config, cls_id, *, mask):
    return collate(cells.fetch(np.arange(len(cells))), config.objective.collate_config(), cls_id=cls_id,
                   seed=EVALUATION_SEED, epochs=0, mask=mask)


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_the_gene_mean_baseline_is_that_of_a_dictionary_of_lists(corpus_dir, world, micro_batch_size):
    config = config_of(corpus_dir, f"batch.micro_batch_size={micro_batch_size}")
    corpus = Corpus.open(config)
    cls_id = corpus.vocab[CLS]
    seen = everything(corpus.train, config, cls_id, mask=False)
    bins_of: dict[int, list[float]] = {}
    for gene, value in zip(seen.gene_ids.tolist(), seen.targets.tolist(), strict=True):
        if gene != cls_id:
            bins_of.setdefault(gene, []).append(value)
    overall = np.mean([value for values in bins_of.values() for value in values])
    held = everything(corpus.valid, config, cls_id, mask=True)
    hidden = held.target_mask
    errors = [(value - np.mean(bins_of.get(gene, [overall]))) ** 2
              for gene, value in zip(held.gene_ids[hidden].tolist(), held.targets[hidden].tolist(), strict=True)]
    found = HeldOut(corpus.valid, config, corpus.vocab, world).gene_mean_loss(corpus.train, len(corpus.vocab))
    assert found == pytest.approx(np.mean(errors), rel=1e-12)


def test_the_first_limit_ends_a_run(corpus_dir):
    train = Corpus.open(config_of(corpus_dir)).train   # 60 cells, 8 a step

    def steps(*settings):
        config = config_of(corpus_dir, "train.max_steps=null", *settings)
        return total_steps(config, Corpus.open(config))

    assert steps("train.max_epochs=2") == 15
    assert steps("train.max_epochs=2", "train.max_steps=7") == 7
    tokens = int((np.minimum(train.lengths, 31) + 1).sum())
    assert steps(f"train.max_tokens={tokens}") == steps("train.max_epochs=1") == 8
    assert steps(f"train.max_tokens={tokens}", "train.max_epochs=0.25") == 2


def test_a_corpus_without_the_special_tokens_is_refused(corpus_dir, monkeypatch):
    monkeypatch.setattr("pretrain.corpus.CLS", "<nothing>")
    with pytest.raises(ConfigError, match="vocabulary lacks <nothing>"):
        Corpus.open(config_of(corpus_dir))
