import dataclasses
import hashlib

import pytest

from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.data import Loader
from pretrain.peek import peek
from scgpt.config import load_config
from scgpt.errors import ConfigError
from tests.pretrain import runs
from tests.pretrain.runs import write_two_sources
from tests.scgpt.data.cells import random_cells, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peek")
    write_corpus(folder, {"train": [random_cells([3 + (7 * i) % 50 for i in range(60)], source="a")],
                          "valid": [random_cells([5, 6], seed=1, source="b")]})
    return folder


@pytest.fixture(scope="module")
def domains_corpus(tmp_path_factory):
    return write_two_sources(tmp_path_factory.mktemp("domains") / "corpus")


def config_of(corpus, *settings):
    return load_config(TrainConfig, "demo", [f"data.corpus={corpus}", *runs.SETTINGS, *settings], kind="pretrain")


def test_every_world_size_shows_the_same_cells_and_digest(corpus):
    config = config_of(corpus)
    for step in (0, 7, 8):   # 8 cells of 60 a step: the second batch straddles two epochs
        alone = peek(config, step)
        assert len(alone.cells) == 8
        for world_size in (2, 4):
            several = peek(config, step, world_size=world_size)
            assert (several.cells, several.digest) == (alone.cells, alone.digest)


DOMAINS = ("data.batch_column=source", "data.one_domain_batches=true")
THIN = "data.full_genes=30"
BLOCKS = ("data.order=blocks", "data.block_cells=8", "data.window_blocks=3")


@pytest.mark.parametrize("settings", [(THIN,), DOMAINS, (*DOMAINS, THIN), (*DOMAINS, THIN, *BLOCKS),
                                      ("objective.unexpressed_genes=20",)],
                         ids=lambda settings: " ".join(settings))
@pytest.mark.parametrize("corpora", ["one", "mixture"])
def test_every_world_size_shows_the_same_cells_and_digest_with_every_option(domains_corpus, corpus, corpora, settings):
    given = domains_corpus if corpora == "one" else f"[{{path: {domains_corpus}}}, {{path: {corpus}, weight: 2}}]"
    config = config_of(given, "model.n_batch_labels=3", *settings)
    for step in (0, 7, 300):
        alone = peek(config, step)
        assert len(alone.cells) == 8
        assert peek(config, step, world_size=2) == dataclasses.replace(alone, world_size=2)
        assert peek(config, step, world_size=4) == dataclasses.replace(alone, world_size=4)


def test_steps_and_seeds_differ(corpus):
    digests = {peek(config_of(corpus, f"train.seed={seed}"), step).digest for seed in (0, 1) for step in (0, 1)}
    assert len(digests) == 4


def test_a_cell_is_what_the_loader_hands_to_the_model(corpus):
    config = config_of(corpus)
    opened = Corpus.open(config)
    shown = {cell.cell_id: cell for cell in peek(config, 3).cells}
    for batch in Loader.of_run(config, opened, rank=0, world_size=1).load(3).micro_batches:
        for i, cell_id in enumerate(batch.cell_ids.tolist()):
            tokens = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
            content = b"".join(array[tokens].tobytes() for array in (batch.gene_ids, batch.values, batch.targets,
                                                                     batch.target_mask))
            cell = shown.pop(cell_id)
            assert cell.sha256 == hashlib.sha256(content).hexdigest()
            assert (cell.tokens, cell.masked) == (tokens.stop - tokens.start, batch.target_mask[tokens].sum())
            assert (cell.source, cell.row) == ("a", opened.train.obs(["cell_id", "source_row"]).to_pandas()
                                               .set_index("cell_id").source_row[cell_id])
    assert not shown


@pytest.mark.parametrize(("step", "world_size", "says"), [(-1, 1, "no step -1"), (0, 0, "0 ranks"),
                                                          (0, 3, "no multiple"), (10**30, 1, "give --step from 0 to"),
                                                          ((1 << 59), 1, "give --step from 0 to")])
def test_what_is_no_step_of_a_run_is_refused(corpus, step, world_size, says):
    with pytest.raises(ConfigError, match=says):
        peek(config_of(corpus), step, world_size=world_size)


@pytest.mark.parametrize("settings", [(), (THIN,), BLOCKS, DOMAINS, (*DOMAINS, THIN, *BLOCKS)],
                         ids=lambda settings: " ".join(settings))
def test_the_last_step_that_can_be_shown_is_shown(domains_corpus, settings):
    shown = peek(config_of(domains_corpus, "model.n_batch_labels=2", *settings), (1 << 59) - 1)   # 8 cells a step
    assert len(shown.cells) == 8
