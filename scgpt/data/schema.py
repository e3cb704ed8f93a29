"""What a cell is on disk: column names, dtypes, invariants; and RaggedBatch, many cells joined end to end.

Cell i of a batch owns values [offsets[i], offsets[i + 1]) of `genes` and `expressions`.
"""
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from scgpt.errors import DataError

FORMAT = "scgpt-token-dataset"
FORMAT_VERSION = 1

GENES, EXPRESSIONS, CELL_ID = "genes", "expressions", "cell_id"   # columns of a token shard
SOURCE, SOURCE_ROW = "source", "source_row"                       # with CELL_ID, what every metadata file holds
GENE_TYPES = (np.dtype(np.uint16), np.dtype(np.uint32))
EXPRESSION_TYPES = (np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.float32))
CONTENT_HASH = "content_hash"   # its uint64 column of the first halves of the hashes, see scgpt/data/content.py


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Cells as they are stored: only expressed genes, raw values, no special tokens."""

    genes: NDArray[np.unsignedinteger]  # (values,)     token ids, ascending and unique within a cell: uint16 or uint32
    expressions: NDArray[np.generic]    # (values,)     > 0: uint16, uint32 or float32
    offsets: NDArray[np.int64]          # (cells + 1,)  starts at 0, ends at values
    columns: dict[str, NDArray[np.generic]] = field(default_factory=dict)   # (cells,) each; `cell_id` is uint64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Values of each cell, (cells,)."""
        return np.diff(self.offsets)

    def take(self, cells: NDArray[np.integer]) -> "RaggedBatch":
        """The given cells, in the given order; O(values taken), no loop over cells."""
        lengths = self.lengths[cells]
        offsets = offsets_of(lengths)
        values = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][cells] - offsets[:-1], lengths)
        return RaggedBatch(self.genes[values], self.expressions[values], offsets,
                           {name: column[cells] for name, column in self.columns.items()})

    def views(self) -> "CellViews":
        """The same cells, as the compiled loops of the batch maths read them; `columns` holds `cell_id`.

        Raises DataError where boundaries or types are wrong: those loops check neither.
        """
        _check_boundaries(self, where="RaggedBatch", fix="give boundaries from 0 to the number of values, ascending")
        check_types(self.genes.dtype, self.expressions.dtype, where="RaggedBatch", fix="convert the arrays")
        genes, expressions = (np.require(column, requirements=("C", "ALIGNED"))
                              for column in (self.genes, self.expressions))
        starts = self.offsets[:-1].astype(np.uint64)
        return CellViews(genes.ctypes.data + starts * np.uint64(genes.itemsize),
                         expressions.ctypes.data + starts * np.uint64(expressions.itemsize), self.lengths,
                         np.ascontiguousarray(self.columns[CELL_ID], np.uint64), genes.dtype, expressions.dtype,
                         int(genes.max(initial=0)) + 1, (genes, expressions))

    @staticmethod
    def concatenate(batches: Sequence["RaggedBatch"]) -> "RaggedBatch":
        """Join batches of the same dtypes and columns; at least one batch."""
        return RaggedBatch(np.concatenate([batch.genes for batch in batches]),
                           np.concatenate([batch.expressions for batch in batches]),
                           offsets_of(np.concatenate([batch.lengths for batch in batches])),
                           {name: np.concatenate([batch.columns[name] for batch in batches])
                            for name in batches[0].columns})


def _damaged(cell: int) -> DataError:
    return DataError(f"cell {cell} of the batch holds a gene id outside the vocabulary", fix="build the corpus again")


@dataclass(frozen=True, slots=True)
class CellViews:
    """Cells where they lie in memory, such as a mapped corpus: a RaggedBatch without the copy of their values.

    The gene ids are checked by whoever reads them, with `n_tokens` and `damaged`. An address means nothing in another
    process, or without `memory`, so views are neither pickled nor copied.
    """

    genes: NDArray[np.uint64]         # (cells,) address of the first gene id of each; the others follow it
    expressions: NDArray[np.uint64]   # (cells,) address of its first expression
    lengths: NDArray[np.int64]        # (cells,) values of each
    cell_ids: NDArray[np.uint64]      # (cells,)
    gene_type: np.dtype[np.generic]
    expression_type: np.dtype[np.generic]
    n_tokens: int                     # of the vocabulary: a gene id that is not below is damage
    memory: object                    # what the addresses point into, kept as long as they are
    damaged: Callable[[int], DataError] = _damaged   # what to raise where cell i holds such an id

    def __len__(self) -> int:
        return len(self.cell_ids)

    def __reduce__(self) -> NoReturn:
        raise TypeError("CellViews hold addresses in this process: hand over the dataset and the indices, "
                        "or the cells that it fetches")

    @staticmethod
    def joined(views: Sequence["CellViews"], order: NDArray[np.int64]) -> "CellViews":
        """Of the cells of all, in turn, those at the places `order`; views of one vocabulary and the same types."""
        bounds = offsets_of(np.array([len(part) for part in views]))

        def damaged(cell: int) -> DataError:
            part = int(np.searchsorted(bounds, order[cell], side="right")) - 1
            return views[part].damaged(int(order[cell] - bounds[part]))

        genes, expressions, lengths, cell_ids = (np.concatenate(column)[order] for column in zip(
            *((part.genes, part.expressions, part.lengths, part.cell_ids) for part in views), strict=True))
        return CellViews(genes, expressions, lengths, cell_ids, views[0].gene_type, views[0].expression_type,
                         views[0].n_tokens, [part.memory for part in views], damaged)


def offsets_of(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Cell lengths, (cells,), to boundaries, (cells + 1,) int64."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def part_name(number: int) -> str:
    """What a token file and the metadata file beside it are named within their split, endings left out."""
    return f"part-{number:05d}"


def gene_dtype(n_tokens: int) -> np.dtype[np.unsignedinteger]:
    """The type that stores ids of a vocabulary of `n_tokens` tokens: uint16 where it fits, else uint32."""
    return np.dtype(np.uint16 if n_tokens <= 1 << 16 else np.uint32)


def expression_dtype(*, integer: bool, largest: float) -> np.dtype[np.generic]:
    """The one type of a corpus's values: uint16 or uint32 where all are integers that fit, else float32."""
    if integer and largest < 1 << 16:
        return np.dtype(np.uint16)
    if integer and largest < 1 << 32:
        return np.dtype(np.uint32)
    return np.dtype(np.float32)


def cell_ids(source: str, source_rows: NDArray[np.integer]) -> NDArray[np.uint64]:
    """uint64 ids: the first 32 bits of sha256(source's name), then 32 bits of the row within the source."""
    return (np.uint64(source_hash(source)) << np.uint64(32)) | source_rows.astype(np.uint64)


def source_hash(source: str) -> int:
    """The upper 32 bits of the cell ids of a source: two names with one hash must not meet in one corpus."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big")


def check_cells(batch: RaggedBatch, *, n_tokens: int, where: str) -> None:
    """Hold a batch against the invariants of the format; O(values), vectorised.

    Raises DataError naming the first cell at fault: boundaries out of order, ids not ascending, not unique or outside
    the vocabulary, values not above 0 or not finite.
    """
    offsets, genes = batch.offsets, batch.genes
    fix = "the corpus is damaged: build it again"
    _check_boundaries(batch, where=where, fix=fix)
    within = np.ones(len(genes), bool)
    within[offsets[:-1][batch.lengths > 0]] = False
    not_ascending = np.flatnonzero(within[1:] & (genes[1:] <= genes[:-1])) + 1
    outside = np.flatnonzero(genes >= n_tokens)
    values = np.asarray(batch.expressions, np.float64)
    not_positive = np.flatnonzero(~((values > 0) & np.isfinite(values)))
    for faults, what in ((not_ascending, "gene ids that do not ascend"), (outside, "a gene id outside the vocabulary"),
                         (not_positive, "an expression that is not a finite number above 0")):
        if len(faults):
            cell = int(np.searchsorted(offsets, faults[0], side="right")) - 1
            raise DataError(f"cell {cell} has {what}", where=where, fix=fix)


def _check_boundaries(batch: RaggedBatch, *, where: str, fix: str) -> None:
    offsets, n_values = batch.offsets, len(batch.genes)
    if offsets[0] != 0 or offsets[-1] != n_values or n_values != len(batch.expressions) or (batch.lengths < 0).any():
        raise DataError("the boundaries of cells do not fit their values", where=where, fix=fix)
    for name, column in batch.columns.items():
        if len(column) != len(batch):
            raise DataError(f"column '{name}' has {len(column)} values for {len(batch)} cells", where=where, fix=fix)


def check_types(genes: np.dtype[np.generic], expressions: np.dtype[np.generic], *, where: str, fix: str) -> None:
    """Raises DataError where ids or values are of a type that the format does not have, byte order included."""
    for name, kind, known in ((GENES, genes, GENE_TYPES), (EXPRESSIONS, expressions, EXPRESSION_TYPES)):
        if kind not in known:
            raise DataError(f"'{name}' are of type {kind}, not {' or '.join(map(str, known))}", where=where, fix=fix)
