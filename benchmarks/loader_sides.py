"""Our sides of the loader benchmark, and the public DataCollator: a corpus on disk -> batches.

Run as a program, it measures one side in this process: `benchmarks/loader.py` starts it, bound to its cores.
"""
import json
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader_timing import Batch, Epochs, seen, timed
from pretrain.data import Loader
from pretrain.draw import order_of
from pretrain.order import Blocks
from scgpt.allocator import keep_freed_memory
from scgpt.collate import CollateConfig
from scgpt.data import TokenDataset

CLS_ID, PAD_ID = 60_695, 60_694
GLOBAL_BATCH, MICRO_BATCH = 512, 32
BLOCKS = Blocks(1_024, 64)
STOCK = "SCGPT_STOCK"   # the folder of `pip install --no-deps --target FOLDER scgpt==0.2.4`


@dataclass(frozen=True, slots=True)
class Task:
    """What a side is to do."""

    corpus: Path
    context: int      # tokens a cell at most
    cores: int


@dataclass(frozen=True, slots=True)
class Side:
    """One way to read the corpus."""

    work: str                         # in one phrase
    begin: Callable[[Task], Epochs]
    cores: tuple[int, ...] = (1, 2)   # where it is measured
    collates: bool = True             # False: one context is as good as another


def fetched(task: Task) -> Epochs:
    """Cells as they are stored, MICRO_BATCH at a time, in an order drawn anew each epoch."""
    cells = TokenDataset.open(task.corpus)

    def batches(epoch: int) -> Iterator[Batch]:
        order = np.random.default_rng(epoch).permutation(len(cells))
        for first in range(0, len(order), MICRO_BATCH):
            found = cells.fetch(order[first:first + MICRO_BATCH])
            yield Batch(len(found), found.genes, found.expressions)

    return batches


def loaded(workers: int, blocks: Blocks | None = None) -> Callable[[Task], Epochs]:
    """Packed micro-batches of our loader, sampled, binned and masked."""
    def begin(task: Task) -> Epochs:
        cells = TokenDataset.open(task.corpus)
        loader = Loader(cells, CollateConfig(task.context), cls_id=CLS_ID, seed=0, global_batch_size=GLOBAL_BATCH,
                        micro_batch_size=MICRO_BATCH, workers=workers, order=order_of(cells, seed=0, blocks=blocks))

        def batches(epoch: int) -> Iterator[Batch]:
            n_steps = loader.n_steps
            with loader.batches(epoch * n_steps) as steps:
                for _ in range(n_steps):
                    for batch in next(steps).micro_batches:
                        yield Batch(len(batch), batch.gene_ids)

        return batches

    return begin


def collated(task: Task) -> Epochs:
    """Padded batches of the public collator: the package's own where STOCK names its folder, else our plain writing."""
    import torch

    torch.set_num_threads(task.cores)
    cells = TokenDataset.open(task.corpus)
    collator = public_collator(task.context)

    def batches(epoch: int) -> Iterator[Batch]:
        order = np.random.default_rng(epoch).permutation(len(cells))
        for first in range(0, len(order), MICRO_BATCH):
            found = cells.fetch(order[first:first + MICRO_BATCH])
            genes, expressions = found.genes.astype(np.int64), found.expressions.astype(np.float32)
            bounds = zip(found.offsets[:-1], found.offsets[1:], strict=True)
            batch = collator([{"genes": torch.from_numpy(np.insert(genes[begin:end], 0, CLS_ID)),
                               "expressions": torch.from_numpy(np.insert(expressions[begin:end], 0, -2))}
                              for begin, end in bounds])
            yield Batch(len(found), batch["gene"].numpy())

    return batches


def public_collator(context: int) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """upstream's `DataCollator`, set as its pretraining does: sample, bin, mask 40 %, pad."""
    settings = {"do_padding": True, "pad_token_id": PAD_ID, "pad_value": -2, "do_mlm": True, "do_binning": True,
                "mlm_probability": 0.4, "mask_value": -1, "max_length": context, "sampling": True,
                "keep_first_n_tokens": 1}
    site = os.environ.get(STOCK)
    if site:
        return _stock_collator(Path(site))(**settings)
    from benchmarks.loader_public import PublicCollator

    return PublicCollator(PAD_ID, context)


def _stock_collator(site: Path) -> type:
    """The package's class, without what the package's `__init__` and its preprocessing import beside it."""
    package, scanpy, get = types.ModuleType("scgpt"), types.ModuleType("scanpy"), types.ModuleType("scanpy.get")
    package.__path__ = [str(site / "scgpt")]
    package.logger = logging.getLogger("scgpt")
    get._get_obs_rep = get._set_obs_rep = None
    ours = {name: module for name, module in sys.modules.items() if name == "scgpt" or name.startswith("scgpt.")}
    for name in ours:
        del sys.modules[name]
    sys.modules |= {"scgpt": package, "scanpy": scanpy, "scanpy.get": get}
    try:
        from scgpt.data_collator import DataCollator
    finally:
        for name in [name for name in sys.modules if name == "scgpt" or name.startswith("scgpt.")]:
            del sys.modules[name]
        sys.modules.update(ours)
    return DataCollator


SIDES = {
    "loader": Side("ours: sampled, binned, masked, packed; in the consumer's thread", loaded(0), (1,)),
    "loader 1 worker": Side("the same, one thread ahead", loaded(1), (1, 2)),
    "loader 2 workers": Side("the same, two threads ahead", loaded(2), (2,)),
    "public collator": Side("scgpt 0.2.4's DataCollator: sampled, binned, masked, padded; cells read by our fetch",
                            collated, (1,)),
    "fetch": Side("ours: stored values in any order, one copy", fetched, (1,), collates=False),
    "blocks": Side("ours: the loader in block order, two threads ahead", loaded(2, BLOCKS), (2,)),
}


def main() -> None:
    """SIDE CORPUS CONTEXT CORES SECONDS: print one line of JSON; 0 seconds: what an epoch holds, untimed."""
    side, corpus, context, cores, seconds = sys.argv[1:]
    keep_freed_memory()   # as a training does; for all sides
    epochs = SIDES[side].begin(Task(Path(corpus), int(context), int(cores)))
    print(json.dumps(timed(epochs, seconds=float(seconds)) if float(seconds) else
                     seen(epochs, special=(CLS_ID, PAD_ID))))


if __name__ == "__main__":
    main()
