"""Loader: order -> partition -> fetch -> collate -> tensors. Its state is one integer, the step.

Every rank computes which cells make the global batch and how they fall into micro-batches (indices and lengths only),
and reads and collates those of its own.
"""
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pretrain.draw import Cells, Order, order_of
from pretrain.labels import NO_LABELS, Labels
from pretrain.order import in_order
from pretrain.partition import micro_batches, of_rank, one_domain_batches
from pretrain.prefetch import Prefetch
from scgpt.collate import CollateConfig, PackedBatch, collate
from scgpt.data.schema import offsets_of
from scgpt.errors import ConfigError
from scgpt.vocab import CLS

if TYPE_CHECKING:
    import torch

    from pretrain.config import TrainConfig
    from pretrain.corpus import Corpus
    from scgpt.model.packed import PackedTensors


@dataclass(frozen=True, slots=True)
class GlobalStep:
    """What one rank runs in one step."""

    step: int                         # global batches before this one
    numbers: range                    # (micro-batches,) their numbers j within the global batch
    micro_batches: list[PackedBatch]  # one a forward pass, in the order of `numbers`
    n_cells: int                      # cells of the global batch, over all ranks
    n_micro: int                      # micro-batches of the global batch, over all ranks

    @property
    def n_targets(self) -> int:
        """Positions of this rank that count in the loss."""
        return sum(batch.n_targets for batch in self.micro_batches)

    @property
    def n_tokens(self) -> int:
        """Tokens of this rank."""
        return sum(batch.n_tokens for batch in self.micro_batches)


class Loader:
    """Micro-batches of one rank, step by step.

    Args:
        cells: the split to read.
        collate_config: how cells become model inputs.
        cls_id: id of `<cls>`.
        seed: of the order and of every draw.
        global_batch_size: cells a step, over all ranks.
        micro_batch_size: cells a forward pass.
        rank, world_size: whose micro-batches.
        workers: threads that prepare steps ahead; 0: none.
        order: which cells a step draws; None: all cells once an epoch.
        labels: classes and batches of all cells, which the micro-batches carry along.
        one_domain: a micro-batch holds cells of one batch (`labels.batches`); then `order` draws groups of that size.
        evaluation: one pass in stored order, with the draws of epoch 0, instead of endless shuffled epochs.

    Raises ConfigError when the sizes do not fit each other.
    """

    def __init__(self, cells: Cells, collate_config: CollateConfig, *, cls_id: int, seed: int, global_batch_size: int,
                 micro_batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 2,
                 order: Order | None = None, labels: Labels = NO_LABELS, one_domain: bool = False,
                 evaluation: bool = False) -> None:
        share = micro_batch_size * world_size
        if not evaluation and global_batch_size % share:
            raise ConfigError(f"batch.global_batch_size {global_batch_size} is no multiple of batch.micro_batch_size "
                              f"{micro_batch_size} x {world_size} ranks",
                              fix=f"make it {max(1, round(global_batch_size / share)) * share}, or change the others")
        self.cells, self.collate_config, self.cls_id, self.seed = cells, collate_config, cls_id, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.order = None if evaluation else order or order_of(cells, seed=seed)
        self.labels, self.one_domain, self.evaluation = labels, one_domain, evaluation

    @classmethod
    def of_run(cls, config: "TrainConfig", corpus: "Corpus", *, rank: int, world_size: int) -> "Loader":
        """The loader of a rank of a training."""
        return cls(corpus.train, config.collate_config(corpus.vocab), cls_id=corpus.vocab[CLS], seed=config.train.seed,
                   global_batch_size=config.batch.global_batch_size, micro_batch_size=config.batch.micro_batch_size,
                   rank=rank, world_size=world_size, workers=config.data.workers, order=corpus.order,
                   labels=corpus.train_labels, one_domain=config.data.one_domain_batches)

    @property
    def n_steps(self) -> int:
        """Steps of one pass over the cells, a shorter last one included."""
        return -(-len(self.cells) // self.global_batch_size)

    def batches(self, first_step: int = 0) -> Prefetch[GlobalStep]:
        """Iterate from `first_step` on: endless in training, to the end of the cells in evaluation."""
        steps: Iterator[int] = (iter(range(first_step, self.n_steps)) if self.evaluation
                                else itertools.count(first_step))
        return Prefetch(self.load, steps, workers=self.workers)

    def load(self, step: int) -> GlobalStep:
        """This rank's part of global batch `step`: a pure function of the loader's arguments and `step`."""
        indices, epochs = self._order(step)
        lengths = self.collate_config.n_tokens(self.cells.lengths_of(indices))
        dealt = self._dealt(indices, lengths)
        numbers = of_rank(len(dealt), self.rank, self.world_size)
        return GlobalStep(step, numbers, [self._collate(indices[dealt[j]], epochs[dealt[j]]) for j in numbers],
                          len(indices), len(dealt))

    def _order(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self.order is None:
            return in_order(step, n_cells=len(self.cells), global_batch_size=self.global_batch_size)
        return self.order.batch(step, self.global_batch_size)

    def _dealt(self, indices: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        if self.one_domain and self.labels.batches is not None:
            return one_domain_batches(lengths, self.labels.batches[indices], self.micro_batch_size)
        return micro_batches(lengths, self.micro_batch_size)

    def _collate(self, indices: NDArray[np.int64], epochs: NDArray[np.int64]) -> PackedBatch:
        cells = self.cells.fetch(indices)
        batch = collate(cells, self.collate_config, cls_id=self.cls_id, seed=self.seed, epochs=epochs)
        return self.labels.attach(batch, indices)


@dataclass(frozen=True, slots=True)
class BatchTensors:
    """A PackedBatch on a device."""

    inputs: "PackedTensors"
    targets: "torch.Tensor"      # (tokens,) float32
    target_mask: "torch.Tensor"  # (tokens,) bool
    positions: "torch.Tensor"    # (targets,) int64: the tokens where target_mask is True, ascending
    class_labels: "torch.Tensor | None" = None   # (cells,) int64, -1: unknown
    batch_labels: "torch.Tensor | None" = None   # (cells,) int64


def to_tensors(batch: PackedBatch, device: "torch.device | str") -> BatchTensors:
    """Copy a batch to `device`; to a GPU through pinned memory, without waiting. On a CPU most arrays are shared.

    `positions` is computed on the host, where it costs no synchronisation.
    """
    import torch

    from scgpt.model.packed import PackedTensors

    on_gpu = torch.device(device).type == "cuda"

    def moved(array: NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor.to(device)

    def labels(array: NDArray[np.int32] | None) -> torch.Tensor | None:
        return None if array is None else moved(array).long()

    inputs = PackedTensors(moved(batch.gene_ids).long(), moved(batch.values), moved(batch.cu_seqlens), batch.max_seqlen)
    if batch.perception_lengths is not None:
        inputs = replace(inputs, cu_perception=moved(offsets_of(batch.perception_lengths).astype(np.int32)),
                         max_perception=int(batch.perception_lengths.max(initial=0)),
                         perception_index=moved(np.flatnonzero(~batch.target_mask)))
    return BatchTensors(inputs, moved(batch.targets), moved(batch.target_mask),
                        moved(np.flatnonzero(batch.target_mask)), labels(batch.class_labels),
                        labels(batch.batch_labels))
