"""Loader: order -> partition -> fetch -> collate -> tensors. Its state is one integer, the step.

Every rank computes which cells make the global batch and how they fall into micro-batches (indices and lengths only),
and reads and collates those of its own. All of it, pinning included, is done by the threads that prepare steps ahead:
what is left to the thread that trains is to start the copy to its GPU.
"""
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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

_CELLS_AT_ONCE = 512   # cells that are read and collated by one call, which itself costs as much as some ten cells do


@dataclass(frozen=True, slots=True)
class GlobalStep:
    """What one rank runs in one step."""

    step: int                         # global batches before this one
    numbers: range                    # (micro-batches,) their numbers j within the global batch
    micro_batches: list[PackedBatch]  # one a forward pass, in the order of `numbers`
    n_cells: int                      # cells of the global batch, over all ranks
    n_micro: int                      # micro-batches of the global batch, over all ranks
    tensors: list["BatchTensors"] = field(default_factory=list)   # of each, still on the host; none without a device

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
        device: where the batches will go, which steps then hold tensors for; None: no tensors are made.

    Raises ConfigError when the sizes do not fit each other.
    """

    def __init__(self, cells: Cells, collate_config: CollateConfig, *, cls_id: int, seed: int, global_batch_size: int,
                 micro_batch_size: int, rank: int = 0, world_size: int = 1, workers: int = 2,
                 order: Order | None = None, labels: Labels = NO_LABELS, one_domain: bool = False,
                 evaluation: bool = False, device: "torch.device | None" = None) -> None:
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
        self.device = device

    @classmethod
    def of_run(cls, config: "TrainConfig", corpus: "Corpus", *, rank: int, world_size: int,
               device: "torch.device | None" = None) -> "Loader":
        """The loader of a rank of a training."""
        return cls(corpus.train, config.collate_config(corpus.vocab), cls_id=corpus.vocab[CLS], seed=config.train.seed,
                   global_batch_size=config.batch.global_batch_size, micro_batch_size=config.batch.micro_batch_size,
                   rank=rank, world_size=world_size, workers=config.data.workers, order=corpus.order,
                   labels=corpus.train_labels, one_domain=config.data.one_domain_batches, device=device)

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
        batches = [batch for group in groups([dealt[j] for j in numbers])
                   for batch in self._collate(group, indices, epochs)]
        tensors = [] if self.device is None else [host_tensors(batch, self.device) for batch in batches]
        return GlobalStep(step, numbers, batches, len(indices), len(dealt), tensors)

    def _order(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self.order is None:
            return in_order(step, n_cells=len(self.cells), global_batch_size=self.global_batch_size)
        return self.order.batch(step, self.global_batch_size)

    def _dealt(self, indices: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        if self.one_domain and self.labels.batches is not None:
            return one_domain_batches(lengths, self.labels.batches[indices], self.micro_batch_size)
        return micro_batches(lengths, self.micro_batch_size)

    def _collate(self, group: list[NDArray[np.int64]], indices: NDArray[np.int64],
                 epochs: NDArray[np.int64]) -> list[PackedBatch]:
        """The micro-batches of a group, read and collated together."""
        together = np.concatenate(group)
        cells = self.cells.views(indices[together])
        batch = collate(cells, self.collate_config, cls_id=self.cls_id, seed=self.seed, epochs=epochs[together])
        return self.labels.attach(batch, indices[together]).split([len(places) for places in group])


def groups(dealt: list[NDArray[np.int64]]) -> Iterator[list[NDArray[np.int64]]]:
    """Neighbouring micro-batches that are worked on together: _CELLS_AT_ONCE cells, or one of more."""
    group: list[NDArray[np.int64]] = []
    for places in dealt:
        if group and sum(map(len, group)) + len(places) > _CELLS_AT_ONCE:
            yield group
            group = []
        group.append(places)
    if group:
        yield group


@dataclass(frozen=True, slots=True)
class BatchTensors:
    """A PackedBatch as tensors. Ids and labels are int32 while they are pinned on the host, int64 wherever they go."""

    inputs: "PackedTensors"
    targets: "torch.Tensor"      # (tokens,) float32
    target_mask: "torch.Tensor"  # (tokens,) bool
    positions: "torch.Tensor"    # (targets,) int64: the tokens where target_mask is True, ascending
    class_labels: "torch.Tensor | None" = None   # (cells,) -1: unknown
    batch_labels: "torch.Tensor | None" = None   # (cells,)

    def to(self, device: "torch.device | str") -> "BatchTensors":
        """The batch on `device`; from pinned memory without waiting. What is there already is shared."""
        inputs = self.inputs.to(device, non_blocking=True)
        targets, target_mask, positions = (tensor.to(device, non_blocking=True)
                                           for tensor in (self.targets, self.target_mask, self.positions))
        class_labels, batch_labels = (None if tensor is None else tensor.to(device, non_blocking=True).long()
                                      for tensor in (self.class_labels, self.batch_labels))
        return BatchTensors(replace(inputs, gene_ids=inputs.gene_ids.long()), targets, target_mask, positions,
                            class_labels, batch_labels)


def host_tensors(batch: PackedBatch, device: "torch.device | str") -> BatchTensors:
    """A batch on the host, ready to go to `device`: pinned where that is a GPU, else most arrays are shared.

    `positions` is computed here, where it costs no synchronisation. Any thread may call it.
    """
    import torch

    from scgpt.model.packed import PackedTensors

    on_gpu = torch.device(device).type == "cuda"

    def host(array: NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if on_gpu else tensor

    def ids(array: NDArray[np.int32]) -> torch.Tensor:   # to a GPU they go as they are, half the bytes
        return host(array) if on_gpu else host(array).long()

    inputs = PackedTensors(ids(batch.gene_ids), host(batch.values), host(batch.cu_seqlens), batch.max_seqlen)
    if batch.perception_lengths is not None:
        inputs = replace(inputs, cu_perception=host(offsets_of(batch.perception_lengths).astype(np.int32)),
                         max_perception=int(batch.perception_lengths.max(initial=0)),
                         perception_index=host(np.flatnonzero(~batch.target_mask)))
    return BatchTensors(inputs, host(batch.targets), host(batch.target_mask), host(np.flatnonzero(batch.target_mask)),
                        *(None if labels is None else ids(labels) for labels in (batch.class_labels,
                                                                                 batch.batch_labels)))


def to_tensors(batch: PackedBatch, device: "torch.device | str") -> BatchTensors:
    """A batch on `device`, at once: for whoever prepares nothing ahead."""
    return host_tensors(batch, device).to(device)
