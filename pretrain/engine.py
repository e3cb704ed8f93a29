"""The engine of a run: the model under DeepSpeed, and the JSON that DeepSpeed is given, derived from TrainConfig.

Every key of that JSON whose default has moved between releases, or differs between optimizers, is written out, so
that an upgrade changes no number. On a CPU nothing is compiled at run time: DeepSpeed's shared-memory collectives and
its own fused Adam are left out (48 s on a cold cache, a crash where there is no compiler); torch's fused Adam is used.
"""
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.config import DeepSpeedConfig, RunConfig, TrainConfig
from pretrain.data import BatchTensors
from pretrain.objectives import LossSums, Objective
from pretrain.precision import (
    can_scale_down,
    grow_scale_after_update,
    outlast_smallest_scale,
    resolve_precision,
    undo_first_update,
)
from pretrain.stopwatch import BACKWARD, FORWARD, OPTIMIZER, Stopwatch
from pretrain.world import World, limit_collectives
from scgpt.errors import ConfigError
from scgpt.rng import GOLDEN, PURPOSE_DROPOUT, PURPOSE_WEIGHTS, stream
from scgpt.vocab import GeneVocab

_BUCKET_VALUES = 50_000_000   # values of a gradient or parameter message: 200 MB of float32
_CPU_BUCKET_VALUES = 8_000_000   # 32 MB, which the allocator keeps: 67 ms a demo step for 89 on two ranks
_NEVER = 10**9
_SEED_BITS = (1 << 63) - 1


def deepspeed_json(config: TrainConfig, *, world_size: int, precision: str, on_cpu: bool) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    Raises ConfigError where the batch sizes do not fit, and where an override would change the batch behind our back.
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
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if merged[key] != derived[key]:
            raise ConfigError(f"deepspeed.overrides changes '{key}'", fix="set the sizes under batch instead")
    return merged


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


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def quiet_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed without its banner, and on a CPU without anything that is compiled at run time."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # Of the names by which DeepSpeed calls torch.
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine:
    """The model in training: forward passes that add up gradients, an update after the last one of a step."""

    def __init__(self, config: TrainConfig, vocab: GeneVocab, world: World) -> None:
        quiet_deepspeed(world.device)
        import deepspeed

        from scgpt.model.build import build_model

        self.precision = resolve_precision(config.train.precision, world.device)
        self.json = deepspeed_json(config, world_size=world.world_size, precision=self.precision,
                                   on_cpu=world.device.type == "cpu")
        deepspeed.comm.comm.cdb = deepspeed.utils.groups._WORLD_GROUP = None   # of an earlier run in this process
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        torch.manual_seed(_seed(config.train.seed, 0, 0, PURPOSE_WEIGHTS))   # every rank draws the same weights
        model: torch.nn.Module = build_model(config.model, vocab)
        _switch(model, config.train)
        try:
            self.deepspeed, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(),
                                                      config=self.json, dist_init_required=False)
        except (ValueError, AssertionError, deepspeed.runtime.config.DeepSpeedConfigError) as error:
            raise ConfigError(f"DeepSpeed refuses the configuration: {' '.join(str(error).split())}",
                              where="deepspeed.overrides or train.precision",
                              fix="change the setting that it names") from error
        limit_collectives(config.deepspeed.timeout_s)
        self._is_plain = config.deepspeed.zero_stage == 0 and self.precision == "fp32"   # torch's own optimizer
        if self._is_plain:
            self.deepspeed.optimizer.register_step_pre_hook(self._drop_gradients)
        elif config.deepspeed.zero_stage == 0:
            undo_first_update(self.deepspeed.optimizer)
        if self.precision == "fp16":
            grow_scale_after_update(self.deepspeed.optimizer)
            outlast_smallest_scale(self.deepspeed.optimizer)
        self._scales_loss = self.precision == "fp16" and config.deepspeed.zero_stage == 0
        self._buffers = list(self.deepspeed.module.buffers())
        self._buffers_before: list[Tensor] = []   # of this step: a skipped one leaves no trace in them either
        self._norm, self.applied = float("nan"), True
        self.objective, self.seed, self.world = Objective.of(config), config.train.seed, world
        self.stopwatch = Stopwatch(world.device)
        self._copies = world.world_size * config.batch.accumulation(world.world_size)
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        if config.model.input_emb_style == "category":
            self._dtype = torch.float32   # categories above 256 have no bf16

    def train(self, batch: BatchTensors, *, step: int, micro_batch: int, counts: Sequence[int], lr: float) -> Tensor:
        """One forward and backward pass; the update too, where it is the rank's last of the step.

        Args:
            batch: this micro-batch.
            step: optimizer steps before this one.
            micro_batch: its number within the global batch; with the seed and the step, the key of its dropout.
            counts: of the global batch, over all ranks, in the order of `Objective.units`.
            lr: learning rate of the update.

        Returns the micro-batch's sums (loss terms, then relative errors), (names,) float64, without gradient. After the
        last one of a step, `applied` says whether there was an update.
        """
        torch.manual_seed(_seed(self.seed, step, micro_batch, PURPOSE_DROPOUT))
        self._buffers_before = self._buffers_before or [buffer.clone() for buffer in self._buffers]
        with self.stopwatch.part(FORWARD):
            sums = self._sums(batch, step)
            loss = sums.scaled(counts=counts, copies=self._copies)
        if self._scales_loss:   # DeepSpeed divides by the scale, but multiplies with it from ZeRO 1 on only
            loss = loss * self.deepspeed.optimizer.loss_scale
        with self.stopwatch.part(BACKWARD):
            self.deepspeed.backward(loss)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        with self.stopwatch.part(OPTIMIZER):
            self._update()
        return sums.detached()

    @torch.no_grad()
    def _update(self) -> None:
        """DeepSpeed's step. No rank updates where the whole gradient is not finite, and `applied` is False then.

        Its half-precision and ZeRO optimizers look at the norm, over all ranks, before they update; torch's does not.
        """
        is_last = self.deepspeed.is_gradient_accumulation_boundary()
        if is_last and self._is_plain:
            gradients = [parameter.grad for parameter in self.deepspeed.module.parameters()
                         if parameter.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(gradients))
        self.deepspeed.step()
        if not is_last:
            return
        self.applied = self.deepspeed.was_step_applied() and (math.isfinite(self._norm) or not self._is_plain)
        if not self.applied:
            for buffer, before in zip(self._buffers, self._buffers_before, strict=True):
                buffer.copy_(before)
        self._buffers_before = []

    def _drop_gradients(self, *_: Any) -> None:
        """Before torch's own optimizer updates: without gradients it changes nothing."""
        if not math.isfinite(self._norm):
            self.deepspeed.zero_grad()

    @property
    def searches_scale(self) -> bool:
        """Whether fp16's loss scaler can still go lower: then a gradient that is not finite is its way to search."""
        return self.precision == "fp16" and can_scale_down(self.deepspeed.optimizer, self.json["fp16"])

    @torch.no_grad()
    def evaluate(self, batch: BatchTensors, *, key: int) -> Tensor:
        """The sums of one micro-batch in evaluation mode: no dropout, no gradient. (names,) float64.

        `key` seeds the one draw that is left: a generator with zero probabilities samples what it predicts.
        """
        torch.manual_seed(key & _SEED_BITS)
        self.deepspeed.eval()
        try:
            return self._sums(batch, None).detached()
        finally:
            self.deepspeed.train()

    @torch.no_grad()
    def embed(self, batch: BatchTensors) -> Tensor:
        """Cell embeddings of one micro-batch in evaluation mode, (cells, d_model) float64; nothing is decoded."""
        self.deepspeed.eval()
        try:
            output = self.objective.embed(self.deepspeed, self._cast(batch))
        finally:
            self.deepspeed.train()
        return output.double()

    @torch.no_grad()
    def average_statistics(self) -> None:
        """Give every rank the mean of the ranks' batch-norm statistics. All ranks call it; free without batch norm."""
        for buffer in self.deepspeed.module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.world.sum(buffer.float()) / self.world.world_size)

    def _sums(self, batch: BatchTensors, step: int | None) -> LossSums:
        return self.objective.sums(self.deepspeed, self._cast(batch), step=step)

    def _cast(self, batch: BatchTensors) -> BatchTensors:
        return replace(batch, inputs=replace(batch.inputs, values=batch.inputs.values.to(self._dtype)))

    @property
    def zero_stage(self) -> int:
        """What is spread over the ranks, as DeepSpeed was told."""
        return int(self.json["zero_optimization"]["stage"])

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's whole gradient, before clipping."""
        if self._is_plain:
            return self._norm
        norm = self.deepspeed.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)


def _switch(model: torch.nn.Module, settings: RunConfig) -> None:
    """Recompute, compile, determinism: how the model computes, not what.

    Raises ConfigError where there is no compiler to compile with.
    """
    from scgpt.model.layers import FlashSelfAttention, TorchSelfAttention

    encoder = model.get_submodule("transformer_encoder")
    if settings.recompute:
        encoder.recompute = True  # type: ignore[assignment]
    if settings.compile:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise ConfigError(f"train.compile needs a C++ compiler, and there is no '{compiler}'",
                              fix="install g++, or set train.compile=false")
        for layer in encoder.layers:  # type: ignore[union-attr]
            layer.compile(dynamic=True)   # no other graph for another number of tokens
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # what cuBLAS asks for
        for module in encoder.modules():
            if isinstance(module, (FlashSelfAttention, TorchSelfAttention)):
                module.deterministic = True
    torch.use_deterministic_algorithms(settings.deterministic)


def _seed(seed: int, step: int, number: int, purpose: np.uint64) -> int:
    """A seed of torch's generator from a stream of ours."""
    return int(stream(seed, step, number, purpose) ^ GOLDEN) & _SEED_BITS


def describe_json(config: TrainConfig, world_size: int) -> str:
    """The DeepSpeed JSON as `--print-deepspeed-config` shows it, for `world_size` ranks on this machine's devices."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(config.train.precision, device)
    return json.dumps(deepspeed_json(config, world_size=world_size, precision=precision, on_cpu=device.type == "cpu"),
                      indent=1)
