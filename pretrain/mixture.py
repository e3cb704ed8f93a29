"""Several corpora as one: their cells numbered through."""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from scgpt.data import RaggedBatch, TokenDataset
from scgpt.data.schema import CellViews, offsets_of


@dataclass(frozen=True)
class Mixture:
    """Splits of corpora with one vocabulary. Cell i of corpus c has the index of the cells of the corpora before, + i.

    Args:
        parts: one split of each corpus.
        weights: share of the places of a run that each gets, relative to the others.
    """

    parts: tuple[TokenDataset, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return int(self.first_cells[-1])

    @cached_property
    def first_cells(self) -> NDArray[np.int64]:
        """(corpora + 1,) cells before each corpus."""
        return offsets_of(np.array([len(part) for part in self.parts]))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Values of all cells, (len(self),)."""
        return np.concatenate([part.lengths for part in self.parts])

    def lengths_of(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Values of the given cells, (cells,), without reading them."""
        lengths = np.empty(len(indices), np.int64)
        for part, places, own in self._by_corpus(indices):
            lengths[places] = part.lengths_of(own)
        return lengths

    def fetch(self, indices: NDArray[np.integer]) -> RaggedBatch:
        """The given cells in the given order, with `cell_id`; their values in one type, whichever cells they are."""
        parts = list(self._by_corpus(indices))
        fetched = [replace(cells, expressions=cells.expressions.astype(self._value_type, copy=False))
                   for cells in (part.fetch(own) for part, _, own in parts)]
        if len(parts) == 1:
            return fetched[0]
        joined = RaggedBatch.concatenate(fetched)
        places = np.concatenate([places for _, places, _ in parts])
        return joined.take(np.argsort(places, kind="stable"))

    def views(self, indices: NDArray[np.integer]) -> CellViews:
        """The given cells in the given order, where they lie in memory if all corpora store them in the same types."""
        if len(self._types) > 1:
            return self.fetch(indices).views()
        parts = list(self._by_corpus(indices))
        return CellViews.joined([part.views(own) for part, _, own in parts],
                                np.argsort(np.concatenate([places for _, places, _ in parts])))

    @cached_property
    def _types(self) -> set[tuple[np.dtype[np.generic], np.dtype[np.generic]]]:
        """Types of genes and expressions of the corpora; ids of one vocabulary may be stored in two."""
        nothing = (part.fetch(np.empty(0, np.int64)) for part in self.parts if len(part))
        return {(cells.genes.dtype, cells.expressions.dtype) for cells in nothing}

    @cached_property
    def _value_type(self) -> np.dtype[np.generic]:
        return _common([expressions for _, expressions in self._types])

    def _by_corpus(self, indices: NDArray[np.integer],
                   ) -> "Sequence[tuple[TokenDataset, NDArray[np.int64], NDArray[np.int64]]]":
        """(corpus, places in `indices`, cells within it) of each corpus that has some; the first one where none has."""
        corpora = np.searchsorted(self.first_cells, indices, side="right") - 1
        found = [(self.parts[corpus], places := np.flatnonzero(corpora == corpus),
                  np.asarray(indices)[places] - self.first_cells[corpus]) for corpus in np.unique(corpora)]
        return found or [(self.parts[0], np.empty(0, np.int64), np.empty(0, np.int64))]


def _common(types: Sequence[np.dtype[np.generic]]) -> np.dtype[np.generic]:
    """The type that holds the values of all: an integer type where all are, else float32."""
    return np.result_type(*types) if all(kind.kind == "u" for kind in types) else np.dtype(np.float32)
