"""A plan and a corpus in words for people, and as plain values for programs."""
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from launch.inspection import describe_duplicates
from scgpt.counted import counted

if TYPE_CHECKING:
    from data_pipeline.estimate import Estimate
    from data_pipeline.plan import Plan
    from data_pipeline.vocabulary import BuiltVocab
    from pretrain.peek import Peek
    from scgpt.data.manifest import Manifest


def plan_summary(plan: "Plan", time: "Estimate | None") -> dict[str, Any]:
    """What `scgpt data plan --json` answers."""
    return {
        "plan_sha256": plan.sha256,
        "cells": plan.n_cells,
        "values": plan.n_values,
        "blocks": len(plan.blocks),
        "worker_bytes": plan.worker_bytes,
        "time": None if time is None else {**asdict(time), "wall_s": time.wall_s},
        "cells_limits": _limits(plan),
        "quarantined": [asdict(source) for source in plan.quarantined],
        "splits": {name: {"cells": split.cells, "values": split.values, "shards": split.n_shards,
                          "bytes": split.n_bytes}
                   for name, split in plan.splits.items()},
        "sources": [{"name": source.name, "file": str(source.path), "cells": source.n_cells,
                     "cells_passing": source.n_passing, "values": source.n_values,
                     "layer": source.layer, "genes": len(source.genes.tokens), "genes_mapped": source.genes.n_mapped,
                     "gene_column": source.genes.column, "gene_style": source.genes.style,
                     "filter": source.config.filter, "columns": dict(source.obs.own_name),
                     "remarks": list(source.remarks)}
                    for source in plan.sources],
    }


def describe_plan(plan: "Plan", time: "Estimate | None") -> str:
    """A line a source, then what would be written, and how long it would take."""
    width = max(len(source.name) for source in plan.sources)
    lines = [f"{source.name:{width}}  {counted(source.n_cells, 'cell'):>17}  "
             f"{counted(source.n_values, 'value'):>22} of {source.layer}  "
             f"{source.genes.n_mapped:,} of {counted(len(source.genes.tokens), 'gene')} in the vocabulary "
             f"({source.genes.style} in {source.genes.column})" + "".join(f"; {remark}" for remark in source.remarks)
             for source in plan.sources]
    lines += [f"{source.name} would be left out: {source.reason}" for source in plan.quarantined]
    lines += [f"of {source.name} the cells with {source.config.filter}" for source in plan.sources
              if source.config.filter is not None]
    lines += [f"of {source.name} no cell would be kept: none has {source.obs}" for source in plan.sources
              if not source.n_passing]
    lines.append("of all: " + ", ".join(f"{name} {value}" for name, value in _limits(plan).items()))
    splits = ", ".join(f"{name} at most {counted(split.cells, 'cell')} with {counted(split.values, 'value')} in "
                       f"{counted(split.n_shards, 'shard')}, {_size(split.n_bytes)}"
                       for name, split in plan.splits.items())
    total = (f"{counted(plan.n_cells, 'cell')} and {counted(plan.n_values, 'value')} in "
             f"{counted(len(plan.blocks), 'block')} of rows")
    return "\n".join([*lines, f"{total}; {plan.worker_bytes / 1e9:.1f} GB a worker", splits, _describe_time(time)])


def _describe_time(time: "Estimate | None") -> str:
    if time is None:
        return "time: not estimated, no source lets a few rows be read on their own"
    return (f"time: about {_duration(time.wall_s)} on the {counted(time.cores, 'core')} of this machine, "
            f"{_duration(time.core_s)} of one; judged by the first {counted(time.cells, 'cell')} of {time.source}, "
            "without starting Ray")


def _limits(plan: "Plan") -> dict[str, Any]:
    """What is asked of every cell, without the limits that are not set."""
    asked = plan.config.cells.model_dump(mode="json", exclude={"expression_kind", "duplicate_min_genes"})
    return {name: value for name, value in asked.items() if value not in (None, False)}


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{max(seconds, 1.0):,.0f} s"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 10**9 else f"{n_bytes / 1e6:,.1f} MB"


def corpus_summary(manifest: "Manifest") -> dict[str, Any]:
    """Cells in, kept and filtered by reason, cells and gene values a split."""
    filtered: dict[str, int] = {}
    for source in manifest.sources:
        for reason, cells in source.filtered.items():
            filtered[reason] = filtered.get(reason, 0) + cells
    return {
        "cells_in": sum(source.cells_in for source in manifest.sources),
        "cells_kept": sum(source.cells_written for source in manifest.sources),
        "filtered": filtered,
        "splits": {name: {"cells": split.cells, "tokens": split.tokens} for name, split in manifest.splits.items()},
        "duplicates": None if manifest.duplicates is None else manifest.duplicates.model_dump(),
        "quarantined": [source.model_dump() for source in manifest.quarantined or []],
    }


def describe_corpus(summary: dict[str, Any]) -> str:
    """The answer of `corpus_summary` as one sentence."""
    splits = ", ".join(f"{name} {counted(split['cells'], 'cell')} with {counted(split['tokens'], 'gene value')}"
                       for name, split in summary["splits"].items())
    return (f"{summary['cells_kept']:,} of {counted(summary['cells_in'], 'cell')} kept, filtered: "
            f"{describe_filtered(summary)}; {splits}" + _remarks(summary))


def _remarks(summary: dict[str, Any]) -> str:
    """Equal cells that were kept, and sources that were left out: a line each, nothing where there are none."""
    equal = summary.get("duplicates")
    lines = [describe_duplicates(equal)] if equal is not None and equal["equal"] and not equal["removed"] else []
    lines += [f"left out: {source['name']}: {source['reason']}" for source in summary.get("quarantined", [])]
    return "".join(f"\n{line}" for line in lines)


def describe_filtered(summary: dict[str, Any]) -> str:
    """Cells by the reason that they were left out for."""
    return ", ".join(f"{cells:,} {reason}" for reason, cells in summary["filtered"].items() if cells) or "none"


def describe_peek(found: "Peek") -> str:
    """A line a cell, then the digest of the step."""
    width = max(len(cell.source) for cell in found.cells)
    lines = [f"{cell.cell_id:>20}  {cell.source:{width}}  row {cell.row:>10,}  {cell.tokens:>5,} tokens  "
             f"{cell.masked:>5,} masked  {cell.sha256[:16]}" for cell in found.cells]
    return "\n".join([*lines, f"step {found.step}: {counted(len(found.cells), 'cell')}, sha256 {found.digest}"])


def vocab_summary(built: "BuiltVocab") -> dict[str, Any]:
    """What `scgpt vocab build --json` answers."""
    return {"tokens": len(built.vocab), "sha256": built.vocab.sha256, "species": built.species,
            "genes_left_out": built.n_rare,
            "sources": [{"name": source.name, "gene_column": source.column, "names": source.n_names,
                         "genes": len(source.tokens), "renamed": source.n_renamed} for source in built.sources]}


def describe_vocab(summary: dict[str, Any]) -> str:
    """The answer of `vocab_summary` as one sentence."""
    renamed = sum(source["renamed"] for source in summary["sources"])
    return (f"{summary['tokens']:,} tokens, special tokens included, from "
            f"{counted(len(summary['sources']), 'source')} ({summary['species']}); "
            f"{counted(renamed, 'name became a symbol', 'names became symbols')}, "
            f"{counted(summary['genes_left_out'], 'gene')} of too few sources left out")
