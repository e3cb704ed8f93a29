"""Which cells are kept, for which reason the others are not, what is known of them, and in which split they are."""
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from data_pipeline.config import CellsConfig, SourceConfig, SplitsConfig
from data_pipeline.obs_filter import ObsFilter, missing_column
from data_pipeline.sources.base import Source
from data_pipeline.tokenization import SUM_IN, SUM_MITO, SUM_UNMAPPED
from scgpt import rng
from scgpt.data.schema import RaggedBatch, cell_ids
from scgpt.errors import ConfigError

TRAIN, VALID = "train", "valid"
SPLITS = (TRAIN, VALID)   # a cell's split is its place in here
KEPT = -1                 # otherwise a place in REASONS
# A cell that fails several limits counts under the first. "no_genes": none of its genes is in the vocabulary.
REASONS = ("filter", "no_genes", "min_genes", "max_genes", "min_counts", "max_counts", "max_value", "max_mito_fraction")

# Other names that atlases have for what a corpus calls `donor`, the likelier first. Spelling counts only by its letters
# and digits: "Cell.Type" is `cell_type`. What `columns` of a source says comes before.
HARMONISED = {"dataset": ("dataset_id",), "donor": ("donor_id", "individual", "individual_id", "patient", "patient_id",
                                                    "subject", "subject_id")}


@dataclass(frozen=True, slots=True)
class ObsReader:
    """Reads what the configuration wants to know of a source's cells."""

    own_name: Mapping[str, str]        # name in the corpus -> name in this source's obs, where it has the column
    filters: tuple[ObsFilter, ...]     # all must hold

    @classmethod
    def of(cls, source: Source, config: SourceConfig, columns: Sequence[str], cells: CellsConfig) -> "ObsReader":
        """Find the columns in a source; ConfigError when one that was named for it, or a filter's, is not there."""
        present = source.obs_columns()
        for name, own in config.columns.items():
            if own not in present:
                raise missing_column(own, present, what=f"columns.{name}", where=str(source.path))
        wanted = {name: config.columns.get(name) or own_name(name, present)
                  for name in (*columns, "donor", "dataset", *config.columns)}
        reader = cls({name: own for name, own in wanted.items() if own is not None},
                     tuple(ObsFilter.parse(text) for text in (cells.filter, config.filter) if text is not None))
        for wish in reader.filters:
            for name in wish.columns:
                if reader.own_name.get(name, name) not in present:
                    raise missing_column(name, present, what=f"the filter '{wish.text}'", where=str(source.path))
        return reader

    def __str__(self) -> str:
        """The filters, as they were written."""
        return " and ".join(f"({wish.text})" if len(self.filters) > 1 else wish.text for wish in self.filters)

    def announce(self, source: Source) -> None:
        """Tell a source which rows the filters keep, before its values are read."""
        if self.filters:
            source.leave_out(partial(self.passes, source))

    def passes(self, source: Source, first: int, last: int) -> NDArray[np.bool_]:
        """Which of rows [first, last) satisfy every filter, (cells,)."""
        kept = np.ones(last - first, bool)
        for wish in self.filters:
            own = {name: self.own_name.get(name, name) for name in wish.columns}
            obs = source.obs(sorted(set(own.values())), first, last)
            kept &= wish.keep({name: obs[other] for name, other in own.items()}, where=str(source.path))
        return kept

    def metadata(self, source: Source, columns: Sequence[str], first: int, last: int) -> dict[str, pa.DictionaryArray]:
        """Columns of the corpus for rows [first, last), as text; null where the source or the cell lacks the value."""
        found = source.obs(sorted({self.own_name[name] for name in columns if name in self.own_name}), first, last)
        return {name: as_text(found[self.own_name[name]]) if name in self.own_name
                else pa.nulls(last - first, pa.string()).dictionary_encode() for name in columns}

    def groups(self, source: Source, config: SplitsConfig, first: int, last: int) -> pa.DictionaryArray | None:
        """What keeps rows [first, last) in one split: donor or dataset, null where unknown; None: split by cell."""
        return None if config.by == "cell" else self.metadata(source, [config.by], first, last)[config.by]

    def splits(self, source: Source, config: SplitsConfig, first: int, last: int) -> NDArray[np.int8]:
        """The split of rows [first, last), (cells,): places in SPLITS."""
        groups = self.groups(source, config, first, last)
        if groups is None:
            ids = cell_ids(source.name, np.arange(first, last))
            return (_cell_draws(config.seed, ids) < config.valid).astype(np.int8)
        return splits_of_groups(groups, source.name, config)


def own_name(name: str, present: Sequence[str]) -> str | None:
    """What a source calls the column `name` of a corpus: the same, or the one column of HARMONISED; None: it has none.

    Two columns that differ only in spelling are no answer.
    """
    if name in present:
        return name
    for alias in (name, *HARMONISED.get(name, ())):
        found = [own for own in present if _spelling(own) == _spelling(alias)]
        if found:
            return alias if alias in found else found[0] if len(found) == 1 else None
    return None


def _spelling(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def as_text(values: pa.Array) -> pa.DictionaryArray:
    """Any column of obs as dictionary<int32, string>; numbers and truth values in Python's spelling."""
    if isinstance(values, pa.DictionaryArray):
        return values
    if not pa.types.is_string(values.type):
        unique = values.dictionary_encode()
        words = [None if word is None else str(word) for word in unique.dictionary.to_pylist()]
        return pa.DictionaryArray.from_arrays(unique.indices, pa.array(words, pa.string()))
    return values.dictionary_encode()


def splits_of_groups(groups: pa.DictionaryArray, source: str, config: SplitsConfig) -> NDArray[np.int8]:
    """The split of each cell, (cells,), drawn by its group, so that a donor is in one split whatever the source.

    Args:
        groups: the group of each cell, (cells,); a cell without one goes by its source.
        source: name of the source.
        config: what the groups are, the share held out, the seed.
    """
    names: Sequence[str] = groups.dictionary.to_pylist()
    draws = [_group_draw(config.seed, config.by, name) for name in names] + [_group_draw(config.seed, "source", source)]
    codes = groups.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    held_out: NDArray[np.bool_] = np.array(draws)[codes] < config.valid
    return held_out.astype(np.int8)


def groups_in_splits(groups: pa.DictionaryArray, splits: NDArray[np.int8],
                     kept: NDArray[np.bool_]) -> dict[str, list[str | None]]:
    """split -> the groups that cells kept in it belong to, sorted; None, first, stands for cells without one."""
    found: dict[str, list[str | None]] = {}
    for place, split in enumerate(SPLITS):
        names = groups.filter(pa.array(kept & (splits == place))).unique().to_pylist()
        found[split] = sorted(names, key=lambda name: (name is not None, name or ""))
    return found


def judge(cells: RaggedBatch, passes: NDArray[np.bool_], config: CellsConfig) -> NDArray[np.int8]:
    """KEPT, or the reason why not, of each cell of a tokenised block, (cells,).

    Limits look at the genes of the vocabulary, the mitochondrial share at all of the source.
    """
    total, mito, unmapped = (np.asarray(cells.columns[name], np.float64) for name in (SUM_IN, SUM_MITO, SUM_UNMAPPED))
    counts, lengths = total - unmapped, cells.lengths
    share = np.divide(mito, total, out=np.zeros(len(cells)), where=total > 0)
    fails = {"filter": ~passes, "no_genes": lengths == 0, "min_genes": lengths < config.min_genes}
    if config.max_genes is not None:
        fails["max_genes"] = lengths > config.max_genes
    if config.min_counts is not None:
        fails["min_counts"] = counts < config.min_counts
    if config.max_counts is not None:
        fails["max_counts"] = counts > config.max_counts
    if config.max_value is not None:
        fails["max_value"] = _largest(cells.expressions, cells.offsets) > config.max_value
    if config.max_mito_fraction is not None:
        fails["max_mito_fraction"] = share > config.max_mito_fraction
    reasons = np.full(len(cells), KEPT, np.int8)
    for place in reversed(range(len(REASONS))):
        if REASONS[place] in fails:
            reasons[fails[REASONS[place]]] = place
    return reasons


def check_split_column(config: SplitsConfig, readers: Sequence[ObsReader]) -> None:
    """Raise ConfigError when the corpus is split by a column that no source has."""
    if config.by != "cell" and not any(config.by in reader.own_name for reader in readers):
        raise ConfigError(f"splits.by is '{config.by}', which is a column of no source", where="splits.by",
                          fix=f"map a column to it (columns: {{{config.by}: NAME}}), or split by cell")


@njit(cache=True, nogil=True)
def _largest(values, offsets):  # type: ignore[no-untyped-def]
    """The largest value of each cell, (cells,) float64; 0 where it has none."""
    largest = np.zeros(len(offsets) - 1)
    for cell in range(len(largest)):
        for value in range(offsets[cell], offsets[cell + 1]):
            largest[cell] = max(largest[cell], values[value])
    return largest


@njit(cache=True, nogil=True)
def _cell_draws(seed: int, ids: NDArray[np.uint64]) -> NDArray[np.float64]:
    draws = np.empty(len(ids))
    for cell in range(len(ids)):
        draws[cell] = rng.uniform(rng.stream(seed, 0, ids[cell], rng.PURPOSE_HOLD_OUT), 0)
    return draws


def _group_draw(seed: int, by: str, name: str) -> float:
    """Uniform in [0, 1): sha256 of what the group is, so that any tool can check a split."""
    digest = hashlib.sha256(f"{seed}\0{by}\0{name}".encode()).digest()
    return float(int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53
