import pytest

from pretrain import config as module
from pretrain.config import BatchConfig, TrainConfig, config_of_run, differences, other_settings, other_terms
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
    *((f"{key}=100000000000000000000", key) for key in ("batch.global_batch_size", "data.block_cells",
                                                        "data.full_genes", "deepspeed.timeout_s", "train.max_steps")),
])
def test_a_wrong_setting_is_named(setting, says):
    with pytest.raises(ConfigError) as caught:
        config_of(setting)
    assert says in str(caught.value)


def test_a_recipe_without_a_corpus_says_which_key_is_missing():
    with pytest.raises(ConfigError, match=r"data.*is missing"):
        load_config(TrainConfig, "demo", [], kind="pretrain")


def test_a_run_may_go_on_with_other_limits_tracking_micro_batch_precision_and_deepspeed():
    saved = config_of().model_dump(mode="json")
    changed = config_of("train.max_steps=5", "train.max_time_s=1", "train.log_every=1", "tracking.wandb=disabled",
                        "batch.micro_batch_size=2", "deepspeed.zero_stage=1", "deepspeed.overrides={a: 1}",
                        "data.workers=0", "data.corpus=elsewhere", "train.keep_last=9", "train.compile=true",
                        "train.deterministic=true", "deepspeed.offload_optimizer=true", "train.precision=bf16")
    assert differences(saved, changed) == []


@pytest.mark.parametrize("setting", [
    "train.seed=1", "batch.global_batch_size=32", "model.d_model=128", "optimizer.lr=1", "objective.mvc=false",
    "schedule.warmup_steps=1"])
def test_a_run_may_not_go_on_with_anything_else_changed(setting):
    key = setting.partition("=")[0]
    found = differences(config_of().model_dump(mode="json"), config_of(setting))
    assert [line.partition(":")[0] for line in found] == [key]


def with_key(saved: dict, key: str, value: object) -> dict:
    """As a version saved it that had one key more."""
    group, name = key.split(".")
    return saved | {group: saved[group] | {name: value}}


def test_a_key_that_is_gone_is_passed_over_where_the_run_had_the_value_that_we_compute_with(monkeypatch):
    monkeypatch.setitem(module.GONE, "objective.moon_phase", 0.5)
    monkeypatch.setitem(module.GONE, "train.tides", "low")
    now = config_of("model.dropout=0.25")
    saved = now.model_dump(mode="json")
    assert config_of_run(saved, where="run") == (now, [])
    assert config_of_run(with_key(saved, "objective.moon_phase", 0.5), where="run") == (now, ["objective.moon_phase"])
    assert saved == now.model_dump(mode="json")   # what was given is as it was
    with pytest.raises(ConfigError, match=r"moon_phase=0.25, .* no longer has \(run\); go on with the version"):
        config_of_run(with_key(saved, "objective.moon_phase", 0.25), where="run")


def test_a_key_of_a_newer_version_is_refused_in_one_sentence():
    saved = with_key(config_of().model_dump(mode="json"), "train.moon_phase", 0.5)
    with pytest.raises(ConfigError, match=r"not take: unknown key 'train.moon_phase' \(run\); go on with the version"):
        config_of_run(saved, where="run")


def test_what_a_run_goes_on_with_otherwise_is_told():
    changed = config_of("train.max_steps=5", "deepspeed.overrides={gradient_clipping: 2}", "train.precision=bf16")
    assert other_settings(config_of(), changed) == ["deepspeed.overrides {} -> None",
                                                    "deepspeed.overrides.gradient_clipping None -> 2",
                                                    "train.max_steps 1000 -> 5"]


def test_micro_batches_that_decide_which_cells_are_drawn_may_not_change():
    domains = ("data.batch_column=source", "data.one_domain_batches=true")
    saved = config_of(*domains).model_dump(mode="json")
    changed = config_of(*domains, "batch.micro_batch_size=2", "data.workers=0")
    assert [line.partition(":")[0] for line in differences(saved, changed)] == ["batch.micro_batch_size"]


@pytest.mark.parametrize(("settings", "micro", "ranks", "terms"), [
    ((), 16, (1, 2), []), (("model.dropout=0.1",), 32, (1, 2), []), (("model.dropout=0.1",), 16, (1, 1), ["dropout"]),
    (("model.attention_dropout=0.1", "objective.weights.ecs=10"), 16, (2, 2), ["dropout", "ECS"]),
    (("objective.weights.cce=10",), 32, (2, 2), []), (("objective.weights.cce=10",), 32, (1, 2), ["CCE"]),
    (("objective.weights.cce=10",), 16, (1, 2), ["CCE"]),   # as many cells, but others
    (("data.batch_column=source", "model.n_batch_labels=2", "model.domain_spec_batchnorm=batchnorm"), 16, (1, 1),
     ["batch norm"])])
def test_what_other_micro_batches_change_is_named(settings, micro, ranks, terms):
    dry = ("model.dropout=0", "model.attention_dropout=null", "batch.micro_batch_size=32")
    before = config_of(*dry, *settings)
    assert other_terms(before, config_of(*dry, *settings, f"batch.micro_batch_size={micro}"), ranks=ranks) == terms


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
