"""What global batch t of a run is: the cells, and a digest of their tensors that is the same on any world size.

The real loaders of all ranks run one after the other; what they return is merged in the order of the cell ids.
"""
import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.data import Loader
from scgpt.collate import PackedBatch
from scgpt.errors import ConfigError

_MOST_CELLS = 1 << 62   # that a run can draw: places are int64, and the search for an epoch goes up to twice as far


@dataclass(frozen=True, slots=True, order=True)
class PeekedCell:
    """One cell of a global batch."""

    cell_id: int
    sha256: str    # of its tensors: gene ids, values, targets, target mask
    source: str
    row: int       # in the source
    tokens: int    # `<cls>` included
    masked: int    # positions that count in the loss


@dataclass(frozen=True, slots=True)
class Peek:
    """A global batch, its cells in the order of their ids."""

    step: int
    world_size: int
    digest: str    # sha256 over the cells' ids and digests
    cells: tuple[PeekedCell, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"cells": [asdict(cell) for cell in self.cells]}


def peek(config: TrainConfig, step: int, *, world_size: int = 1) -> Peek:
    """Global batch `step` (from 0) of a run on `world_size` ranks.

    Raises ConfigError where the batch does not fit the ranks, DataError where the corpus cannot be read.
    """
    last = _MOST_CELLS // config.batch.global_batch_size - 1
    if world_size < 1 or not 0 <= step <= last:
        raise ConfigError(f"there is no step {step} of {world_size} ranks", where="command line",
                          fix=f"give --step from 0 to {last} and --world-size from 1")
    config.batch.accumulation(world_size)
    corpus = Corpus.open(config)
    cells = tuple(sorted(cell for rank in range(world_size)
                         for batch in Loader.of_run(config, corpus, rank=rank,
                                                    world_size=world_size).load(step).micro_batches
                         for cell in _cells(batch, corpus)))
    digest = hashlib.sha256("".join(f"{cell.cell_id} {cell.sha256}\n" for cell in cells).encode()).hexdigest()
    return Peek(step, world_size, digest, cells)


def _cells(batch: PackedBatch, corpus: Corpus) -> list[PeekedCell]:
    arrays = (batch.gene_ids, batch.values, batch.targets, batch.target_mask)
    found = []
    for i, cell_id in enumerate(batch.cell_ids.tolist()):
        tokens = slice(int(batch.cu_seqlens[i]), int(batch.cu_seqlens[i + 1]))
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(array[tokens]).tobytes() for array in arrays))
        found.append(PeekedCell(cell_id, digest.hexdigest(), corpus.sources_of([cell_id])[0], cell_id & 0xFFFFFFFF,
                                tokens.stop - tokens.start, int(batch.target_mask[tokens].sum())))
    return found
