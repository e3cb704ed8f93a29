"""The engine of a run: the model under DeepSpeed. It adds up gradients, updates, evaluates and embeds.

On a CPU nothing is compiled at run time: DeepSpeed's shared-memory collectives and its own fused Adam are left out
(48 s on a cold cache, a crash where there is no compiler).
"""
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pretrain.config import TrainConfig
from pretrain.data import BatchTensors
from pretrain.deepspeed_json import deepspeed_json
from pretrain.deepspeed_package import quiet_deepspeed
from pretrain.first_model import SEED_BITS, first_model, torch_seed
from pretrain.objectives import LossSums, Objective
from pretrain.precision import (
    can_scale_down,
    grow_scale_after_update,
    outlast_smallest_scale,
    resolve_precision,
    undo_first_update,
)
from pretrain.running_statistics import RunningStatistics
from pretrain.stopwatch import BACKWARD, FORWARD, OPTIMIZER, Stopwatch
from pretrain.world import World, limit_collectives
from scgpt.errors import ConfigError
from scgpt.rng import PURPOSE_DROPOUT
from scgpt.vocab import GeneVocab

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """The model in training: forward passes that add up gradients, an update after the last one of a step."""

    def __init__(self, config: TrainConfig, vocab: GeneVocab, world: World) -> None:
        quiet_deepspeed(world.device)
        import deepspeed

        self.precision = resolve_precision(config.train.precision, world.device)
        self.json = deepspeed_json(config, world_size=world.world_size, precision=self.precision,
                                   on_cpu=world.device.type == "cpu")
        deepspeed.comm.comm.cdb = deepspeed.utils.groups._WORLD_GROUP = None   # of an earlier run in this process
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        try:
            model = first_model(config, vocab, device=world.device, dtype=_DTYPES[self.precision],
                                deepspeed_json=self.json)
        except ValueError as error:
            raise ConfigError(f"the model cannot be made: {' '.join(str(error).split())}",
                              fix="change the setting that it names") from error
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
        self._norm, self.applied = float("nan"), True
        self.objective, self.seed, self.world = Objective.of(config), config.train.seed, world
        self.stopwatch = Stopwatch(world.device)
        self._copies = world.world_size * config.batch.accumulation(world.world_size)
        self._statistics = RunningStatistics(self.deepspeed.module, world, self._copies)
        self._dtype = _DTYPES[self.precision]
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
        torch.manual_seed(torch_seed(self.seed, step, micro_batch, PURPOSE_DROPOUT))
        with self.stopwatch.part(FORWARD), self._statistics.of_micro_batch(micro_batch):
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
        self._statistics.finish_step(applied=self.applied)

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
        torch.manual_seed(key & SEED_BITS)
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
