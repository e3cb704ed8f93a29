"""Where the nanoseconds of a batch go: each stage on its own, over the cells of real batches, beside a plain copy.

Run as a program on one core: CORPUS CONTEXT ROUNDS; prints one line of JSON. The stages of the batch maths are the
compiled steps that `collate` calls, each in a loop of its own here; `collate` itself runs them cell by cell.
"""
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from benchmarks.loader_sides import CLS_ID, GLOBAL_BATCH, MICRO_BATCH
from pretrain.data import Loader, groups, host_tensors
from scgpt.allocator import keep_freed_memory
from scgpt.collate import CollateConfig, collate
from scgpt.collate.binning import (
    as_values,
    draw_bins,
    fill_edges,
    fill_table,
    find_bins,
    probabilities,
    scratch_for,
    sort_keys,
)
from scgpt.collate.masking import hide
from scgpt.collate.sampling import BLOCK, sample, take
from scgpt.data import RaggedBatch, TokenDataset
from scgpt.data.schema import CELL_ID
from scgpt.rng import PURPOSE_SAMPLE, PURPOSE_VALUE, fill, stream

COPY_BYTES = 256 << 20


@njit(nogil=True)
def _sample(cell_ids, lengths, wanted, chosen, counts, limits):
    for cell in range(len(cell_ids)):
        counts[cell] = sample(stream(np.uint64(0), 0, cell_ids[cell], PURPOSE_SAMPLE), chosen[cell], lengths[cell],
                              wanted, limits)


@njit(nogil=True)
def _edges(keys, offsets, ordered, at, scratch):
    for cell in range(len(offsets) - 1):
        fill_edges(keys[offsets[cell]:offsets[cell + 1]], True, ordered, at, scratch)   # noqa: FBT003 compiled
        fill_table(True, scratch)   # noqa: FBT003


@njit(nogil=True)
def _draws(cell_ids, chosen, tokens, words):
    for cell in range(len(cell_ids)):
        fill(stream(np.uint64(0), 0, cell_ids[cell], PURPOSE_VALUE), chosen[cell],
             words[tokens[cell] + 1:tokens[cell + 1]])


@njit(nogil=True)
def _bins(expressions, keys, offsets, words, chosen, counts, scratch, bins, tokens):
    """With the edges of one cell for all: as much work as with their own."""
    for cell in range(len(offsets) - 1):
        begin, end = offsets[cell], offsets[cell + 1]
        find_bins(expressions[begin:end], keys[begin:end], chosen[cell], counts[cell],
                  fill_table(True, scratch), scratch)   # noqa: FBT003
        span = slice(tokens[cell] + 1, tokens[cell + 1])
        draw_bins(scratch.spare, words[span], True, bins[span])   # noqa: FBT003


@njit(nogil=True)
def _mask(words, targets, values, target_mask, tokens):
    for cell in range(len(tokens) - 1):
        span = slice(tokens[cell] + 1, tokens[cell + 1])
        hide(words[span], 0.4, -1.0, targets[span], values[span], target_mask[span])


@njit(nogil=True)
def _pack(genes, offsets, chosen, tokens, gene_ids):
    for cell in range(len(offsets) - 1):
        gene_ids[tokens[cell]] = CLS_ID
        take(genes[offsets[cell]:offsets[cell + 1]], chosen[cell], gene_ids[tokens[cell] + 1:tokens[cell + 1]])


def maths(config: CollateConfig, cells: RaggedBatch) -> dict[str, Callable[[], object]]:
    """Stage -> a call that does it for these cells."""
    n_cells, longest = len(cells), int(cells.lengths.max())
    ids, keys, scratch = cells.columns[CELL_ID], sort_keys(cells.expressions), scratch_for(longest, config.n_bins)
    ordered, at, wanted = (as_values(scratch.sorted_keys, cells.expressions.dtype), probabilities(config.n_bins),
                           config.context_length - 1)
    chosen, counts = np.empty((n_cells, wanted + 1), np.int32), np.empty(n_cells, np.int64)
    tokens = np.concatenate([[0], np.cumsum(config.n_tokens(cells.lengths))])
    limits = np.empty(BLOCK, np.uint64)
    gene_ids, words, bins, values, target_mask = (np.zeros(tokens[-1], kind) for kind in (
        np.int32, np.uint64, np.float32, np.float32, np.bool_))
    return {   # in this order: each works on what those before it have left
        "sample": lambda: _sample(ids, cells.lengths, wanted, chosen, counts, limits),
        "edges of the bins": lambda: _edges(keys, cells.offsets, ordered, at, scratch),
        "draws": lambda: _draws(ids, chosen, tokens, words),
        "bins": lambda: _bins(cells.expressions, keys, cells.offsets, words, chosen, counts, scratch, bins, tokens),
        "mask": lambda: _mask(words, bins, values, target_mask, tokens),
        "pack": lambda: _pack(cells.genes, cells.offsets, chosen, tokens, gene_ids),
    }


def measure(corpus: Path, context: int, rounds: int) -> dict[str, Any]:
    """Nanoseconds a cell of each stage (median over steps of GLOBAL_BATCH cells), bytes a cell, bytes a second."""
    cells, config = TokenDataset.open(corpus), CollateConfig(context)
    loader = Loader(cells, config, cls_id=CLS_ID, seed=0, global_batch_size=GLOBAL_BATCH,
                    micro_batch_size=MICRO_BATCH, workers=0)
    taken: defaultdict[str, list[float]] = defaultdict(list)
    n_values = n_tokens = n_cells = 0

    def clocked(name: str, call: Callable[[], Any]) -> Any:
        start = time.thread_time()   # of the CPU: others that use the machine are left out, as far as can be
        result = call()
        taken[name][-1] += time.thread_time() - start
        return result

    for first in range(0, len(cells), GLOBAL_BATCH):   # pages are mapped as after an epoch, not met for the first time
        cells.fetch(np.arange(first, min(first + GLOBAL_BATCH, len(cells))))
    for step in range(rounds + 1):
        for stage in STAGES:
            taken[stage].append(0.0)
        indices, epochs = clocked("order", lambda step=step: loader._order(step))
        lengths = clocked("locate, lengths", lambda indices=indices: cells.lengths_of(indices))
        dealt = clocked("deal out", lambda i=indices, n=lengths: loader._dealt(i, config.n_tokens(n)))
        for group in groups(dealt):
            members = np.concatenate(group)
            found = clocked("views", lambda i=indices[members]: cells.views(i))
            batch = clocked("collate", lambda found=found, epochs=epochs[members]: collate(
                found, config, cls_id=CLS_ID, seed=0, epochs=epochs))
            parts = clocked("split", lambda batch=batch, group=group: batch.split([len(part) for part in group]))
            clocked("to tensors", lambda parts=parts: [host_tensors(part, "cpu") for part in parts])
            if step:
                n_values, n_tokens, n_cells = (n_values + int(found.lengths.sum()), n_tokens + batch.n_tokens,
                                               n_cells + len(batch))
        for members in dealt:   # few at a time, so that the room of a stage stays in the cache as that of a cell does
            for name, stage in maths(config, cells.fetch(indices[members])).items():
                clocked(name, stage)
        clocked("load", lambda step=step: loader.load(step))
    values, tokens = n_values / n_cells, n_tokens / n_cells
    read, packed = values * (found.gene_type.itemsize + found.expression_type.itemsize), tokens * (4 + 4 + 4 + 1)
    return {"values": values, "tokens": tokens,
            "ns": {stage: statistics.median(taken[stage][1:]) / GLOBAL_BATCH * 1e9 for stage in STAGES},
            "read_bytes": read, "batch_bytes": packed, "copy_bytes_per_s": copy_bytes_per_s()}


STAGES = ("order", "locate, lengths", "deal out", "views", "sample", "edges of the bins", "draws", "bins", "mask",
          "pack", "collate", "split", "to tensors", "load")


def copy_bytes_per_s(rounds: int = 7) -> float:
    """Bytes that one core copies from memory to memory a second."""
    source, target = np.ones(COPY_BYTES, np.uint8), np.zeros(COPY_BYTES, np.uint8)
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        np.copyto(target, source)
        times.append(time.thread_time() - start)
    return COPY_BYTES / statistics.median(times)


if __name__ == "__main__":
    keep_freed_memory()   # as a training does
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
