"""What a worker does: hash a source, tokenise a block into a run, merge a shard. Each returns its small record.

Every function may be called again, at any time, by anybody: the files it publishes have the same bytes each time.
"""
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline import ledger as books
from data_pipeline.build_dir import BuildDir, Record
from data_pipeline.cells import KEPT, SPLITS, groups_in_splits, judge
from data_pipeline.config import CorpusConfig
from data_pipeline.duplicates import HashFile, find_equals, read_equals, summary, write_equals, write_hashes
from data_pipeline.plan import Block, SourcePlan, unchanged
from data_pipeline.shuffle import KEY, merge_runs, ordered_buckets, shuffle_keys, shuffled_buckets, write_run
from data_pipeline.sources.identity import identity_of
from data_pipeline.tokenization import tokenize_block
from scgpt import files
from scgpt.data.arrow_format import write_obs, write_shard
from scgpt.data.content import content_hashes
from scgpt.data.manifest import ObsEntry, ShardEntry
from scgpt.data.schema import CELL_ID, CONTENT_HASH, SOURCE, RaggedBatch, part_name


@dataclass(frozen=True, slots=True)
class Layout:
    """What all blocks of a plan need to know of the corpus."""

    build: BuildDir
    config: CorpusConfig
    n_values: int                 # stored values of all sources
    n_shards: tuple[int, ...]     # of each split, in the order of SPLITS


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One shard: its place in the corpus, and the parts of runs that it is made of."""

    split: str
    number: int                              # in the corpus: part-00000, ...
    parts: tuple[tuple[str, int, str], ...]  # (file of the run, record batch, source)
    bucket: int                              # its number in the plan
    equals: int                              # files that name cells to leave out


def hash_source(layout: Layout, number: int, source: SourcePlan) -> Record:
    """What the manifest knows a source by: `sha256` of the whole, or `etag` of what an object store keeps."""
    with unchanged(source):
        with source.open() as opened:
            opened.check_content()
        identity = identity_of(source.path)
    return layout.build.write_record(source_task(number), identity, [])


def cut_source(layout: Layout, number: int, source: SourcePlan, firsts: Sequence[int]) -> Record:
    """Cut a matrix that is stored by columns into the row blocks of the plan."""
    folder = cut_folder(layout.build, number)
    folder.parent.mkdir(exist_ok=True)
    with unchanged(source), files.publish(folder) as temporary, source.open() as opened:
        made = [folder / path.name for path in opened.cut_row_blocks(firsts, temporary)]
        files.remove(folder)   # of an attempt whose record is missing
    return layout.build.write_record(cut_task(number), {}, made)


def tokenize_to_run(layout: Layout, block: Block, source: SourcePlan, row_blocks: Path | None) -> Record:
    """Read a block (from `row_blocks`, where its source was cut), judge its cells, write those kept as a run."""
    config = layout.config
    with unchanged(source), source.open() as opened:
        if row_blocks is not None:
            opened.use_row_blocks(row_blocks)
        cells = tokenize_block(opened, source.genes, block.first, block.last,
                               counts=config.cells.expression_kind == "counts")
        passes = source.obs.passes(opened, block.first, block.last)
        splits = source.obs.splits(opened, config.splits, block.first, block.last)
        groups = source.obs.groups(opened, config.splits, block.first, block.last)
        metadata = source.obs.metadata(opened, config.columns, block.first, block.last)
        offsets = opened.value_offsets(block.first, block.last)
    reasons = judge(cells, passes, config.cells)
    ledger = books.of_block(cells, reasons, splits, where=f"{source.path}, rows {block.first} to {block.last}")
    n_shards = np.array(layout.n_shards)[splits]
    if config.shards.shuffle:
        keys = shuffle_keys(config.seed, cells.columns[CELL_ID].astype(np.uint64, copy=False))
        buckets = shuffled_buckets(keys, n_shards)
    else:
        keys = (np.uint64(block.source) << np.uint64(32)) + np.arange(block.first, block.last, dtype=np.uint64)
        buckets = ordered_buckets(block.values_before + offsets[:-1] - offsets[0], layout.n_values, n_shards)
    hashes = content_hashes(cells)
    cells.columns[KEY], cells.columns[CONTENT_HASH] = keys, hashes[0]
    kept = reasons == KEPT
    path, hashes_path = layout.build.runs / f"{block_task(block)}.arrow", hash_file(layout.build, block)
    with files.publish(path) as temporary:
        parts = write_run(temporary, cells, metadata, kept=kept, splits=splits, buckets=buckets)
    compared = np.flatnonzero(kept & (cells.lengths >= config.cells.duplicate_min_genes))
    with files.publish(hashes_path) as temporary:
        write_hashes(temporary, cells, compared, splits=splits, shards=buckets, sums=books.cell_sums(cells),
                     hashes=hashes)
    result = {"cells": block.last - block.first, "ledger": ledger.to_json(), "parts": [asdict(part) for part in parts],
              "integer": cells.expressions.dtype.kind == "u", "largest": float(cells.expressions.max(initial=0)),
              "compared": len(compared), "groups": {} if groups is None else groups_in_splits(groups, splits, kept)}
    return layout.build.write_record(block_task(block), result, [path, hashes_path])


def find_duplicates(layout: Layout, part: int, parts: int, hashes: Sequence[HashFile], names: Sequence[str]) -> Record:
    """Find the cells that equal an earlier one among a part of all hashes; `names` are those of the sources."""
    equals = find_equals(hashes, part, parts)
    path = equals_file(layout.build, part)
    with files.publish(path) as temporary:
        write_equals(temporary, equals)
    return layout.build.write_record(duplicates_task(part), summary(equals, names), [path])


def merge_to_shard(layout: Layout, task: ShardTask, expression_type: str) -> Record:
    """Gather a shard from its runs and write its two files."""
    runs = [(layout.build.runs / file, batch, source) for file, batch, source in task.parts]
    left_out = read_equals([equals_file(layout.build, part) for part in range(task.equals)], SPLITS.index(task.split),
                           task.bucket)
    cells, known = merge_runs(runs, np.dtype(expression_type), layout.config.columns, left_out)
    folder, shards = layout.build.shards(task.split), layout.config.shards
    tokens, obs = (folder / f"{part_name(task.number)}.{ending}" for ending in ("arrow", "obs.parquet"))
    if shards.form == "zarr":
        tokens = layout.build.merged / task.split / tokens.name
        tokens.parent.mkdir(parents=True, exist_ok=True)
    with files.publish(tokens) as temporary:
        batches = write_shard(temporary, cells, compression=shards.codec if shards.form == "arrow" else None)
    with files.publish(obs) as temporary:
        write_obs(temporary, known)
    entry = ShardEntry(
        file=f"{task.split}/{tokens.name}", cells=len(cells), tokens=len(cells.genes), bytes=tokens.stat().st_size,
        sha256=files.sha256(tokens), batches=batches,
        obs=ObsEntry(file=f"{task.split}/{obs.name}", bytes=obs.stat().st_size, sha256=files.sha256(obs)))
    result = {"entry": entry.model_dump(mode="json"), "sources": _sums(cells, known.column(SOURCE))}
    return layout.build.write_record(shard_task(task), result, [tokens, obs])


def source_task(number: int) -> str:
    """Name of the record of what a source is known by."""
    return f"source-{number:05d}"


def cut_folder(build: BuildDir, number: int) -> Path:
    """Where a source that is stored by columns is cut into row blocks."""
    return build.path / "cut" / source_task(number)


def cut_task(number: int) -> str:
    """Name of the record of a source that was cut into row blocks."""
    return f"cut-{number:05d}"


def block_task(block: Block) -> str:
    """Name of the record, and of the run, of a block."""
    return f"block-{block.number:07d}"


def hash_file(build: BuildDir, block: Block) -> Path:
    """What finds the cells of a block that equal others."""
    return build.runs / f"{block_task(block)}.hashes.arrow"


def duplicates_task(part: int) -> str:
    """Name of the record of the equal cells in a part of all hashes."""
    return f"duplicates-{part:05d}"


def equals_file(build: BuildDir, part: int) -> Path:
    """The equal cells that a part has found."""
    return build.runs / f"{duplicates_task(part)}.arrow"


def shard_task(task: ShardTask) -> str:
    """Name of the record of a shard."""
    return f"shard-{task.split}-{task.number:05d}"


def shard_tasks(sources: Sequence[SourcePlan], blocks: Sequence[Block], records: Sequence[Record],
                equals: Sequence[Record]) -> list[ShardTask]:
    """The shards to merge, in the order of the corpus; numbers leave out the shards that no cell is left for.

    Args:
        sources: of the plan.
        blocks, records: what was read, and the result of each block.
        equals: the results of `find_duplicates` whose cells are to be left out.
    """
    parts: dict[tuple[int, int], list[tuple[str, int, str]]] = {}
    cells: dict[tuple[int, int], int] = {}
    for block, record in zip(blocks, records, strict=True):
        for part in record["parts"]:
            shard = part["split"], part["bucket"]
            parts.setdefault(shard, []).append(
                (f"{block_task(block)}.arrow", part["batch"], sources[block.source].name))
            cells[shard] = cells.get(shard, 0) + part["cells"]
    for record in equals:
        for split, bucket, fewer in record["shards"]:
            cells[split, bucket] -= fewer
    tasks: list[ShardTask] = []
    for place, name in enumerate(SPLITS):
        filled = sorted(bucket for (split, bucket), left in cells.items() if split == place and left)
        tasks += [ShardTask(name, number, tuple(parts[place, bucket]), bucket, len(equals))
                  for number, bucket in enumerate(filled)]
    return tasks


def _sums(cells: RaggedBatch, sources: pa.ChunkedArray) -> dict[str, dict[str, float]]:
    """source -> cells, values and sum of values in a shard."""
    encoded = sources.combine_chunks()
    codes, names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
    sums = np.bincount(codes, weights=books.cell_sums(cells), minlength=len(names))
    values = np.bincount(codes, weights=cells.lengths, minlength=len(names))
    counts = np.bincount(codes, minlength=len(names))
    return {name: {"cells": int(counts[i]), "values": int(values[i]), "sum": float(sums[i])}
            for i, name in enumerate(names)}
