"""TrainConfig: everything that decides the numbers of a run, as one frozen tree read from YAML."""
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from pretrain.order import Blocks
from scgpt.collate import CollateConfig
from scgpt.config import Config, ConfigPlace, Seed
from scgpt.errors import ConfigError
from scgpt.model.config import ModelConfig
from scgpt.vocab import SPECIAL_TOKENS, GeneVocab

Share = Annotated[float, Field(gt=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Seconds = Annotated[float, Field(gt=0.0, le=1e8)]  # of a wait: up to three years
Size = Annotated[int, Field(gt=0, lt=1 << 31)]     # of what is held in memory or counted by 32-bit integers
NonNegativeSize = Annotated[int, Field(ge=0, lt=1 << 31)]
Count = Annotated[int, Field(gt=0, lt=1 << 63)]    # of steps and tokens


class MixtureConfig(Config):
    """One corpus of a mixture."""

    path: ConfigPlace                      # folder or URL of a corpus
    weight: Positive = 1.0                 # its share of the cells of a step, relative to the other weights


class DataConfig(Config):
    """What is read."""

    corpus: ConfigPlace | Annotated[list[MixtureConfig], Field(min_length=1)]   # one, or a mixture of several
    order: Literal["shuffled", "blocks"] = "shuffled"   # blocks: neighbours together, for cold or remote storage
    block_cells: Size = 1024        # cells of a block
    window_blocks: Size = 64        # blocks that are mixed with each other
    full_genes: Size | None = None  # cells with fewer expressed genes are drawn in proportion; null: all alike
    one_domain_batches: bool = False       # a micro-batch holds cells of one value of batch_column
    valid_split: str | None = "valid"      # held-out split; null: no validation
    class_column: str | None = None        # metadata column of the corpus that `cls` predicts
    batch_column: str | None = None        # metadata column with the batch or domain of a cell
    workers: NonNegativeInt = 2            # threads a rank that prepare steps ahead; 0: none

    @property
    def blocks(self) -> Blocks | None:
        """How neighbours are read together; None: every cell on its own."""
        return Blocks(self.block_cells, self.window_blocks) if self.order == "blocks" else None


class LossWeights(Config):
    """Weights of the loss terms beside that of expression, which is 1; 0: off. Upstream's are in brackets."""

    mvc: Positive = 1.0          # with objective.mvc [1]
    prompted: Positive = 1.0     # generation prompted by the cell's embedding, in task `both` [1]
    zero_prob: Positive = 1.0    # whether there is a value at all, with model.explicit_zero_prob [1]
    dab: Positive = 1.0          # domain from the cell, its gradient reversed, with model.dab [1]
    cls: NonNegative = 0.0       # class of the cell, data.class_column [1]
    ecs: NonNegative = 0.0       # elastic cell similarity, within a micro-batch [10]
    cce: NonNegative = 0.0       # contrast of two passes over the cells of all ranks [10]


class ObjectiveConfig(Config):
    """What is learned, and what the model sees."""

    task: Literal["pcpt", "gen", "both"] = "pcpt"   # masked; generative; generative and then prompted by the cell too
    mask_ratio: Share | Annotated[list[Share], Field(min_length=1)] = 0.4   # of several, each cell draws one
    mvc: bool = True                       # also predict hidden genes from the cell embedding
    cell_prompt_after: NonNegativeInt = 1000   # task `both`: steps before generation is prompted by the cell too
    weights: LossWeights = LossWeights()
    n_bins: Annotated[int, Field(ge=3, le=1 << 15)] = 51   # bins, that of zero included
    context_length: Annotated[int, Field(ge=2, lt=1 << 31)] = 1200   # tokens a cell at most, `<cls>` included
    input_style: Literal["binned", "log1p", "raw"] = "binned"
    tie_rule: Literal["spread", "highest"] = "spread"   # a value on several edges: any of their bins, or the highest
    unexpressed_genes: NonNegativeSize = 0   # genes of value 0 that join a cell before it is sampled to the context

    def collate_config(self) -> CollateConfig:
        """How cells become batches."""
        ratios = tuple(self.mask_ratio) if isinstance(self.mask_ratio, list) else (self.mask_ratio,)
        return CollateConfig(context_length=self.context_length, n_bins=self.n_bins, mask_ratio=ratios, task=self.task,
                             input_style=self.input_style, tie_rule=self.tie_rule,
                             unexpressed_genes=self.unexpressed_genes)


class BatchConfig(Config):
    """Cells of one optimizer step: global = micro x accumulation x world_size, checked at start."""

    global_batch_size: Size = 512   # cells an optimizer step, over all ranks
    micro_batch_size: Size = 32     # cells a rank a forward pass

    def accumulation(self, world_size: int) -> int:
        """Forward passes of a rank in a step; ConfigError where the sizes do not fit, with ones that do."""
        share = self.micro_batch_size * world_size
        if self.global_batch_size % share:
            raise ConfigError(f"batch.global_batch_size {self.global_batch_size} is no multiple of "
                              f"batch.micro_batch_size {self.micro_batch_size} x {world_size} ranks",
                              fix=self._what_fits(world_size))
        return self.global_batch_size // share

    def _what_fits(self, world_size: int) -> str:
        """A run that goes on keeps its global batch: first what may change then."""
        share = self.micro_batch_size * world_size
        larger = f"make it {max(1, round(self.global_batch_size / share)) * share}"
        per_rank, rest = divmod(self.global_batch_size, world_size)
        if rest == 0:
            micro = max(size for size in range(1, min(self.micro_batch_size, per_rank) + 1) if per_rank % size == 0)
            return f"set batch.micro_batch_size={micro}, or {larger}"
        ranks = [n for n in range(1, world_size) if self.global_batch_size % (n * self.micro_batch_size) == 0]
        return f"start {ranks[-1]} rank(s), or {larger}" if ranks else larger


def refuse_muon(name: object) -> None:
    """Raise ConfigError where an optimizer is Muon."""
    if str(name).lower() == "muon":
        raise ConfigError("the optimizer Muon is not offered: DeepSpeed clips its update in ZeRO 1 to 3 only",
                          fix="set optimizer.name=adamw; docs/engine.md says how far apart the weights are")


class OptimizerConfig(Config):
    """AdamW (Loshchilov, Hutter: Decoupled weight decay regularization, 2019); Adam where weight_decay is 0."""

    name: Literal["adamw"] = "adamw"
    lr: Positive = 1e-4                    # highest learning rate
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0        # a step's decay is lr x weight_decay
    grad_clip: NonNegative = 1.0           # largest norm of the whole gradient; 0: not clipped

    @field_validator("name", mode="before")
    @classmethod
    def _is_no_muon(cls, value: object) -> object:
        refuse_muon(value)
        return value


class ScheduleConfig(Config):
    """Learning rate over the steps of a run."""

    kind: Literal["cosine", "constant", "step"] = "cosine"
    warmup_steps: NonNegativeInt = 10000   # steps until lr is reached
    interval: PositiveInt = 100            # kind `step`: steps between two reductions of the rate
    factor: Annotated[float, Field(gt=0.0, le=1.0)] = 0.99   # kind `step`: what a reduction multiplies it with


class RunConfig(Config):
    """How long a run is, and how often it reports; the first limit reached ends it."""

    max_steps: Count | None = None   # optimizer steps
    max_epochs: Positive | None = None     # passes over the train split
    max_tokens: Count | None = None  # tokens trained on, `<cls>` and context_length counted
    max_time_s: Positive | None = None     # seconds of this start: then checkpoint, exit code 75
    seed: Seed = 0               # of weights, order, sampling, masks and dropout
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"   # auto: bf16 on a GPU that has it, else fp32
    recompute: bool = False                # keep each layer's input only, compute it again backward: memory for time
    compile: bool = False                  # torch.compile of each layer: a minute at the start for faster steps
    deterministic: bool = False            # the same bits each time on a GPU too, with slower kernels; a CPU's are
    log_every: PositiveInt = 10            # steps
    eval_every: PositiveInt = 1000         # steps
    save_every: PositiveInt = 1000         # steps
    keep_last: PositiveInt = 3             # newest checkpoints kept, besides the best
    max_skipped_steps: NonNegativeInt = 3  # in a row, for a loss or gradient that is not finite; one more rolls back
    max_rollbacks: NonNegativeInt = 5      # of the whole run; where one more is needed, the run fails
    probe_every: NonNegativeInt = 0        # steps between two embedding probes, which need data.class_column; 0: none
    probe_cells: Annotated[int, Field(ge=16)] = 2000   # held-out cells of a probe at most
    patience: PositiveInt | None = None    # validations without improvement after which the run ends; null: never
    min_improvement: NonNegative = 0.0     # by which loss_expression must fall below its lowest to count for patience
    peak_tflops: Positive | None = None    # dense TFLOP/s of a device, for MFU; null: by data sheet, see estimate.py

    @model_validator(mode="after")
    def _ends(self) -> "RunConfig":
        if self.max_steps is None and self.max_epochs is None and self.max_tokens is None:
            raise ConfigError("nothing ends this run", fix="set train.max_steps, train.max_epochs or train.max_tokens")
        return self


class DeepSpeedConfig(Config):
    """What DeepSpeed is told beyond what follows from the rest."""

    zero_stage: Literal[0, 1, 2, 3] = 2    # what is spread over ranks: nothing, optimizer, + gradients, + parameters
    offload_optimizer: bool = False        # master weights, moments and update on the CPU; stages 1 to 3
    offload_params: bool = False           # parameters wait on the CPU until they are used; stage 3
    timeout_s: Seconds = 600.0             # a collective that takes longer ends the job: a rank is hung or gone
    overrides: dict[str, Any] = Field(default_factory=dict)   # keys of DeepSpeed's own JSON, merged last

    @model_validator(mode="after")
    def _offloads_what_is_spread(self) -> "DeepSpeedConfig":
        for what, least in (("offload_optimizer", 1), ("offload_params", 3)):
            if getattr(self, what) and self.zero_stage < least:
                raise ConfigError(f"deepspeed.{what} needs deepspeed.zero_stage {least} or more",
                                  fix=f"set deepspeed.zero_stage={least}, or deepspeed.{what}=false")
        return self


class TrackingConfig(Config):
    """Weights & Biases, beside the JSON lines that are always written."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "scgpt-pretrain"


class TrainConfig(Config):
    """A run: `scgpt train CONFIG data.corpus=DIR --out RUN`."""

    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: RunConfig
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _model_fits_objective(self) -> "TrainConfig":
        for wrong, what, fix in self._misfits():
            if wrong:
                raise ConfigError(what, fix=fix)
        return self

    def _misfits(self) -> Iterator[tuple[bool, str, str]]:
        """(whether it is so, what does not go together, what to do)."""
        model, objective, weights = self.model, self.objective, self.objective.weights
        generative, generator = objective.task != "pcpt", model.kind == "generator"
        category = model.input_emb_style == "category" and not generator
        labels = model.dab or model.use_batch_labels or bool(model.domain_spec_batchnorm)
        yield (generative and not model.generative, f"objective.task '{objective.task}' needs a generative model",
               "set model.generative=true, or objective.task=pcpt")
        yield (generative and model.input_emb_style == "scaling", "generation tokens have no value to scale",
               "set model.input_emb_style=continuous, or objective.task=pcpt")
        yield (generative and model.cell_emb_style == "w-pool", "generation tokens have no value to weigh by",
               "set model.cell_emb_style=cls, or objective.task=pcpt")
        yield (self.data.valid_split == "train", "data.valid_split is what the run trains on",
               "name another split of the corpus, or set data.valid_split=null")
        probed = self.train.probe_every > 0
        yield (probed and (self.data.class_column is None or self.data.valid_split is None),
               "train.probe_every needs held-out cells of known class", "set data.class_column and data.valid_split")
        yield (probed and generator, "a generator has no cell embedding to probe", "set train.probe_every=0")
        yield (self.train.patience is not None and self.data.valid_split is None, "train.patience needs validations",
               "set data.valid_split, or train.patience=null")
        yield (objective.mvc and not model.mvc, "objective.mvc needs the model's MVC decoder",
               "set model.mvc=true, or objective.mvc=false")
        yield (weights.cls > 0 and (model.n_cls < 2 or self.data.class_column is None),
               "objective.weights.cls needs classes", "set model.n_cls and data.class_column")
        yield (weights.cce > 0 and generator, "a generator has no cell embedding to contrast",
               "set objective.weights.cce=0")
        yield (self.train.recompute and model.layers == "linear", "linear attention cannot be computed again backward",
               "set train.recompute=false")
        yield (self.train.compile and model.layers == "linear", "linear attention has no layers of ours to compile",
               "set train.compile=false")
        yield (generator and labels, "a generator knows no batches", "set model.kind=transformer")
        yield (labels and self.data.batch_column is None, "the model needs the batch or domain of each cell",
               "set data.batch_column to a metadata column of the corpus")
        yield (self.data.one_domain_batches and self.data.batch_column is None,
               "data.one_domain_batches needs the domain of each cell",
               "set data.batch_column to a metadata column of the corpus")
        yield (category and (objective.input_style != "binned" or model.n_input_bins != objective.n_bins + 2),
               "category input needs binned values and two categories more than bins",
               f"set objective.input_style=binned and model.n_input_bins={objective.n_bins + 2}")

    def collate_config(self, vocab: GeneVocab | None = None) -> CollateConfig:
        """How cells become batches of this model: categories have special values of their own.

        `vocab`: what unexpressed genes are drawn from; can be left out where no batch is made.
        """
        collating = self.objective.collate_config()
        if vocab is not None and self.objective.unexpressed_genes:
            genes = np.array([index for token, index in vocab.items() if token not in SPECIAL_TOKENS], np.int32)
            collating = replace(collating, gene_ids=genes)
        if self.model.input_emb_style != "category" or self.model.kind == "generator":
            return collating
        return replace(collating, pad_value=self.model.pad_value, mask_value=self.model.pad_value + 1)
