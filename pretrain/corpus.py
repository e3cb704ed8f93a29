"""What a run learns from: one corpus, or a mixture of several with one vocabulary."""
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pretrain.config import MixtureConfig, TrainConfig
from pretrain.draw import Order, order_of
from pretrain.labels import NO_LABELS, Labels, read_labels
from pretrain.mixture import Mixture
from scgpt.data import Manifest, TokenDataset
from scgpt.data.schema import source_hash
from scgpt.errors import ConfigError
from scgpt.files import json_bytes
from scgpt.vocab import CLS, PAD, GeneVocab


@dataclass(frozen=True)
class Corpus:
    """The open corpora of a configuration."""

    train: TokenDataset | Mixture
    valid: TokenDataset | Mixture | None   # None: no validation
    vocab: GeneVocab
    manifests: tuple[Manifest, ...]
    weights: tuple[float, ...]             # of a mixture; (1.0,) for one corpus
    where: str                             # folders or URLs, as told to the user
    order: Order                           # which cells of `train` a step draws
    train_labels: Labels = NO_LABELS       # classes and batches of the cells, where they are asked for
    valid_labels: Labels = NO_LABELS
    label_values: dict[str, list[str]] = field(default_factory=dict)   # column -> what its codes number

    @classmethod
    def open(cls, config: TrainConfig) -> "Corpus":
        """Open the corpora of a configuration.

        Raises DataError for what is no corpus or lacks a split, ConfigError for corpora whose vocabularies or kinds of
        values cannot serve together.
        """
        given = config.data.corpus
        parts = [MixtureConfig(path=given)] if isinstance(given, str) else given
        where = ", ".join(part.path for part in parts)
        train = [TokenDataset.open(part.path, "train") for part in parts]
        _check_alike(train)
        for part, dataset in zip(parts, train, strict=True):
            if not len(dataset):
                raise ConfigError("the corpus has no cell to train on", where=part.path,
                                  fix="give another corpus, or build it with other filters and splits")
        name = config.data.valid_split
        for dataset in train if name is not None else ():
            if name not in dataset.manifest.splits:
                raise ConfigError(f"the corpus has no split '{name}' to validate on", where=str(dataset.path),
                                  fix="set data.valid_split to one of its other splits, or to null: no validation")
        valid = [TokenDataset.open(part.path, name) for part in parts] if name is not None else []
        valid = [dataset for dataset in valid if len(dataset)]
        if config.train.patience is not None and not valid:
            raise ConfigError(f"train.patience needs validations, and split '{name}' has no cell", where=where,
                              fix="set train.patience=null, or build the corpus with held-out cells")
        vocab = train[0].vocab
        missing = [token for token in (CLS, PAD) if token not in vocab]
        if missing:
            raise ConfigError(f"the corpus's vocabulary lacks {' and '.join(missing)}", where=where,
                              fix="build the corpus with a vocabulary that holds them")
        weights = tuple(part.weight for part in parts)
        splits = [_joined(train, weights), *([_joined(valid, (1.0,) * len(valid))] if valid else [])]
        labels, values = read_labels(config, splits)
        order = order_of(splits[0], seed=config.train.seed, blocks=config.data.blocks,
                         full_genes=config.data.full_genes, group=config.batch.micro_batch_size,
                         domains=labels[0].batches if config.data.one_domain_batches else None)
        return cls(splits[0], splits[1] if valid else None, vocab, tuple(dataset.manifest for dataset in train),
                   weights, where, order, labels[0], labels[-1], values)

    def sources_of(self, cell_ids: Sequence[int]) -> list[str]:
        """Names of the sources that cells come from, each once, sorted."""
        return sorted({self._source_names.get(cell_id >> 32, f"unknown source {cell_id >> 32:08x}")
                       for cell_id in cell_ids})

    @cached_property
    def _source_names(self) -> dict[int, str]:
        return {source_hash(source.name): source.name for manifest in self.manifests for source in manifest.sources}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint and a release say of it. `sha256` is that of the manifest; of a mixture, over all of it."""
        first = self.manifests[0]
        digests = [manifest.sha256 for manifest in self.manifests]
        mixed = hashlib.sha256(json_bytes([digests, list(self.weights)])).hexdigest()
        names = dict.fromkeys(name for manifest in self.manifests for name in manifest.splits)
        facts = {"sha256": digests[0] if len(digests) == 1 else mixed, "vocab_sha256": first.vocab.sha256,
                 "vocab": first.vocab.name, "expression_kind": first.expression_kind,
                 "splits": {name: {what: sum(getattr(manifest.splits[name], what) for manifest in self.manifests
                                             if name in manifest.splits) for what in ("cells", "tokens")}
                            for name in names},
                 "sources": [{"name": source.name, "cells_in": source.cells_in, "cells_written": source.cells_written}
                             for manifest in self.manifests for source in manifest.sources]}
        if self.label_values:
            facts["labels"] = self.label_values
        if len(digests) > 1:
            facts["mixture"] = [{"sha256": digest, "weight": weight, "cells": manifest.splits["train"].cells}
                                for digest, weight, manifest in zip(digests, self.weights, self.manifests, strict=True)]
        return facts


def _joined(parts: Sequence[TokenDataset], weights: tuple[float, ...]) -> TokenDataset | Mixture:
    return parts[0] if len(parts) == 1 else Mixture(tuple(parts), weights)


def _check_alike(parts: Sequence[TokenDataset]) -> None:
    first = parts[0]
    for other in parts[1:]:
        if other.manifest.vocab.sha256 != first.manifest.vocab.sha256:
            raise ConfigError("the corpora of a mixture have different vocabularies",
                              where=f"{first.path}, {other.path}", fix="build them with one vocabulary")
        if other.manifest.expression_kind != first.manifest.expression_kind:
            raise ConfigError(f"the corpora of a mixture hold {first.manifest.expression_kind} and "
                              f"{other.manifest.expression_kind}", where=f"{first.path}, {other.path}",
                              fix="mix corpora of one kind of values")
