import pytest

from pretrain.config import BatchConfig, TrainConfig
from scgpt.config import load_config, shipped_configs
from scgpt.errors import ConfigError
from scgpt.vocab import PUBLISHED, GeneVocab


def config_of(*settings: str) -> TrainConfig:
    return load_config(TrainConfig, "demo", ["data.corpus=corpus", *settings], kind="pretrain")


@pytest.mark.parametrize("name", shipped_configs("pretrain"))
def test_each_shipped_recipe_loads_with_nothing_but_a_corpus(name):
    config = load_config(TrainConfig, name, ["data.corpus=corpus"], kind="pretrain")
    assert config.batch.accumulation(1) >= 1
    assert config.model.mvc   # stock scGPT builds the MVC decoder when it loads a release
    assert config.objective.collate_config().context_length == config.objective.context_length


def test_each_model_of_the_family_has_a_recipe():
    recipes = [load_config(TrainConfig, name, ["data.corpus=corpus"], kind="pretrain").model.name
               for name in shipped_configs("pretrain")]
    assert set(recipes) == set(shipped_configs("model"))


def test_the_base_recipe_has_the_published_numbers():
    config = load_config(TrainConfig, "base", ["data.corpus=corpus"], kind="pretrain")
    assert (config.model.n_layers, config.model.d_model, config.model.n_heads, config.model.d_hid) == (12, 512, 8, 512)
    assert (config.batch.global_batch_size, config.train.max_epochs, config.schedule.warmup_steps) == (512, 6, 10000)
    assert (config.optimizer.lr, config.optimizer.grad_clip, config.optimizer.weight_decay) == (1e-4, 1.0, 0.0)
    assert config.objective.collate_config().mask_ratio == (0.25, 0.5, 0.75)
    assert config.objective.context_length == 1200
    assert 50e6 < config.model.count_parameters(len(GeneVocab.named(PUBLISHED))) < 53e6


@pytest.mark.parametrize(("setting", "says"), [
    ("batch.micro_batchsize=2", "did you mean 'micro_batch_size'"),
    ("train.max_stepz=2", "did you mean 'max_steps'"),
    ("deepspeed.zero_stage=4", "deepspeed.zero_stage"),
    ("objective.mask_ratio=1.5", "objective.mask_ratio"),
    ("objective.mask_ratio=[]", "objective.mask_ratio"),
    ("tracking.wandb=maybe", "tracking.wandb"),
    ("train.max_steps=null", "nothing ends this run"),
    ("optimizer.name=Muon", "Muon is not offered: DeepSpeed clips its update in ZeRO 1 to 3 only"),
    ("optimizer.name=sgd", "optimizer.name"),
    ("data.valid_split=train", "what the run trains on"),
    ("objective.mask_ratio=[]", "at least 1 item"),
    ("objective.mask_ratio=[0.2, 1.5]", "'objective.mask_ratio.1' = 1.5: input should be less than 1"),
    ("data.corpus=[]", "at least 1 item"),
    ("data.corpus=[a, b]", "'data.corpus.0' = 'a': keys are wanted: path, weight"),
    ("data.corpus=[{path: a}, {path: b, weight: -1}]", "'data.corpus.1.weight' = -1: input should be greater than 0"),
    ("data.corpus=[{path: a, wight: 2}]", "did you mean 'weight'"),
    ("data.corpus=[{weight: 2}]", "the key 'data.corpus.0.path' is missing"),
    *((f"{key}=100000000000000000000", f"'{key}'") for key in (
        "batch.global_batch_size", "data.block_cells", "data.full_genes", "deepspeed.timeout_s", "train.max_steps",
        "objective.context_length", "objective.unexpressed_genes", "objective.n_bins")),
])
def test_a_wrong_setting_is_named(setting, says):
    with pytest.raises(ConfigError) as caught:
        config_of(setting)
    assert says in str(caught.value)


def test_a_recipe_without_a_corpus_says_which_key_is_missing():
    with pytest.raises(ConfigError, match=r"data.*is missing"):
        load_config(TrainConfig, "demo", [], kind="pretrain")


def test_one_domain_batches_ask_for_the_domain():
    with pytest.raises(ConfigError, match=r"one_domain_batches needs .*data\.batch_column"):
        config_of("data.one_domain_batches=true")


@pytest.mark.parametrize(("global_size", "micro", "ranks", "fix"), [
    (8, 2, 3, r"start 2 rank\(s\), or make it 6"), (12, 2, 4, r"set batch.micro_batch_size=1, or make it 16"),
    (24, 8, 4, r"set batch.micro_batch_size=6, or make it 32"), (7, 4, 2, "make it 8")])
def test_sizes_that_do_not_fit_the_ranks_come_with_ones_that_do(global_size, micro, ranks, fix):
    batch = BatchConfig(global_batch_size=global_size, micro_batch_size=micro)
    with pytest.raises(ConfigError, match=fix):
        batch.accumulation(ranks)
