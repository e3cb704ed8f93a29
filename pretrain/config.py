"""TrainConfig: everything that decides the numbers of a run, as one frozen tree read from YAML."""
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pretrain.order import Blocks
from scgpt.collate import CollateConfig
from scgpt.config import Config, ConfigPlace, Seed
from scgpt.errors import ConfigError
from scgpt.model.config import ModelConfig

Share = Annotated[float, Field(gt=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]

# A run may be continued with other values of these (and with its corpus moved): they decide how long and where it runs,
# what is kept and shown, how a global batch is cut up; not which cells a step trains on.
MAY_DIFFER = ("train.max_steps", "train.max_epochs", "train.max_tokens", "train.max_time_s", "train.log_every",
              "train.eval_every", "train.save_every", "train.keep_last", "data.corpus", "data.workers",
              "batch.micro_batch_size", "deepspeed.", "tracking.")


class MixtureConfig(Config):
    """One corpus of a mixture."""

    path: ConfigPlace                      # folder or URL of a corpus
    weight: Positive = 1.0                 # its share of the cells of a step, relative to the other weights


class DataConfig(Config):
    """What is read."""

    corpus: ConfigPlace | Annotated[list[MixtureConfig], Field(min_length=1)]   # one, or a mixture of several
    order: Literal["shuffled", "blocks"] = "shuffled"   # blocks: neighbours together, for cold or remote storage
    block_cells: PositiveInt = 1024        # cells of a block
    window_blocks: PositiveInt = 64        # blocks that are mixed with each other
    valid_split: str | None = "valid"      # held-out split; null: no validation
    workers: NonNegativeInt = 2            # threads a rank that prepare steps ahead; 0: none

    @property
    def blocks(self) -> Blocks | None:
        """How neighbours are read together; None: every cell on its own."""
        return Blocks(self.block_cells, self.window_blocks) if self.order == "blocks" else None


class ObjectiveConfig(Config):
    """What is learned, and what the model sees."""

    task: Literal["pcpt"] = "pcpt"         # masked expression
    mask_ratio: Share | Annotated[list[Share], Field(min_length=1)] = 0.4   # of several, each cell draws one
    mvc: bool = True                       # also predict masked genes from the cell embedding
    n_bins: Annotated[int, Field(ge=3)] = 51   # bins, that of zero included
    context_length: Annotated[int, Field(ge=2)] = 1200   # tokens a cell at most, `<cls>` included
    input_style: Literal["binned", "log1p", "raw"] = "binned"
    tie_rule: Literal["spread", "highest"] = "spread"   # a value on several edges: any of their bins, or the highest

    def collate_config(self) -> CollateConfig:
        """How cells become batches."""
        ratios = tuple(self.mask_ratio) if isinstance(self.mask_ratio, list) else (self.mask_ratio,)
        return CollateConfig(context_length=self.context_length, n_bins=self.n_bins, mask_ratio=ratios, task=self.task,
                             input_style=self.input_style, tie_rule=self.tie_rule)


class BatchConfig(Config):
    """Cells of one optimizer step: global = micro x accumulation x world_size, checked at start."""

    global_batch_size: PositiveInt = 512   # cells an optimizer step, over all ranks
    micro_batch_size: PositiveInt = 32     # cells a rank a forward pass

    def accumulation(self, world_size: int) -> int:
        """Forward passes of a rank in a step; ConfigError where the sizes do not fit."""
        share = self.micro_batch_size * world_size
        if self.global_batch_size % share:
            fitting = max(1, round(self.global_batch_size / share)) * share
            raise ConfigError(f"batch.global_batch_size {self.global_batch_size} is no multiple of "
                              f"batch.micro_batch_size {self.micro_batch_size} x {world_size} ranks",
                              fix=f"make it {fitting}, or change the others")
        return self.global_batch_size // share


class OptimizerConfig(Config):
    """AdamW (Loshchilov, Hutter: Decoupled weight decay regularization, 2019); Adam where weight_decay is 0."""

    name: Literal["adamw"] = "adamw"
    lr: Positive = 1e-4                    # highest learning rate
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0        # a step's decay is lr x weight_decay
    grad_clip: NonNegative = 1.0           # largest norm of the whole gradient; 0: not clipped


class ScheduleConfig(Config):
    """Learning rate over the steps of a run."""

    kind: Literal["cosine", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 10000   # steps until lr is reached


class RunConfig(Config):
    """How long a run is, and how often it reports; the first limit reached ends it."""

    max_steps: PositiveInt | None = None   # optimizer steps
    max_epochs: Positive | None = None     # passes over the train split
    max_tokens: PositiveInt | None = None  # tokens trained on, `<cls>` and context_length counted
    max_time_s: Positive | None = None     # seconds of this start: then checkpoint, exit code 75
    seed: Seed = 0               # of weights, order, sampling, masks and dropout
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"   # auto: bf16 on a GPU that has it, else fp32
    log_every: PositiveInt = 10            # steps
    eval_every: PositiveInt = 1000         # steps
    save_every: PositiveInt = 1000         # steps
    keep_last: PositiveInt = 3             # newest checkpoints kept, besides the best

    @model_validator(mode="after")
    def _ends(self) -> "RunConfig":
        if self.max_steps is None and self.max_epochs is None and self.max_tokens is None:
            raise ConfigError("nothing ends this run", fix="set train.max_steps, train.max_epochs or train.max_tokens")
        return self


class DeepSpeedConfig(Config):
    """What DeepSpeed is told beyond what follows from the rest."""

    zero_stage: Literal[0, 1, 2, 3] = 2    # what is spread over ranks: nothing, optimizer, + gradients, + parameters
    timeout_s: Positive = 600.0            # a collective that takes longer ends the job: a rank is hung or gone
    overrides: dict[str, Any] = Field(default_factory=dict)   # keys of DeepSpeed's own JSON, merged last


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


def differences(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """What forbids continuing a run with `config`: `key: saved -> now` of every key outside MAY_DIFFER.

    `saved` is the JSON form of the configuration that the run was started with.
    """
    before, now = dict(_flat(saved)), dict(_flat(config.model_dump(mode="json")))
    keys = [key for key in sorted({*before, *now}) if not key.startswith(MAY_DIFFER)]
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
