"""Seeded cells for the tests of batches: counts with many ties and a long tail, as real ones."""
import numpy as np

from scgpt.data import RaggedBatch
from scgpt.data.schema import offsets_of
from scgpt.rng import stream

CLS_ID = 60_695


def key_of(*name):
    """The key of a stream as compiled functions take it from Python, all 64 bits."""
    return np.uint64(stream(*(np.uint64(part) for part in name)))


def random_cells(n_cells, *, seed=0, shortest=0, longest=300, dtype=np.uint16, largest=5_000):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, n_cells)
    genes = [np.sort(rng.choice(60_000, length, replace=False)) for length in lengths]
    offsets = offsets_of(lengths)
    counts = np.minimum(rng.geometric(0.4, offsets[-1]) * rng.choice([1, 1, 1, 1, 37, 900], offsets[-1]), largest)
    expressions = np.log1p(counts).astype(dtype) if dtype == np.float32 else counts.astype(dtype)
    cell_id = (np.uint64(0xABCD1234) << np.uint64(32)) | np.arange(n_cells, dtype=np.uint64)
    return RaggedBatch(np.concatenate([*genes, []]).astype(np.uint16), expressions, offsets, {"cell_id": cell_id})


class CellsInMemory:
    """The loader's view of a split: len, fetch, views, lengths_of."""

    def __init__(self, cells):
        self.cells = cells

    def __len__(self):
        return len(self.cells)

    def fetch(self, indices):
        return self.cells.take(indices)

    def views(self, indices):
        return self.fetch(indices).views()

    def lengths_of(self, indices):
        return self.cells.lengths[indices]
