"""What DeepSpeed is given: every number of it ours, and nothing that it would pass over."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.config import TrainConfig
from pretrain.deepspeed_json import deepspeed_json
from pretrain.deepspeed_package import known_keys
from scgpt.config import load_config
from scgpt.errors import ConfigError
from tests.pretrain import runs


def config_of(corpus: Path, *settings: str) -> TrainConfig:
    return load_config(TrainConfig, "demo", [f"data.corpus={corpus}", *runs.SETTINGS, *settings], kind="pretrain")


def test_the_json_leaves_no_zero_key_and_no_number_of_deepspeeds_to_chance(corpus):
    """Every field of DeepSpeed's own ZeRO and precision models is written, but deprecated and switched-off ones."""
    code = """
import json, sys
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
def names(model):
    return [field.alias or name for name, field in model.model_fields.items()
            if not (field.json_schema_extra or {}).get("deprecated")]
print(json.dumps({"zero": names(DeepSpeedZeroConfig), "bf16": names(DeepSpeedBF16Config),
                  "fp16": names(DeepSpeedFP16Config)}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env=os.environ | {"DS_ACCELERATOR": "cpu"})
    theirs = json.loads(run.stdout.splitlines()[-1])
    ours = [deepspeed_json(config_of(corpus, f"deepspeed.zero_stage={stage}"), world_size=2, precision="fp32",
                           on_cpu=True) for stage in range(4)]
    written = set().union(*(set(each["zero_optimization"]) for each in ours))
    no_number = {"offload_param", "offload_optimizer", "zenflow", "leaf_module", "log_trace_cache_warnings",
                 "pipeline_loading_checkpoint", "override_module_apply", "enable_sanity_checks",
                 "save_muon_momentum_buffer_in_memory", "zero_quantized_nontrainable_weights",
                 "stage3_model_persistence_threshold", "stage3_module_granularity_threshold",
                 "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential"}
    assert set(theirs["zero"]) - no_number == written
    for precision in ("bf16", "fp16"):
        assert set(theirs[precision]) == set(ours[2][precision])


def test_the_optimizer_and_clipping_are_those_of_the_configuration(corpus):
    config = config_of(corpus, "optimizer.weight_decay=0.25", "optimizer.grad_clip=0.5", "optimizer.betas=[0.8, 0.9]")
    derived = deepspeed_json(config, world_size=2, precision="bf16", on_cpu=False)
    assert derived["optimizer"]["params"]["weight_decay"] == 0.25
    assert derived["optimizer"]["params"]["betas"] == [0.8, 0.9]
    assert derived["gradient_clipping"] == 0.5
    assert derived["bf16"]["enabled"]
    assert not derived["fp16"]["enabled"]
    assert derived["gradient_accumulation_steps"] == 2   # 8 cells / (2 x 2 ranks)


def test_sizes_that_do_not_fit_the_ranks_are_refused_with_one_that_does(corpus):
    with pytest.raises(ConfigError, match=r"global_batch_size 8 is no multiple of .* 2 x 3 ranks.*make it 6"):
        deepspeed_json(config_of(corpus), world_size=3, precision="fp32", on_cpu=True)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")   # of torch itself, when DeepSpeed imports it
def test_overrides_reach_any_key_but_what_a_setting_decides(corpus):
    config = config_of(corpus, "deepspeed.overrides={zero_optimization: {overlap_comm: true}, vocabulary_size: 64}")
    derived = deepspeed_json(config, world_size=1, precision="fp32", on_cpu=True)
    assert derived["zero_optimization"]["overlap_comm"] is True
    assert derived["zero_optimization"]["stage"] == 2
    assert derived["vocabulary_size"] == 64
    for overrides, says in (("train_batch_size: 9", "'train_batch_size'; set batch.global_batch_size instead"),
                            ("zero_optimization: {stage: 3}", "'zero_optimization.stage'; set deepspeed.zero_stage"),
                            ("bf16: {enabled: true}", "'bf16.enabled'; set train.precision instead"),
                            ("fp16: {enabled: true}", "'fp16.enabled'; set train.precision instead"),
                            ("optimizer: {params: {lr: 1}}", "set optimizer.lr instead"),   # the schedule sets it
                            ("scheduler: {type: WarmupLR}", "set schedule.kind instead"),
                            ("optimizer: {type: Muon}", "the optimizer Muon is not offered"),
                            ("gradient_clipping: high", "'gradient_clipping' = 'high': a number is wanted"),
                            ("zero_optimization: {overlap_comm: 1}", "overlap_comm' = 1: true or false is wanted"),
                            ("fp16: null", "'fp16' = None: a mapping is wanted")):
        with pytest.raises(ConfigError) as caught:
            deepspeed_json(config_of(corpus, f"deepspeed.overrides={{{overrides}}}"), world_size=1, precision="fp32",
                           on_cpu=True)
        assert says in str(caught.value)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("key", "says"), [
    ("gradient_cliping", "did you mean 'gradient_clipping'? mend or remove it"),
    ("zero_optimisation", "did you mean 'zero_optimization'?"),
    ("moon_phase", "(deepspeed.overrides); mend or remove it")])
def test_a_key_that_deepspeed_would_pass_over_is_refused(corpus, key, says):
    with pytest.raises(ConfigError) as caught:
        deepspeed_json(config_of(corpus, f"deepspeed.overrides={{{key}: 1}}"), world_size=1, precision="fp32",
                       on_cpu=True)
    assert f"has no key '{key}' and would pass over it" in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_no_key_of_deepspeeds_documentation_is_refused(corpus):
    """Those of its page on the JSON, the removed ones too: DeepSpeed has a sentence for each."""
    documented = {
        "activation_checkpointing", "aio", "amp", "autotuning", "bf16", "bfloat16", "checkpoint", "comet",
        "comms_logger", "communication_data_type", "compile", "compression_training", "csv_monitor",
        "curriculum_learning", "data_efficiency", "data_types", "dump_state", "elasticity", "flops_profiler", "fp16",
        "gradient_accumulation_steps", "gradient_clipping", "gradient_predivide_factor", "hybrid_engine", "nebula",
        "optimizer", "pipeline", "prescale_gradients", "scheduler", "seq_parallel_communication_data_type",
        "sequence_parallel_size", "data_parallel_size", "sparse_attention", "sparse_gradients", "steps_per_print",
        "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size",
        "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "wandb", "weight_quantization",
        "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization"}
    written = deepspeed_json(config_of(corpus), world_size=1, precision="fp32", on_cpu=True)
    assert known_keys(torch.device("cpu")) >= documented | written.keys()


def test_what_is_offloaded_stands_in_the_json_and_is_updated_by_torchs_adam(corpus):
    config = config_of(corpus, "deepspeed.zero_stage=3", "deepspeed.offload_optimizer=true",
                       "deepspeed.offload_params=true")
    derived = deepspeed_json(config, world_size=2, precision="bf16", on_cpu=False)
    for key in ("offload_optimizer", "offload_param"):
        assert derived["zero_optimization"][key]["device"] == "cpu"
        assert derived["zero_optimization"][key]["pin_memory"]
    assert derived["optimizer"]["params"]["torch_adam"]
    assert not derived["zero_force_ds_cpu_optimizer"]
    without = deepspeed_json(config_of(corpus), world_size=2, precision="bf16", on_cpu=False)
    assert not any(key.startswith("offload") for key in without["zero_optimization"])


@pytest.mark.parametrize(("settings", "says"), [
    (("deepspeed.zero_stage=0", "deepspeed.offload_optimizer=true"), "offload_optimizer needs deepspeed.zero_stage 1"),
    (("deepspeed.zero_stage=2", "deepspeed.offload_params=true"), "offload_params needs deepspeed.zero_stage 3")])
def test_only_what_is_spread_can_be_offloaded(corpus, settings, says):
    with pytest.raises(ConfigError, match=says):
        config_of(corpus, *settings)
