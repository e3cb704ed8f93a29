"""What a run may be continued with: settings that may differ, keys that are gone, and what then comes out otherwise."""
from collections.abc import Iterator, Mapping
from typing import Any

from pretrain.config import TrainConfig
from scgpt.config import validate
from scgpt.errors import ConfigError

# A run may be continued with other values of these (and with its corpus moved): they decide how long and where it runs,
# what is kept and shown, how a global batch is cut up; not which cells a step trains on.
MAY_DIFFER = ("train.max_steps", "train.max_epochs", "train.max_tokens", "train.max_time_s", "train.log_every",
              "train.eval_every", "train.save_every", "train.keep_last", "train.recompute", "train.compile",
              "train.deterministic", "train.precision", "train.max_skipped_steps", "train.max_rollbacks",
              "train.patience", "train.min_improvement", "train.peak_tflops", "train.probe_every", "data.corpus",
              "data.workers", "batch.micro_batch_size", "deepspeed.", "tracking.", "model.attention_backend")


# Keys of earlier versions that are gone -> the value with which this version does what they did. Who removes a field
# writes it here: runs that had that value go on, others are refused.
GONE: dict[str, Any] = {}


def config_of_run(saved: Mapping[str, Any], *, where: str) -> tuple[TrainConfig, list[str]]:
    """The configuration that a run was saved with, and the keys in it that are gone since and are passed over.

    `saved` is its JSON form, of this version or an earlier one. Raises ConfigError where a key that is gone had a value
    that no longer can be, or this version does not take what is there.
    """
    passed_over = [key for key, _ in _flat(saved) if key in GONE]
    values: dict[str, Any] = dict(saved)
    for key in passed_over:
        values, value = _without(values, key.split("."))
        if value != GONE[key]:
            raise ConfigError(f"the run was started with {key}={value!r}, which this version no longer has",
                              where=where, fix="go on with the version that wrote it")
    try:
        return validate(TrainConfig, values), passed_over
    except ConfigError as error:
        raise ConfigError(f"the run was started with settings that this version does not take: {error.what}",
                          where=where, fix="go on with the version that wrote it") from error


def _without(tree: Mapping[str, Any], key: list[str]) -> tuple[dict[str, Any], Any]:
    """A copy of a tree without a key, and its value."""
    rest = dict(tree)
    if len(key) == 1:
        return rest, rest.pop(key[0])
    rest[key[0]], value = _without(tree[key[0]], key[1:])
    return rest, value


def differences(saved: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """What forbids continuing a run with `config`: `key: saved -> now` of every key outside MAY_DIFFER.

    `saved` is the JSON form of the configuration that the run was started with.
    """
    before, now = dict(_flat(saved)), dict(_flat(config.model_dump(mode="json")))
    decisive = ("batch.micro_batch_size",) if config.data.one_domain_batches else ()   # cells are drawn by micro-batch
    keys = [key for key in sorted({*before, *now}) if key in decisive or not key.startswith(MAY_DIFFER)]
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)]


def other_settings(before: TrainConfig, now: TrainConfig) -> list[str]:
    """`key was -> is` of the settings that a run goes on with; stage and precision are told as they came out."""
    was, wanted = (dict(_flat(config.model_dump(mode="json"))) for config in (before, now))
    return [f"{key} {was.get(key)} -> {wanted.get(key)}" for key in sorted({*was, *wanted})
            if was.get(key) != wanted.get(key) and key not in ("deepspeed.zero_stage", "train.precision")]


def other_terms(before: TrainConfig, now: TrainConfig, *, ranks: tuple[int, int]) -> list[str]:
    """What of a run comes out otherwise because other cells are computed together from here on; in words.

    `ranks`: before and now. A micro-batch keys its dropout and holds what batch norm and ECS see; CCE sees those that
    all ranks compute at the same time.
    """
    model, weights = now.model, now.objective.weights
    is_other = before.batch.micro_batch_size != now.batch.micro_batch_size
    asked = {"dropout": is_other and (model.dropout or model.attention_dropout),
             "batch norm": is_other and model.domain_spec_batchnorm, "ECS": is_other and weights.ecs,
             "CCE": (is_other or ranks[0] != ranks[1]) and weights.cce}
    return [name for name, value in asked.items() if value]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
