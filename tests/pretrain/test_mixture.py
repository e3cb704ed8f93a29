from dataclasses import replace

import numpy as np
import pytest

from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.data import Loader
from pretrain.draw import order_of
from pretrain.mixture import Mixture
from pretrain.order import PERIOD
from pretrain.peek import peek
from scgpt.collate import CollateConfig, collate
from scgpt.config import load_config
from scgpt.data import TokenDataset
from scgpt.errors import ConfigError, DataError
from scgpt.vocab import GeneVocab
from tests.pretrain import runs
from tests.scgpt.data.cells import random_cells, write_corpus


def lengths(n_cells):
    return [3 + (7 * i) % 50 for i in range(n_cells)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    write_corpus(folder / "a", {"train": [random_cells(lengths(60), source="a")],
                                "valid": [random_cells([5, 6], seed=1, source="av")]})
    write_corpus(folder / "b", {"train": [random_cells(lengths(31), seed=2, source="b", dtype=np.float32)],
                                "valid": [random_cells([7], seed=3, source="bv", dtype=np.float32)]})
    return folder / "a", folder / "b"


@pytest.fixture
def mixture(folders):
    return Mixture(tuple(TokenDataset.open(folder) for folder in folders), (1.0, 3.0))


def config_of(folders, *settings, weights=(1.0, 3.0)):
    return load_config(TrainConfig, "demo", [f"data.corpus={corpora_of(folders, weights)}", *runs.SETTINGS, *settings],
                       kind="pretrain")


def corpora_of(folders, weights):
    parts = zip(folders, weights, strict=True)
    return f"[{', '.join(f'{{path: {folder}, weight: {weight}}}' for folder, weight in parts)}]"


def test_cells_are_numbered_through_and_fetched_in_any_order(mixture):
    order = np.random.default_rng(0).permutation(len(mixture))
    fetched = mixture.fetch(order)
    assert fetched.expressions.dtype == np.float32
    np.testing.assert_array_equal(fetched.lengths, mixture.lengths_of(order))
    np.testing.assert_array_equal(fetched.lengths, mixture.lengths[order])
    for place in (0, 17, 90):
        corpus, cell = (0, order[place]) if order[place] < 60 else (1, order[place] - 60)
        alone = mixture.parts[corpus][cell]
        own = slice(fetched.offsets[place], fetched.offsets[place + 1])
        assert fetched.columns["cell_id"][place] == alone["cell_id"]
        np.testing.assert_array_equal(fetched.genes[own], alone["genes"])
        np.testing.assert_array_equal(fetched.expressions[own], alone["expressions"])
    assert len(mixture.fetch(np.empty(0, np.int64))) == 0


@pytest.mark.parametrize(("kinds", "gene_types"), [
    ((np.uint16, np.float32), (np.uint16, np.uint16)), ((np.uint16, np.uint16), (np.uint16, np.uint32)),
    ((np.uint16, np.uint16), (np.uint32, np.uint16)), ((np.uint16, np.uint16), (np.uint16, np.uint16)),
], ids=["two types of values", "of ids", "of ids, the wider first", "one type"])
def test_views_are_the_cells_that_are_fetched(tmp_path, kinds, gene_types, monkeypatch):
    for seed, (kind, gene_type) in enumerate(zip(kinds, gene_types, strict=True)):
        cells = random_cells(lengths(40), seed=seed, source=str(seed), dtype=kind)
        write_corpus(tmp_path / str(seed), {"train": [replace(cells, genes=cells.genes.astype(gene_type))]})
    if len({*kinds}) + len({*gene_types}) > 2:   # read once, by `fetch`
        monkeypatch.delattr(TokenDataset, "views")
    mixture = Mixture(tuple(TokenDataset.open(tmp_path / str(seed)) for seed in range(2)), (1.0, 1.0))
    order = np.random.default_rng(0).permutation(80)[:50]
    found, expected = (collate(cells, CollateConfig(30), cls_id=0, seed=0, epochs=0)
                       for cells in (mixture.views(order), mixture.fetch(order)))
    for name in ("gene_ids", "values", "targets", "target_mask", "cu_seqlens", "cell_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert len(mixture.views(np.empty(0, np.int64))) == 0


def test_a_damaged_cell_is_told_with_its_corpus(tmp_path):
    for seed in range(2):
        write_corpus(tmp_path / str(seed), {"train": [random_cells([9] * 20, seed=seed, source=str(seed))]})
    genes = TokenDataset.open(tmp_path / "1").fetch(np.array([7])).genes
    part = tmp_path / "1" / "train" / "part-00000.arrow"
    part.write_bytes(part.read_bytes().replace(genes.tobytes(), b"\xff" * genes.nbytes))
    mixture = Mixture(tuple(TokenDataset.open(tmp_path / str(seed)) for seed in range(2)), (1.0, 1.0))
    with pytest.raises(DataError, match="cell 7 of split 'train' holds a gene id") as caught:
        collate(mixture.views(np.array([30, 3, 27, 12])), CollateConfig(30), cls_id=0, seed=0, epochs=0)
    assert str(tmp_path / "1") in str(caught.value)


def test_a_step_deals_cells_by_weight_and_epochs_are_told(mixture):
    order = order_of(mixture, seed=1)
    cells, _ = order.batch(0, PERIOD)
    assert np.count_nonzero(cells < 60) == PERIOD // 4
    assert order.epochs(PERIOD) == pytest.approx([PERIOD / 4 / 60, PERIOD * 3 / 4 / 31], rel=1e-12)
    for n_cells in (0, 1, 100, 1_000):
        of_a = np.count_nonzero(cells[:n_cells] < 60)
        assert order.epochs(n_cells) == pytest.approx([of_a / 60, (n_cells - of_a) / 31], rel=1e-12)


@pytest.mark.parametrize("settings", [(), ("data.order=blocks", "data.block_cells=8", "data.window_blocks=2")])
def test_a_mixture_is_the_same_on_any_world_size(folders, settings):
    config = config_of(folders, *settings)
    for step in (0, 9):
        alone = peek(config, step)
        several = peek(config, step, world_size=4)
        assert (several.cells, several.digest) == (alone.cells, alone.digest)
    assert peek(config, 0).digest != peek(config_of(folders, *settings, weights=(3.0, 1.0)), 0).digest


def test_blocks_train_on_every_cell_once_an_epoch(folders):
    config = load_config(TrainConfig, "demo", [f"data.corpus={folders[0]}", *runs.SETTINGS, "data.order=blocks",
                                               "data.block_cells=7", "data.window_blocks=3",
                                               "batch.global_batch_size=12", "batch.micro_batch_size=4"],
                         kind="pretrain")
    corpus = Corpus.open(config)
    loader = Loader.of_run(config, corpus, rank=0, world_size=1)
    seen = [cell for step in range(5) for batch in loader.load(step).micro_batches for cell in batch.cell_ids.tolist()]
    assert sorted(seen) == sorted(corpus.train.fetch(np.arange(60)).columns["cell_id"].tolist())


def test_facts_name_the_parts_and_change_with_the_weights(folders):
    facts, others = (Corpus.open(config_of(folders, weights=weights)).facts() for weights in ((1, 3), (1, 2)))
    assert [part["weight"] for part in facts["mixture"]] == [1, 3]
    assert facts["splits"]["train"]["cells"] == 91
    assert facts["splits"]["valid"]["cells"] == 3
    assert facts["sha256"] != others["sha256"]
    alone = Corpus.open(load_config(TrainConfig, "demo", [f"data.corpus={folders[0]}"], kind="pretrain")).facts()
    assert alone["sha256"] == TokenDataset.open(folders[0]).manifest.sha256
    assert "mixture" not in alone


def test_corpora_with_other_vocabularies_are_refused(folders, tmp_path, monkeypatch):
    from_dict = GeneVocab.from_dict
    monkeypatch.setattr("tests.scgpt.data.cells.GeneVocab.from_dict", lambda tokens, **kind: from_dict(
        {token.replace("g0", "x0"): index for token, index in tokens.items()}, **kind))
    write_corpus(tmp_path / "c", {"train": [random_cells([3], source="c")], "valid": []})
    with pytest.raises(ConfigError, match="different vocabularies"):
        Corpus.open(config_of([folders[0], tmp_path / "c"]))


@pytest.mark.slow
def test_a_mixture_trains_validates_and_goes_on(folders, tmp_path):
    corpora = corpora_of(folders, (1, 2))
    settings = ("train.max_steps=6", "train.log_every=2", "train.eval_every=3", "train.save_every=3")
    code, errors = runs.train(corpora, tmp_path / "run", *settings)
    assert code == 0, errors
    rows = runs.curve(tmp_path / "run")
    assert {"epochs_0", "epochs_1"} <= set(rows["train", 6])
    code, errors = runs.train(corpora.replace("weight: 2", "weight: 3"), tmp_path / "run", *settings)
    assert code == 2
    assert "not the one that the run was started with" in errors


def test_values_have_the_type_of_all_corpora_whichever_cells_are_asked_for(mixture):
    for indices in ([0, 1], [60, 61], [0, 60]):
        assert mixture.fetch(np.array(indices)).expressions.dtype == np.float32
    whole = mixture.parts[0].fetch(np.array([3])).expressions
    assert whole.dtype == np.uint16
    np.testing.assert_array_equal(mixture.fetch(np.array([3])).expressions, whole)


def test_a_corpus_without_the_split_to_validate_on_is_told_what_to_set(folders, tmp_path):
    write_corpus(tmp_path, {"train": [random_cells([3, 4])]})
    for corpus in (tmp_path, f"[{{path: {folders[0]}}}, {{path: {tmp_path}}}]"):
        config = load_config(TrainConfig, "demo", [f"data.corpus={corpus}", *runs.SETTINGS], kind="pretrain")
        with pytest.raises(ConfigError, match=r"no split 'valid' to validate on .*set data\.valid_split to .* null"):
            Corpus.open(config)
