"""ModelConfig: the shape of a model, its upstream `args.json`, and its exact number of parameters. No torch here."""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from scgpt.config import Config, ConfigPath
from scgpt.errors import CheckpointError, ConfigError

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]

# Our key -> the key of args.json. Upstream's own keys first; the rest keeps a release complete (upstream ignores it).
_ARGS = {"n_layers": "nlayers", "n_heads": "nheads", "d_model": "embsize", "d_hid": "d_hid", "dropout": "dropout",
         "n_layers_cls": "n_layers_cls", "input_emb_style": "input_emb_style", "mvc": "MVC",
         "generative": "USE_GENERATIVE_TRAINING",
         "kind": "kind", "n_cls": "n_cls", "layers": "layers", "attention_dropout": "attention_dropout",
         "pre_norm": "pre_norm", "n_input_bins": "n_input_bins", "cell_emb_style": "cell_emb_style",
         "mvc_decoder_style": "mvc_decoder_style", "dab": "do_dab", "use_batch_labels": "use_batch_labels",
         "n_batch_labels": "num_batch_labels", "domain_spec_batchnorm": "domain_spec_batchnorm",
         "ecs_threshold": "ecs_threshold", "explicit_zero_prob": "explicit_zero_prob",
         "decoder_activation": "decoder_activation", "decoder_adaptive_bias": "decoder_adaptive_bias"}


class ModelConfig(Config):
    """Everything that decides a model's parameters and its forward, but the vocabulary."""

    name: str = "scgpt"                                # of the model in reports and releases
    kind: Literal["transformer", "generator"] = "transformer"  # TransformerModel or TransformerGenerator
    n_layers: PositiveInt = 12
    d_model: PositiveInt = 512                         # width of a token
    n_heads: PositiveInt = 8                           # must divide d_model
    d_hid: PositiveInt = 512                           # width of a layer's feed-forward
    dropout: Probability = 0.2                         # residual branches, feed-forward and value encoder
    attention_dropout: Probability | None = None       # of attention probabilities; null: as dropout, as upstream
    n_layers_cls: PositiveInt = 3                      # layers of the class decoder
    n_cls: PositiveInt = 1                             # classes of the class decoder
    input_emb_style: Literal["continuous", "category", "scaling"] = "continuous"
    n_input_bins: PositiveInt | None = None            # category: bins + 2; generator: bins of what is encoded, or null
    cell_emb_style: Literal["cls", "avg-pool", "w-pool"] = "cls"
    mvc: bool = True                                   # build the MVC decoder: expression predicted from the cell
    mvc_decoder_style: Literal["inner product", "inner product, detach", "concat query", "sum query"] = "inner product"
    dab: bool = False                                  # build the adversarial domain discriminator
    use_batch_labels: bool = False                     # decoders also see a batch embedding
    n_batch_labels: PositiveInt | None = None          # number of batches or domains, where any of the two is used
    domain_spec_batchnorm: bool | Literal["dsbn", "batchnorm", "do_affine"] = False
    ecs_threshold: float = 0.3                         # of the ECS loss, a cosine
    explicit_zero_prob: bool = False                   # decoders also predict the probability of a non-zero value
    pre_norm: bool = False                             # upstream's "pre" scheme, flash layers only
    generative: bool = False                           # perception and generation tokens: upstream's pretraining model
    layers: Literal["flash", "torch", "linear"] = "flash"  # names of the layers' weights; linear: linear attention
    attention_backend: str = "auto"                    # one of scgpt.model.attention.BACKENDS
    decoder_activation: str | None = None              # generator: class of torch.nn for coefficient and bias, or null
    decoder_adaptive_bias: bool = False                # generator: bias times the mean of the non-zero values
    init_from: ConfigPath | None = None                # run or release whose weights a new run begins with; null: drawn

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.d_model % self.n_heads:
            raise ConfigError(f"d_model ({self.d_model}) is not a multiple of n_heads ({self.n_heads})",
                              fix="change one of the two")
        if self.input_emb_style == "category" and self.n_input_bins is None:
            raise ConfigError("input_emb_style 'category' needs n_input_bins", fix="set it to n_bins + 2")
        if (self.dab or self.use_batch_labels or self.domain_spec_batchnorm) and self.n_batch_labels is None:
            raise ConfigError("dab, use_batch_labels and domain_spec_batchnorm need n_batch_labels",
                              fix="set it to the number of batches")
        if self.generative and (self.layers != "flash" or self.kind == "generator"):
            raise ConfigError("generative training needs kind 'transformer' with layers 'flash'",
                              fix="change one of them")
        if self.mvc and self.mvc_decoder_style.endswith("query") and (self.explicit_zero_prob or self.use_batch_labels):
            raise ConfigError(f"mvc_decoder_style '{self.mvc_decoder_style}' knows no zero probabilities and no batch "
                              "labels", fix="set it to 'inner product', or mvc, explicit_zero_prob and "
                              "use_batch_labels to false")
        if self.pre_norm and self.layers != "flash":
            raise ConfigError("pre_norm has no effect on layers other than 'flash'", fix="set layers to 'flash'")
        return self

    @property
    def pad_value(self) -> int:
        """Value at padded tokens: -2, or for category input the first of the two extra categories."""
        if self.input_emb_style == "category" and self.n_input_bins is not None:
            return self.n_input_bins - 2
        return -2

    def to_args(self) -> dict[str, Any]:
        """The model's part of `args.json`: upstream's names, then what upstream has no name for."""
        return {theirs: getattr(self, ours) for ours, theirs in _ARGS.items()}

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "ModelConfig":
        """From an `args.json`, of ours or upstream's; keys that are not about the model are ignored.

        Raises ConfigError when one of the sizes is missing.
        """
        missing = [key for key in ("embsize", "nheads", "d_hid", "nlayers") if key not in args]
        if missing:
            raise ConfigError(f"args.json lacks {', '.join(missing)}", fix="give the args.json of an scGPT release")
        known = {ours: args[theirs] for ours, theirs in _ARGS.items() if theirs in args}
        if "mvc" in known and known["mvc"] is None:
            del known["mvc"]
        return cls(**known)

    def count_parameters(self, n_tokens: int) -> int:
        """Parameters of the model with a vocabulary of `n_tokens`; equal to what torch counts."""
        return sum(self.parameter_counts(n_tokens).values())

    def parameter_counts(self, n_tokens: int) -> dict[str, int]:
        """Parameters by part of the model."""
        d, labels = self.d_model, self.n_batch_labels or 0
        generator = self.kind == "generator"
        d_in = 2 * d if self.use_batch_labels and not generator else d
        counts = {
            "gene encoder": n_tokens * d + 2 * d,
            "value encoder": self._value_encoder_count(),
            "layers": self.n_layers * self._layer_count() + (2 * d if self.layers == "linear" else 0),
            "expression decoder": (2 if generator else 1) * self._expression_decoder_count(d_in),
            "mvc decoder": self._mvc_count(d_in) if self.mvc else 0,
        }
        if self.n_cls > 1 or not self.generative:
            counts["class decoder"] = (self.n_layers_cls - 1) * (d * d + 3 * d) + d * self.n_cls + self.n_cls
        if generator:
            return counts | {"perturbation encoder": 3 * d}
        return counts | {
            "flag encoder": 2 * d if self.generative else 0,
            "batch encoder": labels * d + 2 * d if self.use_batch_labels else 0,
            "batch norm": self._norm_count(labels),
            "domain discriminator": 2 * (d * d + 3 * d) + d * labels + labels if self.dab else 0,
        }

    def _value_encoder_count(self) -> int:
        if self.kind == "generator" or self.input_emb_style == "continuous":
            return 2 * self.d_model + self.d_model**2 + self.d_model + 2 * self.d_model
        return (self.n_input_bins or 0) * self.d_model + 2 * self.d_model if self.input_emb_style == "category" else 0

    def _layer_count(self) -> int:
        d, h = self.d_model, self.d_hid
        return 4 * (d * d + d) + (d * h + h) + (h * d + d) + 4 * d

    def _expression_decoder_count(self, d_in: int) -> int:
        heads = 2 if self.explicit_zero_prob else 1
        return heads * ((d_in + 1) * self.d_model + (self.d_model + 1) * self.d_model + self.d_model + 1)

    def _mvc_count(self, d_in: int) -> int:
        d, hidden = self.d_model, 64
        output = 1 + hidden + 1  # PReLU, last layer
        if self.mvc_decoder_style == "concat query":
            return (d + 1) * hidden + (d + hidden + 1) * hidden + output
        if self.mvc_decoder_style == "sum query":
            return (d + 1) * d + (d + 1) * hidden + output
        return (d + 1) * d + d * d_in + ((d + 1) * d_in if self.explicit_zero_prob else 0)

    def _norm_count(self, labels: int) -> int:
        if self.domain_spec_batchnorm == "batchnorm" and not self.generative:
            return 2 * self.d_model
        return 2 * self.d_model * labels if self.generative and self.domain_spec_batchnorm == "do_affine" else 0


def read_args(release: Path) -> dict[str, Any]:
    """args.json of a release; CheckpointError where there is none."""
    path = release / "args.json"
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError("this is no release: its args.json cannot be read", where=str(release),
                              fix="give a folder that `scgpt export` wrote, or a published scGPT folder") from error
