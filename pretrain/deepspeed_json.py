"""The JSON that DeepSpeed is given, derived from TrainConfig.

Every key whose default has moved between releases, or differs between optimizers, is written out, so that an upgrade
changes no number. Nothing in it is compiled at run time: torch's fused Adam stands in for DeepSpeed's own.
"""
import json
from collections.abc import Mapping, Set
from importlib.metadata import version
from typing import Any

import torch

from pretrain.config import DeepSpeedConfig, TrainConfig, refuse_muon
from pretrain.deepspeed_package import known_keys
from pretrain.precision import resolve_precision
from scgpt.config import did_you_mean
from scgpt.errors import ConfigError

_BUCKET_VALUES = 50_000_000   # values of a gradient or parameter message: 200 MB of float32
_CPU_BUCKET_VALUES = 8_000_000   # 32 MB, which the allocator keeps: 67 ms a demo step for 89 on two ranks
_NEVER = 10**9
# Keys of DeepSpeed's that a setting of ours decides, by which the engine or the schedule goes too -> that setting.
_OURS = {"train_batch_size": "batch.global_batch_size", "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
         "gradient_accumulation_steps": "the sizes under batch", "zero_optimization.stage": "deepspeed.zero_stage",
         "bf16.enabled": "train.precision", "fp16.enabled": "train.precision", "optimizer.params.lr": "optimizer.lr",
         "scheduler": "schedule.kind"}


def deepspeed_json(config: TrainConfig, *, world_size: int, precision: str, on_cpu: bool) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    Raises ConfigError where the batch sizes do not fit, and where an override would change what a setting decides or
    would be passed over.
    """
    optimizer = config.optimizer
    derived: dict[str, Any] = {
        "train_batch_size": config.batch.global_batch_size,
        "train_micro_batch_size_per_gpu": config.batch.micro_batch_size,
        "gradient_accumulation_steps": config.batch.accumulation(world_size),
        "managed_gradient_accumulation": True,
        "optimizer": {"type": "AdamW", "legacy_fusion": False, "params": {
            "lr": optimizer.lr, "betas": list(optimizer.betas), "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,   # torch's default is 0.01, FusedAdam's 0
            "torch_adam": True, "adam_w_mode": True,
            "fused": True}},   # one pass over weights and moments: 12 ms a demo step for 26
        "gradient_clipping": optimizer.grad_clip,
        "prescale_gradients": False, "gradient_predivide_factor": 1.0, "gradient_allreduce_op": "mean",
        "communication_data_type": "fp32",
        "bf16": {"enabled": precision == "bf16", "immediate_grad_update": False, "check_grad_overflow": True,
                 "bf16_master_weights_and_grads": False, "bf16_optimizer_states": False},
        "fp16": {"enabled": precision == "fp16", "auto_cast": False, "loss_scale": 0, "initial_scale_power": 16,
                 "loss_scale_window": 1000, "hysteresis": 2, "consecutive_hysteresis": False, "min_loss_scale": 1,
                 "fp16_master_weights_and_grads": False},
        "torch_autocast": {"enabled": False},
        "data_types": {"grad_accum_dtype": _accumulation_dtype(config.deepspeed.zero_stage, precision)},
        "zero_optimization": _zero_json(config.deepspeed, on_cpu=on_cpu),
        "zero_allow_untested_optimizer": False, "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"tag_validation": "Fail", "load_universal": False, "use_node_local_storage": False,
                       "parallel_write": {"pipeline_stage": False}},
        "compile": {"deepcompile": False},
        "steps_per_print": _NEVER, "wall_clock_breakdown": False, "memory_breakdown": False, "dump_state": False,
        "disable_allgather": False, "disable_python_gc": False, "dataloader_drop_last": False,
    }
    merged = _merged(derived, config.deepspeed.overrides)
    if merged.keys() > derived.keys():
        _refuse_unknown(merged.keys() - derived.keys(), torch.device("cpu" if on_cpu else "cuda"))
    refuse_muon(_at(merged, "optimizer.type"))
    for keys, instead in _OURS.items():
        if _at(merged, keys) != _at(derived, keys):
            raise ConfigError(f"deepspeed.overrides changes '{keys}'", fix=f"set {instead} instead")
    return merged


def _refuse_unknown(keys: Set[str], device: torch.device) -> None:
    known = known_keys(device)
    for key in sorted(keys - known):
        raise ConfigError(f"DeepSpeed {version('deepspeed')} has no key '{key}' and would pass over it",
                          where="deepspeed.overrides", fix=f"{did_you_mean(key, known)}mend or remove it")


def _at(tree: Any, keys: str) -> Any:
    """The value at dotted keys; None where there is none."""
    for key in keys.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _accumulation_dtype(stage: int, precision: str) -> str:
    """What gradients are added up in: float32, but in ZeRO 0 DeepSpeed knows only the type of the weights."""
    return precision if stage == 0 else "fp32"


def _zero_json(settings: DeepSpeedConfig, *, on_cpu: bool) -> dict[str, Any]:
    stage, bucket_values = settings.zero_stage, _CPU_BUCKET_VALUES if on_cpu else _BUCKET_VALUES
    every: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "reduce_bucket_size": bucket_values,
                             "allgather_bucket_size": bucket_values, "overlap_comm": False,
                             "ignore_unused_parameters": True, "load_from_fp32_weights": True,
                             "elastic_checkpoint": False}
    if stage in (1, 2):
        every |= {"reduce_scatter": True, "use_multi_rank_bucket_allreduce": True, "allgather_partitions": True,
                  "round_robin_gradients": False, "parameter_alignment": False, "compute_grad_norm": True,
                  "legacy_stage1": False}
    if stage == 3:
        every |= {"sub_group_size": _NEVER, "stage3_prefetch_bucket_size": bucket_values,
                  "stage3_param_persistence_threshold": 100_000, "stage3_max_live_parameters": _NEVER,
                  "stage3_max_reuse_distance": _NEVER, "stage3_gather_16bit_weights_on_model_save": False,
                  "zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zero_quantized_gradients": False,
                  "memory_efficient_linear": False}
    # Updated by torch's fused AdamW there too: DeepSpeed's own for CPUs wants a compiler on every node.
    if settings.offload_optimizer:
        every["offload_optimizer"] = {"device": "cpu", "pin_memory": not on_cpu, "ratio": 1.0, "super_offload": False}
    if settings.offload_params:
        every["offload_param"] = {"device": "cpu", "pin_memory": not on_cpu}
    return every


def _merged(below: Mapping[str, Any], above: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`above` over `below`; ConfigError for another kind of value, which DeepSpeed may find out amid a step."""
    merged = dict(below)
    for key, value in above.items():
        place, wanted = f"{path}{key}", _kind(below.get(key))
        if wanted and _kind(value) != wanted:
            raise ConfigError(f"wrong value of deepspeed.overrides '{place}' = {value!r}: {wanted} is wanted",
                              where="deepspeed.overrides", fix="mend the value")
        merged[key] = _merged(merged[key], value, f"{place}.") if wanted == "a mapping" else value
    return merged


def _kind(value: object) -> str | None:
    """What a value is, in words; None for what DeepSpeed takes other kinds in the place of."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, bool):
        return "true or false"
    return "a number" if isinstance(value, int | float) else None


def describe_json(config: TrainConfig, world_size: int) -> str:
    """The DeepSpeed JSON as `--print-deepspeed-config` shows it, for `world_size` ranks on this machine's devices."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(config.train.precision, device)
    return json.dumps(deepspeed_json(config, world_size=world_size, precision=precision, on_cpu=device.type == "cpu"),
                      indent=1)
