"""Cells -> PackedBatch: each cell sampled, binned, masked or split, and packed by one compiled loop.

Every draw is keyed by (seed, epoch, cell_id, purpose), so a cell's tokens depend on nothing else: not on its neighbours
in the batch, the rank, the worker or the step. Bins are those of the whole cell, not of the sample, as upstream's. The
loop reads the cells where they lie, for a mapped corpus its pages, and has the beginning of the next cell come to the
cache meanwhile. It releases the GIL. Its machine code is cached beside the source; the first call in a fresh clone
compiles it.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from scgpt import rng
from scgpt.collate import binning, masking, sampling
from scgpt.collate.binning import (
    Scratch,
    as_values,
    draw_bins,
    fill_edges,
    fill_table,
    find_bins,
    probabilities,
    scratch_for,
    sort_keys,
)
from scgpt.collate.compiled import digest_of
from scgpt.collate.masking import draw_ratio, hide, split
from scgpt.collate.packing import PackedBatch
from scgpt.collate.sampling import BLOCK, any_above, copy, sample, take
from scgpt.collate.unexpressed import add_unexpressed
from scgpt.data import gather
from scgpt.data.gather import ask_for, at
from scgpt.data.schema import CellViews, RaggedBatch
from scgpt.errors import ConfigError, DataError
from scgpt.rng import PURPOSE_SAMPLE, PURPOSE_SPLIT, PURPOSE_VALUE, fill, stream

InputStyle = Literal["binned", "log1p", "raw"]
TieRule = Literal["spread", "highest"]
Task = Literal["pcpt", "gen", "both"]
_BINNED, _LOG1P, _RAW = 0, 1, 2
_LINES = 8   # of the next cell's genes and expressions each; the processor itself goes on from there
_STYLES = {"binned": _BINNED, "log1p": _LOG1P, "raw": _RAW}


@dataclass(frozen=True, slots=True)
class CollateConfig:
    """How cells become model inputs. Raises ConfigError where a setting makes no sense."""

    context_length: int                        # tokens a cell at most, `<cls>` included
    n_bins: int = 51                           # bins, that of zero included; upstream always uses 51
    mask_ratio: tuple[float, ...] = (0.4,)     # share of hidden or generated genes; of several, each cell draws one
    pad_value: float = -2                      # value of padding and, as upstream, of `<cls>`
    mask_value: float = -1                     # value of a hidden gene
    task: Task = "pcpt"                        # genes hidden in place, or ("gen", "both") moved to a part of their own
    input_style: InputStyle = "binned"         # bins, log(1 + expression), or the expression itself
    tie_rule: TieRule = "spread"               # a value on several edges: a bin drawn among theirs, or the highest
    unexpressed_genes: int = 0                 # genes of value 0 that join a cell before it is sampled to the context
    gene_ids: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32), compare=False, repr=False)
    # (genes,) those of the vocabulary, special tokens left out, which unexpressed genes are drawn from

    def __post_init__(self) -> None:
        for name, value, good, what in (
            ("context_length", self.context_length, self.context_length >= 2, "2 or more (`<cls>` and a gene)"),
            ("n_bins", self.n_bins, 2 <= self.n_bins <= 1 << 15, "2 to 32768"),
            ("mask_ratio", self.mask_ratio, self.mask_ratio and all(0 < p < 1 for p in self.mask_ratio),
             "between 0 and 1, both excluded"),
            ("task", self.task, self.task in ("pcpt", "gen", "both"), "'pcpt', 'gen' or 'both'"),
            ("input_style", self.input_style, self.input_style in _STYLES, " or ".join(map(repr, _STYLES))),
            ("unexpressed_genes", self.unexpressed_genes, self.unexpressed_genes >= 0, "0 or more"),
            ("tie_rule", self.tie_rule, self.tie_rule in ("spread", "highest"), "'spread' or 'highest'"),
        ):
            if not good:
                raise ConfigError(f"wrong value of '{name}' = {value!r}", fix=f"it must be {what}")

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "CollateConfig":
        """How the cells of a release were prepared, from its args.json; what old files lack is upstream's default."""
        return cls(context_length=args.get("max_seq_len", 1200), n_bins=args.get("n_bins", 51),
                   pad_value=args.get("pad_value", -2), mask_value=args.get("mask_value", -1),
                   input_style={"normed_raw": "raw"}.get(style := args.get("input_style", "binned"), style))

    @property
    def cls_value(self) -> float:
        """The value of `<cls>`: upstream gives it that of padding."""
        return self.pad_value

    def with_unexpressed(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Genes of each cell with those of value 0 that join it, from its expressed ones, (cells,)."""
        if not self.unexpressed_genes:
            return lengths
        return np.maximum(lengths, np.minimum(lengths + self.unexpressed_genes, len(self.gene_ids)))

    def n_tokens(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each cell, `<cls>` included, from its expressed genes, (cells,)."""
        return np.minimum(self.with_unexpressed(lengths), self.context_length - 1) + 1


def collate(cells: RaggedBatch | CellViews, config: CollateConfig, *, cls_id: int, seed: int,
            epochs: NDArray[np.int64] | int, mask: bool = True) -> PackedBatch:
    """Sample, bin, mask and pack cells that satisfy the invariants of the format.

    Args:
        cells: `columns` holds `cell_id`, the key of every draw.
        config: what to do to them.
        cls_id: id of `<cls>`.
        seed: of the run, 0 or more.
        epochs: passes over the corpus before this one, of each cell, (cells,), or of all.
        mask: False hides nothing (embedding).

    Raises DataError when the batch has more tokens than int32 boundaries can name, where arrays break the layout of a
    RaggedBatch, and where a gene that stays in the sample of a view has an id outside the vocabulary; ConfigError where
    unexpressed genes are to be drawn from none.
    """
    cells = cells.views() if isinstance(cells, RaggedBatch) else cells
    cell_ids, expressed, lengths = cells.cell_ids, cells.lengths, config.n_tokens(cells.lengths)
    n_tokens = int(lengths.sum())
    if n_tokens > np.iinfo(np.int32).max:
        raise DataError(f"a batch of {len(cells)} cells has {n_tokens} tokens, more than int32 can count",
                        fix="make batch.micro_batch_size smaller")
    cu_seqlens = np.zeros(len(cells) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    packed = PackedBatch(np.empty(n_tokens, np.int32), np.empty(n_tokens, np.float32), np.empty(n_tokens, np.float32),
                         np.empty(n_tokens, np.bool_), cu_seqlens, int(lengths.max(initial=0)), cell_ids,
                         None if config.task == "pcpt" else np.empty(len(cells), np.int32))
    epoch_of = np.ascontiguousarray(np.broadcast_to(np.asarray(epochs, np.int64), cell_ids.shape))
    if config.unexpressed_genes:
        if not len(config.gene_ids):
            raise ConfigError("unexpressed genes are asked for, but not which genes there are",
                              where="CollateConfig.gene_ids", fix="give the ids of the vocabulary's genes")
        cells = add_unexpressed(cells, config.with_unexpressed(expressed), config.gene_ids, seed=seed,
                                epochs=epoch_of).views()
    longest = int(cells.lengths.max(initial=0))
    scratch = scratch_for(longest, config.n_bins)
    recipe = _Recipe(np.uint64(seed), int(cls_id), float(config.cls_value), float(config.mask_value),
                     np.array(config.mask_ratio if mask else (0.0,)), min(config.context_length - 1, longest),
                     config.task != "pcpt", _STYLES[config.input_style], config.tie_rule == "spread",
                     cells.expression_type != np.float32, probabilities(config.n_bins), np.uint32(cells.n_tokens - 1))
    like_genes, like_expressions = np.empty(0, cells.gene_type), np.empty(0, cells.expression_type)
    damaged = _collate_cells(cells.genes, cells.expressions, cells.lengths, like_genes, like_expressions,
                             sort_keys(like_expressions), expressed, cell_ids, epoch_of, recipe, scratch,
                             as_values(scratch.sorted_keys, cells.expression_type),
                             packed.gene_ids, packed.values, packed.targets, packed.target_mask, cu_seqlens,
                             np.empty(0, np.int32) if packed.perception_lengths is None else packed.perception_lengths)
    if damaged >= 0:
        raise cells.damaged(damaged)
    return packed


class _Recipe(NamedTuple):
    """CollateConfig and the call's own settings in the types of the compiled loop."""

    seed: np.uint64
    cls_id: int
    cls_value: float
    mask_value: float
    mask_ratios: NDArray[np.float64]   # (ratios,)
    n_wanted: int                      # genes a cell at most
    split: bool                        # into perception and generation
    style: int
    spread: bool
    integers: bool                     # expressions are integers
    at: NDArray[np.float64]            # (n_bins - 1,) probabilities of the edges
    last_id: np.uint32                 # of the vocabulary


def _compiled(sources: str) -> Callable[..., int]:
    """The loop over cells; `sources`: a digest of the files of its steps, see scgpt/collate/compiled.py."""

    @njit(cache=True, nogil=True)
    def collate_cells(genes_at: NDArray[np.uint64], expressions_at: NDArray[np.uint64], lengths: NDArray[np.int64],
                      like_genes: NDArray[np.unsignedinteger], like_expressions: NDArray[np.generic],
                      like_keys: NDArray[np.unsignedinteger], expressed: NDArray[np.int64],
                      cell_ids: NDArray[np.uint64], epochs: NDArray[np.int64], recipe: _Recipe, scratch: Scratch,
                      ordered: NDArray[np.generic], gene_ids: NDArray[np.int32], values: NDArray[np.float32],
                      targets: NDArray[np.float32], target_mask: NDArray[np.bool_],
                      cu_seqlens: NDArray[np.int32], perception_lengths: NDArray[np.int32]) -> int:
        """Fill `gene_ids`, `values`, `targets` and `target_mask`, (tokens,) each, and, where cells are split,
        `perception_lengths`, (cells,), from cells of `lengths` values at the addresses `genes_at` and `expressions_at`;
        arrays called `like_` tell types; `expressed`: (cells,) genes of each with a value above 0, its first ones;
        `ordered`: `scratch.sorted_keys` as values.

        Returns a cell that holds a gene id outside the vocabulary, -1 where none does.
        """
        _ = sources
        damaged = -1
        chosen, moved = np.empty(recipe.n_wanted + 1, np.int32), np.empty(recipe.n_wanted + 1, np.int32)
        limits, words = np.empty(BLOCK, np.uint64), np.empty(recipe.n_wanted, np.uint64)
        for cell in range(len(cell_ids)):
            epoch, cell_id = epochs[cell], cell_ids[cell]
            if cell + 1 < len(cell_ids):
                ask_for(expressions_at[cell + 1], _LINES)
                ask_for(genes_at[cell + 1], _LINES)
            n_values, first, stop = lengths[cell], cu_seqlens[cell], cu_seqlens[cell + 1]
            genes, expressions = (at(genes_at[cell], like_genes, n_values),
                                  at(expressions_at[cell], like_expressions, n_values))
            keys = at(expressions_at[cell], like_keys, n_values)
            ids, shown, bins = gene_ids[first + 1:stop], values[first + 1:stop], targets[first + 1:stop]
            gene_ids[first], targets[first], values[first] = recipe.cls_id, recipe.cls_value, recipe.cls_value
            target_mask[first] = False
            n_chosen = sample(stream(recipe.seed, epoch, cell_id, PURPOSE_SAMPLE), chosen, n_values, recipe.n_wanted,
                              limits)
            ratio = draw_ratio(recipe.seed, epoch, cell_id, recipe.mask_ratios)
            n_seen = n_chosen
            if recipe.split:
                n_seen = split(stream(recipe.seed, epoch, cell_id, PURPOSE_SPLIT), ratio, chosen, n_chosen, moved,
                               limits)
                perception_lengths[cell] = 1 + n_seen
            if n_chosen == n_values and not recipe.split:
                copy(genes, ids)
            else:
                take(genes, chosen, ids)
            if any_above(ids, recipe.last_id):
                damaged = cell
            of_values = words[:n_chosen]
            fill(stream(recipe.seed, epoch, cell_id, PURPOSE_VALUE), chosen, of_values)
            if recipe.style == _BINNED and expressed[cell] > 0:
                fill_edges(keys[:expressed[cell]], recipe.integers, ordered, recipe.at, scratch)
                table_end = fill_table(recipe.integers, scratch)
                find_bins(expressions, keys, chosen, n_chosen, table_end, scratch)
                draw_bins(scratch.spare, of_values, recipe.spread, bins)
            else:
                for t in range(n_chosen):
                    value = np.float64(expressions[chosen[t]])
                    bins[t] = np.log1p(value) if recipe.style == _LOG1P else value
            if recipe.split:
                for t in range(n_chosen):
                    shown[t] = bins[t] if t < n_seen else recipe.mask_value
                    target_mask[first + 1 + t] = t >= n_seen
            else:
                hide(of_values, ratio, recipe.mask_value, bins, shown, target_mask[first + 1:stop])
        return damaged

    return collate_cells


_collate_cells = _compiled(digest_of(rng, gather, sampling, binning, masking))
