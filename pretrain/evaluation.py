"""Loss on held-out cells, the same number on any world size, and what predicting each gene's mean would score there.

Micro-batches of the held-out split are formed without regard to ranks, in stored order, with the masks of a fixed
seed: two evaluations, of whatever run, hide the same values. Each micro-batch's sums go into its own row of a table,
which is added up over ranks, then over rows: the order of additions does not depend on who computed what.
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.config import TrainConfig
from pretrain.data import Loader, to_tensors
from pretrain.draw import Cells
from pretrain.engine import Engine
from pretrain.labels import NO_LABELS, Labels
from pretrain.world import World
from scgpt.collate import CollateConfig, PackedBatch, collate
from scgpt.vocab import CLS, GeneVocab

EVALUATION_SEED = 0          # of masks, samples and bins: every run is measured on the same hidden values
GENE_MEAN_CELLS = 1 << 16    # cells of the train split, evenly spaced, from which gene means are taken at most
_CHUNK_CELLS = 256           # cells collated at once for the gene means


@dataclass(frozen=True)
class HeldOut:
    """The cells that validation measures on."""

    cells: Cells
    config: TrainConfig
    vocab: GeneVocab
    world: World
    labels: Labels = NO_LABELS

    @cached_property
    def _collating(self) -> CollateConfig:
        return self.config.collate_config(self.vocab)

    def loss(self, engine: Engine) -> dict[str, float]:
        """Means over all hidden values (or cells): `loss`, its terms, `mre`. All ranks call it, all get the same.

        Terms that need a second forward pass are left out, and out of `loss`.
        """
        objective = engine.objective
        n_units = len(objective.units)

        def measure(batch: PackedBatch) -> NDArray[np.float64]:
            tensors, key = to_tensors(batch, self.world.device), int(batch.cell_ids[0])
            sums: NDArray[np.float64] = engine.evaluate(tensors, key=key).cpu().numpy()
            return np.concatenate([objective.counts([batch], step=None), sums])

        totals = self._over_micro_batches(measure, n_units + len(objective.names),
                                          even=engine.json["zero_optimization"]["stage"] == 3)
        return objective.means(totals[n_units:].tolist(), totals[:n_units].tolist())

    def gene_mean_loss(self, train_cells: Cells, n_tokens: int) -> float:
        """`loss_expression` of predicting, for each gene, the mean of its bins where the train split expresses it.

        A gene that no train cell expresses is predicted as the mean of all values.
        """
        means = self._gene_means(train_cells, n_tokens)

        def squared_errors(batch: PackedBatch) -> NDArray[np.float64]:
            hidden = batch.target_mask
            errors = batch.targets[hidden].astype(np.float64) - means[batch.gene_ids[hidden]]
            return np.array([np.square(errors).sum(), batch.n_targets])

        total, count = self._over_micro_batches(squared_errors, 2, even=False)
        return float(total / max(1.0, count))

    def _over_micro_batches(self, measure: Callable[[PackedBatch], NDArray[np.float64]], n_sums: int, *,
                            even: bool) -> NDArray[np.float64]:
        """The sums that `measure` gives, over the split: (n_sums,).

        With `even` every rank measures equally often, some micro-batch again where it has none left: ZeRO 3 gathers
        parameters in each forward pass, and a rank that stayed away would stop the others.
        """
        rows: list[NDArray[np.float64]] = []
        for n_micro, numbers, batches in self._steps():
            table = np.zeros((n_micro, n_sums))
            for number, batch in zip(numbers, batches, strict=True):
                table[number] = measure(batch)
            if even and len(numbers) < -(-n_micro // self.world.world_size):
                measure(batches[-1] if batches else self._spare())
            rows.append(table)
        total = self.world.sum(torch.from_numpy(np.concatenate(rows)))
        result: NDArray[np.float64] = total.numpy().sum(axis=0)
        return result

    def _steps(self) -> Iterator[tuple[int, range, list[PackedBatch]]]:
        with self._loader(self.world.rank).batches() as steps:
            for step in steps:
                yield step.n_micro, step.numbers, step.micro_batches

    def _spare(self) -> PackedBatch:
        return self._loader(0).load(0).micro_batches[0]

    def _loader(self, rank: int) -> Loader:
        batch = self.config.batch
        return Loader(self.cells, self._collating, cls_id=self.vocab[CLS], seed=EVALUATION_SEED,
                      global_batch_size=batch.global_batch_size, micro_batch_size=batch.micro_batch_size, rank=rank,
                      world_size=self.world.world_size, workers=self.config.data.workers, labels=self.labels,
                      one_domain=self.config.data.one_domain_batches, evaluation=True)

    def _gene_means(self, train_cells: Cells, n_tokens: int) -> NDArray[np.float64]:
        """(n_tokens,): each rank adds up its share of the cells."""
        n_cells = min(len(train_cells), GENE_MEAN_CELLS)
        chosen = np.linspace(0, len(train_cells) - 1, n_cells).astype(np.int64)[self.world.rank::self.world.world_size]
        sums = np.zeros((2, n_tokens))
        for first in range(0, len(chosen), _CHUNK_CELLS):
            cells = train_cells.views(chosen[first:first + _CHUNK_CELLS])
            batch = collate(cells, self._collating, cls_id=self.vocab[CLS], seed=EVALUATION_SEED,
                            epochs=0, mask=False)
            is_gene = batch.gene_ids != self.vocab[CLS]
            genes, bins = batch.gene_ids[is_gene], batch.targets[is_gene].astype(np.float64)
            sums[0] += np.bincount(genes, bins, minlength=n_tokens)
            sums[1] += np.bincount(genes, minlength=n_tokens)
        total, count = self.world.sum(torch.from_numpy(sums)).numpy()
        overall = total.sum() / max(1.0, count.sum())
        means: NDArray[np.float64] = np.where(count > 0, total / np.maximum(count, 1.0), overall)
        return means
