"""What a build will do, decided before any work from headers alone: sources, row blocks, shards, and the plan's hash.

Nothing here depends on who works, or how many; everything that the bytes of a corpus depend on is under the hash.
"""
import glob
import hashlib
import json
import math
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.cells import SPLITS, ObsReader, check_split_column
from data_pipeline.config import CorpusConfig, SourceConfig
from data_pipeline.duplicates import EQUAL_BYTES, PART_CELLS
from data_pipeline.genes import GeneMap, map_source
from data_pipeline.quarantine import Quarantined
from data_pipeline.sources.base import Source, are_counts, describe_values
from data_pipeline.sources.hdf5_structure import check_structure
from data_pipeline.sources.identity import Fingerprint, fingerprint, state_of
from data_pipeline.sources.kinds import open_source
from data_pipeline.sources.location import Location
from data_pipeline.tokenization import refused_values
from scgpt import __version__
from scgpt.data.schema import FORMAT_VERSION, gene_dtype, source_hash
from scgpt.errors import ConfigError, SourceError
from scgpt.vocab import GeneVocab

BLOCK_VALUES = 4 << 20          # stored values of a row block: some 150 MB in a worker; one cell may exceed it
BLOCK_CELLS = 1 << 17           # and cells, where they have few values
_VALUE_BYTES = 4                # the widest expression type: what a shard is planned with
_CELL_BYTES = 24                # cell_id, two list offsets, a share of the batch headers
_SCAN_CELLS = 1 << 20           # cells whose obs are looked at together
_DENSE_MARGIN = 1.25            # a dense matrix says only in its first rows how many values are zero


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """One atlas of the plan."""

    path: Location
    name: str
    kind: str                 # what `auto` found
    config: SourceConfig
    bytes: int
    state: str                # in no hash: only held against the source around each read
    edges_sha256: str         # of the ends of its files, see Fingerprint
    layer: str                # what `auto` chose
    n_cells: int
    n_passing: int            # cells that pass the filters on obs
    n_values: int             # stored values; an estimate for CSC, an upper bound for dense
    bytes_per_value: int
    chunk_bytes: int          # of its storage chunks, each read as a whole
    by_columns: bool          # CSC: cut into row blocks before they are read
    genes: GeneMap
    obs: ObsReader
    remarks: tuple[str, ...]  # what opening it left out or chose

    def open(self) -> Source:
        """The source as it was planned; every worker opens its own."""
        source = open_source(self.path, name=self.name, kind=self.kind, layer=self.layer,
                             gene_table=self.config.gene_table)
        self.obs.announce(source)
        return source


@dataclass(frozen=True, slots=True)
class Block:
    """Rows [first, last) of a source: what one task reads."""

    number: int
    source: int               # place in Plan.sources
    first: int
    last: int
    values: int               # stored values of the rows
    values_before: int        # stored values of the corpus before the block


@dataclass(frozen=True, slots=True)
class PlannedSplit:
    """What a split can hold at most: its cells that pass the filters on obs."""

    cells: int
    values: int
    n_shards: int
    n_bytes: int              # of the token files, uncompressed, with values of 4 bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a build is about to do."""

    config: CorpusConfig
    vocab: GeneVocab
    sources: tuple[SourcePlan, ...]
    blocks: tuple[Block, ...]
    splits: dict[str, PlannedSplit]   # in the order of SPLITS
    quarantined: tuple[Quarantined, ...]   # sources that could not be planned, where on_error is skip
    sha256: str

    @property
    def n_cells(self) -> int:
        """Cells of all sources."""
        return sum(source.n_cells for source in self.sources)

    @property
    def n_values(self) -> int:
        """Stored values of all sources."""
        return sum(source.n_values for source in self.sources)

    @property
    def worker_bytes(self) -> int:
        """What a worker holds at most beside 400 MB of libraries: a block and its tokens, a shard, a part of hashes."""
        block = max(block.values * (2 * self.sources[block.source].bytes_per_value + 24)
                    + 2 * self.sources[block.source].chunk_bytes for block in self.blocks)
        hashes = min(self.n_cells, PART_CELLS) * EQUAL_BYTES
        return 400 * 10**6 + max(block, 3 * self.config.shards.max_bytes, hashes)


def make_plan(config: CorpusConfig) -> Plan:
    """Open every source, choose matrices and gene columns, cut blocks and shards; writes nothing.

    Raises SourceError for an atlas that cannot be used (missing, not AnnData, another species, no counts) and where the
    filters leave no cell, ConfigError for settings that do not fit the sources. With `on_error: skip` an atlas that
    cannot be used is told in the plan.
    """
    vocab = config.load_vocab()
    sources, blocks, quarantined = list[SourcePlan](), list[Block](), list[Quarantined]()
    totals = np.zeros((len(SPLITS), 2))
    for location, source_config in expand(config.sources):
        try:
            known = fingerprint(location)
            check_structure(location)
            with open_source(location, name=source_config.name, kind=source_config.kind, layer=source_config.layer,
                             gene_table=source_config.gene_table) as source:
                planned, mine = _plan_source(source, known, source_config, config, vocab)
                rows = list(row_blocks(source))
            check_unchanged(planned)
        except SourceError as error:
            if config.on_error == "fail":
                raise
            quarantined.append(Quarantined.of(error, location, source_config.name or location.stem))
            continue
        totals += mine
        before = blocks[-1].values_before + blocks[-1].values if blocks else 0
        blocks += _numbered(rows, len(blocks), len(sources), before)
        sources.append(planned)
    _check_names(sources)
    check_split_column(config.splits, [source.obs for source in sources])
    if not blocks:
        found = [f"{source.name} is left out: {source.reason}" for source in quarantined]
        raise SourceError("; ".join(["the sources hold no cells", *found]), where=", ".join(
            [source.name for source in sources]) or None, fix="give atlases with cells in them")
    if not any(source.n_passing for source in sources):
        raise SourceError("no cell passes the filters", where="; ".join(
            f"{source.name}: {source.obs}" for source in sources), fix="loosen the filters, or mend their words")
    splits = {name: _planned_split(int(cells), math.ceil(values), config, len(vocab))
              for name, (cells, values) in zip(SPLITS, totals.tolist(), strict=True)}
    return Plan(config, vocab, tuple(sources), tuple(blocks), splits, tuple(quarantined),
                _hash(config, vocab, sources, blocks, splits, quarantined))


def check_unchanged(source: SourcePlan) -> None:
    """Raise SourceError when a source is not as it was at planning: sizes and times of its files, or ETags."""
    try:
        same = state_of(source.path) == source.state
    except SourceError as error:
        if not isinstance(error.__cause__, FileNotFoundError):   # a network that is down is no change
            raise
        raise _changed(source) from error
    if not same:
        raise _changed(source)


@contextmanager
def unchanged(source: SourcePlan) -> Iterator[None]:
    """What is read within is of the planned source: a change is told in place of any error that came of it."""
    check_unchanged(source)
    try:
        yield
    except Exception:
        check_unchanged(source)
        raise
    check_unchanged(source)


def _changed(source: SourcePlan) -> SourceError:
    return SourceError("the source changed while the corpus was being built", where=str(source.path),
                       fix="start the build again once nothing writes to it")


def expand(sources: Sequence[SourceConfig]) -> Iterator[tuple[Location, SourceConfig]]:
    """Every source that paths and globs stand for, with its settings.

    Raises SourceError where a glob matches nothing; ConfigError where several files, or no reader, could bear a name.
    """
    for config in sources:
        pattern = Location.of(config.path)
        found = pattern.expand()
        if not found:
            raise SourceError("no file matches this pattern", where=str(pattern), fix="check the path")
        if config.name is not None and len(found) > 1:
            raise ConfigError(f"the name '{config.name}' is given to {len(found)} files", where=str(pattern),
                              fix="leave the name out, so that each is called by its file's stem, or list the files")
        for location in found:
            name = config.name or _matched(pattern, location)
            _check_name(name or location.stem, location)
            yield location, config if name == config.name else config.model_copy(update={"name": name})


def _check_name(name: str, location: Location) -> None:
    """Line breaks and other controls would tear the lines and tables that name a source; no file holds a surrogate."""
    odd = [sign for sign in name if unicodedata.category(sign) in {"Cc", "Cs", "Zl", "Zp"}]
    if odd:
        raise ConfigError(f"the name {name!a} holds the control character {odd[0]!a}",
                          where=ascii(str(location))[1:-1], fix="give the source a `name` in one line of text")


def _matched(pattern: Location, location: Location) -> str | None:
    """A name for a file whose own name the pattern fixes, so that all it matches share it: the folders it leaves open.

    `runs/*/outs/filtered_feature_bc_matrix.h5` names each source by its folder in `runs`. None: the stem says it, which
    neither depends on what else is matched.
    """
    wanted = pattern.url.split("/")
    opened = [place for place, part in enumerate(wanted) if glob.has_magic(part)]
    if not opened or opened[-1] == len(wanted) - 1 or pattern == location:
        return None
    found = location.url.split("/")
    if "**" in wanted:
        return "-".join(found[opened[0]:len(found) - (len(wanted) - 1 - opened[-1])]) or None
    return "-".join(found[place] for place in opened)


def _plan_source(source: Source, known: Fingerprint, source_config: SourceConfig, config: CorpusConfig,
                 vocab: GeneVocab) -> tuple[SourcePlan, NDArray[np.float64]]:
    """What is planned of a source, and what `_split_totals` says of it."""
    genes = map_source(source, vocab, gene_column=source_config.gene_column,
                       min_gene_overlap=config.genes.min_gene_overlap)
    values = source.probe()
    if config.cells.expression_kind == "counts" and not are_counts(values):
        raise refused_values(source, values, f"it holds {describe_values(values)}", counts=True)
    obs = ObsReader.of(source, source_config, config.columns, config.cells)
    obs.announce(source)
    totals = _split_totals(source, obs, config)
    return SourcePlan(source.path, source.name, source.kind, source_config, known.bytes, known.state,
                      known.edges_sha256, source.layer, source.n_cells, int(totals[:, 0].sum()), source.n_values(),
                      source.bytes_per_value(), source.chunk_bytes, source.by_columns, genes, obs,
                      tuple(source.remarks())), totals


def _split_totals(source: Source, obs: ObsReader, config: CorpusConfig) -> NDArray[np.float64]:
    """Cells and stored values of a source in each split, (splits, 2), after the filters on obs."""
    totals = np.zeros((len(SPLITS), 2))
    share = source.stored_share()
    for first in range(0, source.n_cells, _SCAN_CELLS):
        last = min(first + _SCAN_CELLS, source.n_cells)
        splits = obs.splits(source, config.splits, first, last)
        passes = obs.passes(source, first, last)
        values = np.diff(source.value_offsets(first, last)) * min(1.0, _DENSE_MARGIN * share if share < 1 else 1.0)
        for place in range(len(SPLITS)):
            chosen = passes & (splits == place)
            totals[place] += chosen.sum(), values[chosen].sum()
    return totals


def row_blocks(source: Source) -> Iterator[tuple[int, int, int]]:
    """(first row, last row, stored values) of the blocks of a source."""
    first = 0
    while first < source.n_cells:
        offsets = source.value_offsets(first, min(first + BLOCK_CELLS, source.n_cells))
        rows = max(int(np.searchsorted(offsets, offsets[0] + BLOCK_VALUES, side="right")) - 1, 1)
        yield first, first + rows, int(offsets[rows] - offsets[0])
        first += rows


def _numbered(rows: Sequence[tuple[int, int, int]], number: int, source: int, before: int) -> Iterator[Block]:
    for first, last, values in rows:
        yield Block(number, source, first, last, values, before)
        number, before = number + 1, before + values


def _planned_split(cells: int, values: int, config: CorpusConfig, n_tokens: int) -> PlannedSplit:
    """As many shards as keep each below max_bytes, although their cells are drawn and so vary in number and length."""
    n_bytes = values * (gene_dtype(n_tokens).itemsize + _VALUE_BYTES) + cells * _CELL_BYTES
    shards = max(math.ceil(n_bytes / config.shards.max_bytes), 1)
    if config.shards.shuffle and shards > 1:
        spread = 6 / math.sqrt(max(cells / shards, 1))   # six standard deviations of a Poisson count
        shards = math.ceil(n_bytes * (1 + min(spread, 1.0)) / config.shards.max_bytes)
    return PlannedSplit(cells, values, shards, n_bytes)


def _check_names(sources: Sequence[SourcePlan]) -> None:
    by_hash: dict[int, SourcePlan] = {}
    for source in sources:
        other = by_hash.setdefault(source_hash(source.name), source)
        if other is not source:
            what = (f"two sources are named '{source.name}'" if other.name == source.name else
                    f"the names '{other.name}' and '{source.name}' have one hash")
            raise ConfigError(what, where=f"{other.path}, {source.path}", fix="give one of them another `name`")


def _hash(config: CorpusConfig, vocab: GeneVocab, sources: Sequence[SourcePlan], blocks: Sequence[Block],
          splits: dict[str, PlannedSplit], quarantined: Sequence[Quarantined]) -> str:
    decided = {
        "format_version": FORMAT_VERSION, "package": __version__, "config": config.portable(), "vocab": vocab.sha256,
        "sources": [[source.name, source.path.name, source.bytes, source.edges_sha256, source.layer, source.n_cells,
                     source.n_values, source.genes.column, hashlib.sha256(source.genes.tokens.tobytes()).hexdigest(),
                     dict(source.obs.own_name)] for source in sources],
        "blocks": [[block.source, block.first, block.last, block.values] for block in blocks],
        "splits": {name: [split.cells, split.values, split.n_shards] for name, split in splits.items()},
        "quarantined": [[source.name, source.file, source.reason] for source in quarantined]}
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
