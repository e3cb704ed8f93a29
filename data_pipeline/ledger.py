"""The books of a build: what came in is what was written plus what was filtered, cell by cell and count by count."""
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from data_pipeline.cells import KEPT, REASONS, SPLITS
from data_pipeline.tokenization import SUM_IN, SUM_UNMAPPED, VALUES_IN
from scgpt.counted import counted
from scgpt.data.schema import RaggedBatch
from scgpt.errors import DataError

_EXACT = 2.0**53    # integers below have a float64 each
_TOLERANCE = 1e-6   # relative, of sums of values that are no integers: stored as float32, added up in another order


@dataclass(slots=True)
class Ledger:
    """Cells, values and sums of some rows of one source; ledgers add up."""

    cells_in: int = 0
    cells_written: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))   # split -> cells
    filtered: dict[str, int] = field(default_factory=dict)   # reason -> cells
    values_in: int = 0           # non-zero values of all genes of all cells
    values_written: int = 0      # stored values of the written cells
    sum_in: float = 0.0          # sum over values_in
    sum_written: float = 0.0     # sum over values_written
    sum_filtered: float = 0.0    # of the mapped genes of filtered cells
    sum_unmapped: float = 0.0    # of the genes without a token, in all cells

    def add(self, other: "Ledger") -> None:
        """Count the rows of another ledger too."""
        self.cells_in += other.cells_in
        for mine, theirs in ((self.cells_written, other.cells_written), (self.filtered, other.filtered)):
            for key, cells in theirs.items():
                mine[key] = mine.get(key, 0) + cells
        self.values_in += other.values_in
        self.values_written += other.values_written
        self.sum_in += other.sum_in
        self.sum_written += other.sum_written
        self.sum_filtered += other.sum_filtered
        self.sum_unmapped += other.sum_unmapped

    def leave_out(self, reason: str, left: Mapping[str, Any]) -> None:
        """Count cells that were to be written as filtered: `cells` {split: n}, `values` and `sum` of them."""
        for split, cells in left["cells"].items():
            self.cells_written[split] -= cells
        self.filtered[reason] = self.filtered.get(reason, 0) + sum(left["cells"].values())
        self.values_written -= left["values"]
        self.sum_written -= left["sum"]
        self.sum_filtered += left["sum"]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def total(ledgers: Iterable[Ledger]) -> Ledger:
    """The sum of ledgers, in their order."""
    result = Ledger()
    for ledger in ledgers:
        result.add(ledger)
    return result


def of_block(cells: RaggedBatch, reasons: NDArray[np.int8], splits: NDArray[np.int8], *, where: str) -> Ledger:
    """The books of a tokenised block, (cells,) each: checked, so that no value was lost between file and batch.

    Raises DataError when sums differ.
    """
    kept = reasons == KEPT
    sums = cell_sums(cells)
    ledger = Ledger(
        len(cells), {name: int((kept & (splits == place)).sum()) for place, name in enumerate(SPLITS)},
        {name: int((reasons == place).sum()) for place, name in enumerate(REASONS) if (reasons == place).any()},
        int(cells.columns[VALUES_IN].sum()), int(cells.lengths[kept].sum()), float(cells.columns[SUM_IN].sum()),
        float(sums[kept].sum()), float(sums[~kept].sum()),
        float(cells.columns[SUM_UNMAPPED].sum()))
    check(ledger, where=where, exact=cells.expressions.dtype.kind == "u")
    return ledger


def cell_sums(cells: RaggedBatch) -> NDArray[np.float64]:
    """The sum of the values of each cell, (cells,)."""
    sums = np.zeros(len(cells), np.uint64 if cells.expressions.dtype.kind == "u" else np.float64)
    _add_up(cells.expressions, cells.offsets, sums)
    return sums.astype(np.float64, copy=False)


@njit(cache=True, nogil=True)
def _add_up(values, offsets, sums):  # type: ignore[no-untyped-def]
    """Add the values of each cell to `sums`, in its type: integers, in no order, are several at a time."""
    for cell in range(len(sums)):
        total = sums[cell]
        for value in range(offsets[cell], offsets[cell + 1]):
            total += values[value]
        sums[cell] = total


def check(ledger: Ledger, *, where: str, exact: bool = True) -> None:
    """Raise DataError unless cells in = written + filtered, and counts in = written + filtered + unmapped.

    exact: see `same`.
    """
    cells_out = sum(ledger.cells_written.values()) + sum(ledger.filtered.values())
    if cells_out != ledger.cells_in:
        raise DataError(f"{counted(ledger.cells_in, 'cell')} came in, accounted for: {cells_out:,}", where=where,
                        fix="please report this: a cell was lost or doubled")
    same(ledger.sum_in, ledger.sum_written + ledger.sum_filtered + ledger.sum_unmapped, what="counts", where=where,
         exact=exact)


def same(expected: float, found: float, *, what: str, where: str, exact: bool = True) -> None:
    """Raise DataError unless two sums agree: exactly where both are integers that float64 holds, else to rounding.

    exact: False for sums of values that are stored as float32, which rounds large integers.
    """
    exact = exact and all(value == round(value) and value < _EXACT for value in (expected, found))
    if expected != found if exact else abs(expected - found) > _TOLERANCE * max(abs(expected), 1.0):
        raise DataError(f"{what} of {expected:.17g} came in, {found:.17g} are accounted for", where=where,
                        fix="please report this: values were lost or doubled")
