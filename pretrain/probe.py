"""Embedding probe: how well held-out cells' nearest neighbours share their class, beside PCA on the same cells.

The cells are seen whole, as `scgpt embed` sees them: nothing is hidden, no generation part. Micro-batches are formed
without regard to ranks, and each rank's embeddings go into their own rows of one table, so the score is the same on any
world size.
"""
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.data import to_tensors
from pretrain.draw import Cells
from pretrain.engine import Engine
from pretrain.evaluation import EVALUATION_SEED
from pretrain.labels import Labels
from pretrain.neighbours import NEIGHBOURS, knn_accuracy, principal_components
from pretrain.world import World
from scgpt.collate import collate
from scgpt.errors import ConfigError
from scgpt.vocab import CLS


@dataclass(frozen=True)
class Probe:
    """The cells that are embedded, and their classes."""

    cells: Cells
    chosen: NDArray[np.int64]     # (cells,) indices into the held-out split, ascending
    classes: NDArray[np.int32]    # (cells,)
    labels: Labels                # of the whole split, for models that see batches
    config: TrainConfig
    cls_id: int
    n_tokens: int                 # of the vocabulary
    world: World

    @classmethod
    def of(cls, corpus: Corpus, config: TrainConfig, world: World) -> "Probe | None":
        """Up to `train.probe_cells` held-out cells of known class, evenly spaced; None where no probe is asked for.

        Raises ConfigError where there are too few.
        """
        if not config.train.probe_every:
            return None
        classes = corpus.valid_labels.classes
        known = np.flatnonzero(classes >= 0) if classes is not None else np.empty(0, np.int64)
        if corpus.valid is None or classes is None or len(known) <= NEIGHBOURS:
            raise ConfigError(f"the probe needs more than {NEIGHBOURS} held-out cells of known class, there are "
                              f"{len(known)}", where="train.probe_every",
                              fix="set it to 0, or give another data.class_column or data.valid_split")
        n_cells = min(len(known), config.train.probe_cells)
        chosen = known[np.linspace(0, len(known) - 1, n_cells).astype(np.int64)]
        return cls(corpus.valid, chosen, classes[chosen], corpus.valid_labels, config, corpus.vocab[CLS],
                   len(corpus.vocab), world)

    def accuracy(self, engine: Engine) -> float:
        """Of the embeddings, by cosine. All ranks call it, all get the same."""
        points = self._embeddings(engine)
        points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
        return self.world.of_first(lambda: knn_accuracy(points, self.classes))

    def baseline(self) -> float:
        """Of the principal components of the same cells' expression. All ranks call it, rank 0 computes."""
        return self.world.of_first(lambda: knn_accuracy(principal_components(self._expression()), self.classes))

    def facts(self) -> dict[str, Any]:
        """What is measured, for the row."""
        return {"column": self.config.data.class_column, "cells": len(self.chosen), "neighbours": NEIGHBOURS}

    def _embeddings(self, engine: Engine) -> NDArray[np.float64]:
        """(cells, d_model). For ZeRO 3 every rank runs equally often: the last micro-batch again where none is left."""
        size, world_size = self.config.batch.micro_batch_size, self.world.world_size
        table = np.zeros((len(self.chosen), self.config.model.d_model))
        n_micro = -(-len(self.chosen) // size)
        for turn in range(-(-n_micro // world_size)):
            number = turn * world_size + self.world.rank
            rows = slice(min(number, n_micro - 1) * size, (min(number, n_micro - 1) + 1) * size)
            found = self._embed(engine, self.chosen[rows])
            if number < n_micro:
                table[rows] = found
        result: NDArray[np.float64] = self.world.sum(torch.from_numpy(table)).numpy()
        return result

    def _embed(self, engine: Engine, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        collating = replace(self.config.collate_config(), task="pcpt")
        batch = collate(self.cells.views(indices), collating, cls_id=self.cls_id, seed=EVALUATION_SEED, epochs=0,
                        mask=False)
        labels = self.labels.attach(batch, indices)
        found: NDArray[np.float64] = engine.embed(to_tensors(labels, self.world.device)).cpu().numpy()
        return found

    def _expression(self) -> Any:
        """(cells, tokens) CSR, as stored."""
        from scipy import sparse

        cells = self.cells.fetch(self.chosen)
        values = cells.expressions.astype(np.float64)
        return sparse.csr_matrix((values, cells.genes.astype(np.int64), cells.offsets),
                                 shape=(len(self.chosen), self.n_tokens))
