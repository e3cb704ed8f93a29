import pytest

from pretrain import continuation
from pretrain.continuation import config_of_run, differences, other_settings, other_terms
from scgpt.errors import ConfigError
from tests.pretrain.test_config import config_of


def test_a_run_may_go_on_with_other_limits_tracking_micro_batch_precision_and_deepspeed():
    saved = config_of().model_dump(mode="json")
    changed = config_of("train.max_steps=5", "train.max_time_s=1", "train.log_every=1", "tracking.wandb=disabled",
                        "batch.micro_batch_size=2", "deepspeed.zero_stage=1", "deepspeed.overrides={a: 1}",
                        "data.workers=0", "data.corpus=elsewhere", "model.attention_backend=math",
                        "train.keep_last=9", "train.compile=true",
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
    monkeypatch.setitem(continuation.GONE, "objective.moon_phase", 0.5)
    monkeypatch.setitem(continuation.GONE, "train.tides", "low")
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


def test_what_a_run_goes_on_with_otherwise_is_told():
    changed = config_of("train.max_steps=5", "deepspeed.overrides={gradient_clipping: 2}", "train.precision=bf16")
    assert other_settings(config_of(), changed) == ["deepspeed.overrides.gradient_clipping None -> 2",
                                                    "train.max_steps 1000 -> 5"]
