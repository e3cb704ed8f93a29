"""A matrix stored by columns, cut once into one file a row block: one pass over it, whatever the number of blocks.

Memory is one slab of values. A file holds its entries as they came, by columns; reading it sorts them by row.
"""
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.sparse import csr_array

Entries = tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.generic]]   # rows, columns, values, (entries,)


def cut_by_rows(slabs: Iterator[Entries], firsts: Sequence[int], folder: Path) -> list[Path]:
    """Spread entries over the row blocks that begin at `firsts` (ascending, the first is 0).

    Args:
        slabs: the whole matrix in pieces, ordered by column.
        firsts: first row of each block.
        folder: made if missing; what it holds of an earlier attempt must be removed before.

    Returns the files, one a block, in their order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [block_path(folder, first) for first in firsts]
    for path in paths:
        path.touch()
    bounds = np.asarray(firsts)
    for rows, columns, values in slabs:
        blocks = np.searchsorted(bounds, rows, side="right") - 1
        order = np.argsort(blocks, kind="stable")
        entries = np.empty(len(rows), _entry(values.dtype))
        entries["row"], entries["column"], entries["value"] = rows[order], columns[order], values[order]
        present, starts = np.unique(blocks[order], return_index=True)
        for block, part in zip(present, np.split(entries, starts[1:]), strict=True):
            with paths[block].open("ab") as stream:
                part.tofile(stream)
    return paths


def read_block(folder: Path, first: int, last: int, n_genes: int, value_type: np.dtype[np.generic]) -> csr_array:
    """Rows [first, last), exactly one block, of what `cut_by_rows` has written, (last - first, n_genes)."""
    entries = np.fromfile(block_path(folder, first), _entry(value_type))
    rows, columns, values = ((entries["row"] - first).astype(np.int32), entries["column"].copy(),
                             entries["value"].copy())
    del entries   # before as much is needed for the result
    return to_csr((rows, columns, values), (last - first, n_genes))


def select_rows(slabs: Iterator[Entries], first: int, shape: tuple[int, int],
                value_type: np.dtype[np.generic]) -> csr_array:
    """Rows [first, first + shape[0]) of a matrix, gathered in one pass over all of it."""
    parts = []
    for rows, columns, values in slabs:
        inside = np.flatnonzero((rows >= first) & (rows < first + shape[0]))
        parts.append((rows[inside] - first, columns[inside], values[inside]))
    if not parts:
        return csr_array(shape, dtype=value_type)
    rows, columns, values = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return to_csr((rows, columns, values), shape)


def to_csr(entries: Entries, shape: tuple[int, int]) -> csr_array:
    """Entries to CSR, those of a row in their order; two entries of one place stay two (tokenising adds them up)."""
    rows, columns, values = entries
    indptr = np.zeros(shape[0] + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=shape[0]), out=indptr[1:])
    return csr_array((*_by_row(rows, columns, values, indptr), indptr), shape=shape)


@njit(cache=True, nogil=True)
def _by_row(rows, columns, values, indptr):  # type: ignore[no-untyped-def]
    """Values and columns, (entries,) each, in the order of rows: counted, not sorted."""
    places = indptr[:-1].copy()
    moved_values, moved_columns = np.empty_like(values), np.empty_like(columns)
    for entry in range(len(rows)):
        place = places[rows[entry]]
        moved_values[place], moved_columns[place] = values[entry], columns[entry]
        places[rows[entry]] = place + 1
    return moved_values, moved_columns


def block_path(folder: Path, first: int) -> Path:
    """The file of the block that begins at row `first`."""
    return folder / f"rows-{first:010d}.bin"


def _entry(value_type: np.dtype[np.generic]) -> np.dtype[np.void]:
    return np.dtype([("row", np.int64), ("column", np.int32), ("value", value_type)])
