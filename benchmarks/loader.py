"""Cells a second of the batch maths and of the loader, beside the same work written plainly in NumPy, in one run.

    python benchmarks/loader.py                   # seeded random cells in memory, some 1,875 genes each
    python benchmarks/loader.py --corpus DIR      # the training split of a corpus, memory-mapped
    python benchmarks/loader.py --context 2048 --json

Each side samples to the context, bins by quantiles with drawn ties, and masks. "plain NumPy" does it cell by cell and
pads, as collators in Python do. One process; threads only where the row says so. Best of several rounds, warm.
"""
import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pretrain.data import Cells, Loader
from scgpt.collate import CollateConfig, collate
from scgpt.data import RaggedBatch, TokenDataset
from scgpt.data.schema import CELL_ID, cell_ids, offsets_of

CLS_ID, PAD_ID = 60_695, 60_694
GLOBAL_BATCH, MICRO_BATCH = 512, 32


class RandomCells:
    """Seeded cells in memory as the loader reads them: log-normal numbers of genes, geometric counts, a long tail."""

    def __init__(self, n_cells: int, *, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        lengths = np.clip(rng.lognormal(np.log(1_800), 0.3, n_cells), 200, 6_000).astype(np.int64)
        genes = np.concatenate([np.sort(rng.choice(60_000, length, replace=False)) for length in lengths])
        counts = rng.geometric(0.45, len(genes)) * np.where(rng.random(len(genes)) < 0.01, 30, 1)
        self.cells = RaggedBatch(genes.astype(np.uint16), counts.astype(np.uint16), offsets_of(lengths),
                                 {CELL_ID: cell_ids("random", np.arange(n_cells))})

    def __len__(self) -> int:
        return len(self.cells)

    def fetch(self, indices: np.ndarray) -> RaggedBatch:
        """The given cells."""
        return self.cells.take(indices)

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Genes of the given cells."""
        return self.cells.lengths[indices]


def plain_numpy(cells: RaggedBatch, config: CollateConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A padded masked batch, cell by cell, with numpy.quantile and numpy.digitize."""
    rows = []
    for begin, end in zip(cells.offsets[:-1], cells.offsets[1:], strict=True):
        genes, values = cells.genes[begin:end].astype(np.int64), cells.expressions[begin:end].astype(np.float64)
        edges = np.quantile(values, np.linspace(0, 1, config.n_bins - 1))
        upto, below = np.digitize(values, edges), np.digitize(values, edges, right=True)
        bins = np.ceil(rng.random(len(values)) * (below - upto) + upto)
        kept = rng.permutation(len(genes))[:config.context_length - 1]
        rows.append((genes[kept], bins[kept]))
    width = 1 + max(len(genes) for genes, _ in rows)
    gene = np.full((len(rows), width), PAD_ID)
    expr = np.full((len(rows), width), config.pad_value, np.float32)
    for row, (genes, bins) in enumerate(rows):
        gene[row, 0], gene[row, 1:len(genes) + 1], expr[row, 1:len(genes) + 1] = CLS_ID, genes, bins
    hidden = (rng.random(expr.shape) < config.mask_ratio[0]) & (expr != config.pad_value)
    return {"gene": gene, "expr": expr, "masked_expr": np.where(hidden, np.float32(config.mask_value), expr)}


def cells_per_s(work: Callable[[], object], n_cells: int, *, rounds: int) -> float:
    """Cells a second of the fastest of several rounds, after one to warm up."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return n_cells / min(times)


def measure(cells: Cells, config: CollateConfig, rounds: int) -> dict[str, float]:
    """Row -> cells a second."""
    shuffled = np.random.default_rng(0).permutation(len(cells))[:GLOBAL_BATCH]
    batch, rng = cells.fetch(shuffled), np.random.default_rng(0)
    few = batch.take(np.arange(min(64, len(batch))))

    def loader(workers: int) -> Loader:
        return Loader(cells, config, cls_id=CLS_ID, seed=0, global_batch_size=GLOBAL_BATCH,
                      micro_batch_size=MICRO_BATCH, workers=workers)

    def steps(workers: int, n_steps: int) -> None:
        with loader(workers).batches() as batches:
            for _ in range(n_steps):
                next(batches)

    def packed() -> object:
        return collate(batch, config, cls_id=CLS_ID, seed=0, epochs=0)

    n_steps = 16
    return {
        "plain NumPy, padded": cells_per_s(lambda: plain_numpy(few, config, rng), len(few), rounds=3),
        "collate": cells_per_s(packed, len(batch), rounds=rounds),
        "fetch, shuffled": cells_per_s(lambda: cells.fetch(shuffled), len(shuffled), rounds=rounds),
        "loader, in the consumer": cells_per_s(lambda: steps(0, n_steps), n_steps * GLOBAL_BATCH, rounds=5),
        "loader, 1 thread ahead": cells_per_s(lambda: steps(1, n_steps), n_steps * GLOBAL_BATCH, rounds=5),
        "loader, 2 threads ahead": cells_per_s(lambda: steps(2, n_steps), n_steps * GLOBAL_BATCH, rounds=5),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a corpus; without one: seeded random cells")
    parser.add_argument("--cells", type=int, default=8_192, help="random cells (default 8192)")
    parser.add_argument("--context", type=int, default=1_200, help="tokens a cell at most (default 1200)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    cells: Cells = TokenDataset.open(args.corpus) if args.corpus else RandomCells(args.cells)
    genes = float(np.mean(cells.lengths_of(np.arange(len(cells)))))
    rates = measure(cells, CollateConfig(args.context), args.rounds)
    if args.json:
        print(json.dumps({"cells": len(cells), "genes_per_cell": genes, "context_length": args.context,
                          "machine": platform.processor() or platform.machine(), "cells_per_s": rates}))
        return
    print(f"{len(cells):,} cells of {genes:,.0f} genes, context {args.context:,}")
    plain = rates["plain NumPy, padded"]
    for name, rate in rates.items():
        print(f"{name:26} {rate:12,.0f} cells/s {1e6 / rate:10,.1f} us a cell {rate / plain:8,.1f} x")


if __name__ == "__main__":
    main()
