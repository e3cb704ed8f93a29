"""Source: what every kind of atlas offers to the pipeline, in bounded memory."""
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array

from data_pipeline.sources.location import Location
from scgpt.errors import ConfigError

INDEX = "index"                  # stands for the names of the genes (var_names), beside the columns of var
X, RAW, AUTO = "X", "raw", "auto"
EXPRESSION_KINDS = ("counts", "expected_counts", "normalized", "log1p")
_WORDS = {"expected_counts": "expected counts or other fractions", "normalized": "normalised values",
          "log1p": "log-normalised values"}
MAX_VALUE = 1e30             # of a value: float32 holds it, and the sum of some
_LOG_MAX = 30.0              # log1p of any count per cell stays below
PROBE_VALUES = 1 << 18           # stored values looked at to tell counts from other values before any work


class Source(ABC):
    """An open atlas: cells in rows, genes in columns. Reading is stateless; close it, or use it in a `with`."""

    path: Location               # where it lies
    kind: str                    # one of KINDS; `open_source` sets it
    name: str                    # part of every cell id
    layer: str                   # the matrix in use: X, raw or the name of a layer
    n_cells: int
    n_genes: int

    @abstractmethod
    def close(self) -> None:
        """Give back the file."""

    @abstractmethod
    def gene_columns(self) -> list[str]:
        """Where gene identifiers may be found: INDEX first, then the text columns of var."""

    def gene_names(self, column: str = INDEX) -> list[str]:
        """The identifiers of the matrix's columns, (n_genes,); ConfigError for what is none of `gene_columns()`."""
        columns = self.gene_columns()
        if column not in columns:
            raise ConfigError(f"there is no gene column '{column}'", where=str(self.path),
                              fix=f"choose one of: {', '.join(columns)}")
        return self._names_in(column)

    @abstractmethod
    def _names_in(self, column: str) -> list[str]:
        """The same, from a column that is there."""

    @abstractmethod
    def obs_columns(self) -> list[str]:
        """The names of what is known of the cells."""

    @abstractmethod
    def obs(self, columns: Sequence[str], first: int = 0, last: int | None = None) -> dict[str, pa.Array]:
        """Columns of obs for rows [first, last): text (categories as dictionary arrays), numbers, booleans; nulls."""

    @abstractmethod
    def value_offsets(self, first: int, last: int) -> NDArray[np.int64]:
        """Stored values before each of the rows first .. last, (last - first + 1,), the last row's end included.

        Exact where the file says it (CSR); the average (CSC) or the most there can be (dense) where it does not.
        Only differences count: a source that cannot tell what is before `first` begins there with 0.
        """

    def n_values(self) -> int:
        """Stored values of all rows, as `value_offsets` tells them."""
        return int(self.value_offsets(self.n_cells, self.n_cells)[0])

    @abstractmethod
    def read_rows(self, first: int, last: int) -> csr_array:
        """Rows [first, last), (last - first, n_genes), values as stored; memory is that of the rows asked for.

        Raises SourceError with the row range when the file cannot be read or does not fit together.
        """

    @abstractmethod
    def bytes_per_value(self) -> int:
        """Bytes that a stored value and its column index take while a block is read."""

    @abstractmethod
    def stored_share(self) -> float:
        """Share of `value_offsets` that is not zero, judged by the first rows: 1 where only values are stored."""

    @abstractmethod
    def other_matrices(self) -> list[str]:
        """The matrices that are not in use: X, raw, names of layers."""

    def leave_out(self, passes: Callable[[int, int], NDArray[np.bool_]]) -> None:  # noqa: B027 most need not know
        """Learn which rows [first, last) the filters on obs keep, (rows,).

        Where a row costs more than its obs, the others are not read from now on: they come as rows without values.
        """

    def check_content(self) -> None:  # noqa: B027 most have none
        """Hold the whole source against checksums that come with it. Raises SourceError where it differs."""

    def remarks(self) -> list[str]:
        """What was left out or chosen on opening, in words."""
        return []

    @property
    def chunk_bytes(self) -> int:
        """Bytes that a read holds beside the rows asked for: the source's chunks are decoded whole."""
        return 0

    @property
    def piece_values(self) -> int | None:
        """So many stored values (whole rows of them) cost as much alone as among others; None: rows are read at once.

        A source that says so tells exactly by `value_offsets` where rows begin.
        """
        return None

    @property
    def by_columns(self) -> bool:
        """Whether a row is stored all over the file, so that row blocks should be cut out once for all."""
        return False

    def cut_row_blocks(self, firsts: Sequence[int], folder: Path) -> list[Path]:
        """Write the rows of each block, which begin at `firsts`, to a file in `folder`; where `by_columns`."""
        raise NotImplementedError

    def use_row_blocks(self, folder: Path) -> None:
        """From now on `read_rows` is asked for blocks that `cut_row_blocks` has written to `folder`."""
        raise NotImplementedError

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def probe(self) -> NDArray[np.generic]:
        """The stored values of the first rows, at most some PROBE_VALUES of them: enough to tell what they are."""
        offsets = self.value_offsets(0, min(self.n_cells, 4096))
        rows = int(np.searchsorted(offsets, offsets[0] + PROBE_VALUES, side="right")) - 1
        return self.read_rows(0, min(max(rows, 1), self.n_cells)).data if self.n_cells else np.zeros(0)


def are_counts(values: NDArray[np.generic]) -> bool:
    """Whether all values are integers from 0 to MAX_VALUE."""
    if values.dtype.kind in "ub":
        return True
    numbers = np.asarray(values, np.float64)
    return bool((numbers >= 0).all() and (numbers <= MAX_VALUE).all() and (numbers == np.floor(numbers)).all())


def value_kind(values: NDArray[np.generic]) -> str:
    """What values most likely are: one of EXPRESSION_KINDS, or "not finite", "negative", "too large"."""
    shown = np.asarray(values, np.float64)
    if not np.isfinite(shown).all():
        return "not finite"
    if (shown < 0).any():
        return "negative"
    if (shown > MAX_VALUE).any():
        return "too large"
    fractions = (shown != np.floor(shown)).mean() if len(shown) else 0.0
    if fractions == 0:
        return "counts"
    if shown.max() < _LOG_MAX:
        return "log1p"
    return "expected_counts" if fractions < 0.5 else "normalized"


def describe_values(values: NDArray[np.generic]) -> str:
    """The same in words, with an example."""
    shown = np.asarray(values, np.float64)
    kind = value_kind(shown)
    fractional = shown[shown != np.floor(shown)]
    return {"not finite": "NaN or infinite values", "too large": f"values above {MAX_VALUE:g}", "counts": "integers",
            "negative": f"negative values such as {shown.min(initial=0):.4g} (scaled data?)",
            }.get(kind) or f"{_WORDS[kind]} such as {fractional[0]:.4g}"
