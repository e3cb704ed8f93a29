"""Classes and batches of cells: metadata columns of a run's corpora as codes, one numbering for all of its splits."""
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pretrain.config import TrainConfig
from pretrain.mixture import Mixture
from scgpt.collate import PackedBatch
from scgpt.data import TokenDataset
from scgpt.errors import ConfigError

Split = TokenDataset | Mixture


@dataclass(frozen=True, slots=True)
class Labels:
    """What is known of all cells of a split, 4 bytes a cell and column; None where it is not asked for."""

    classes: NDArray[np.int32] | None = None   # (cells,) -1: unknown
    batches: NDArray[np.int32] | None = None   # (cells,)

    def attach(self, batch: PackedBatch, indices: NDArray[np.integer]) -> PackedBatch:
        """A batch of the cells `indices`, with their labels."""
        if self.classes is None and self.batches is None:
            return batch
        return replace(batch, class_labels=None if self.classes is None else self.classes[indices],
                       batch_labels=None if self.batches is None else self.batches[indices])


NO_LABELS = Labels()


def read_labels(config: TrainConfig, splits: Sequence[Split]) -> tuple[list[Labels], dict[str, list[str]]]:
    """The labels of each split, and the sorted values that they number, by column.

    Raises DataError for a column that the corpus does not keep, ConfigError where the model has too few classes or
    batches, where a cell has no batch, and where domains would share a micro-batch that belongs to one.
    """
    data, model = config.data, config.model
    named: dict[str, list[str]] = {}
    classes: Sequence[NDArray[np.int32] | None] = [None] * len(splits)
    batches: Sequence[NDArray[np.int32] | None] = [None] * len(splits)
    if data.class_column is not None:
        classes, named[data.class_column] = number(splits, data.class_column)
        if config.objective.weights.cls > 0:   # without it, only the probe looks at classes
            _check_room(named[data.class_column], data.class_column, "model.n_cls", model.n_cls)
    if data.batch_column is not None:
        batches, named[data.batch_column] = codes, values = number(splits, data.batch_column)
        unknown = sum(int(np.count_nonzero(part < 0)) for part in codes)
        if unknown:
            raise ConfigError(f"{unknown} cells have no value in column '{data.batch_column}'",
                              where="data.batch_column", fix="name a column that every cell has, for example 'source'")
        _check_room(values, data.batch_column, "model.n_batch_labels", model.n_batch_labels)
        if model.domain_spec_batchnorm and config.batch.micro_batch_size == 1 and not splits[0].lengths.all():
            raise ConfigError("a cell without genes is one token, of which no batch norm has a variance",
                              where="batch.micro_batch_size", fix="set it to 2, or model.domain_spec_batchnorm=false")
        own_norms = model.domain_spec_batchnorm in (True, "dsbn") or (model.domain_spec_batchnorm and model.generative)
        if own_norms and len(values) > 1 and not data.one_domain_batches:
            raise ConfigError(f"'{data.batch_column}' has {len(values)} domains whose cells share a micro-batch: "
                              "a norm for each would see the others", where="data.batch_column",
                              fix="set data.one_domain_batches=true, or model.domain_spec_batchnorm=batchnorm or false")
    return [Labels(*both) for both in zip(classes, batches, strict=True)], named


def number(splits: Sequence[Split], column: str) -> tuple[list[NDArray[np.int32]], list[str]]:
    """Codes of each split, (cells,) int32 with -1 for null, and the sorted values of all splits and corpora."""
    found = [[part.codes(column) for part in (cells.parts if isinstance(cells, Mixture) else (cells,))]
             for cells in splits]
    values = sorted({value for parts in found for _, names in parts for value in names})
    places = {value: place for place, value in enumerate(values)}

    def renumbered(codes: NDArray[np.int32], names: list[str]) -> NDArray[np.int32]:
        return np.array([*(places[name] for name in names), -1], np.int32)[codes]   # code -1 reads the last one

    return [np.concatenate([renumbered(*part) for part in parts]) for parts in found], values


def _check_room(values: list[str], column: str, key: str, size: int | None) -> None:
    if size is None or len(values) > size:
        raise ConfigError(f"column '{column}' has {len(values)} values, {key} is {size}", where=key,
                          fix=f"set {key}={len(values)}")
