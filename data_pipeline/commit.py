"""The end of a build: the books are compared with the plan and the shards, and the manifest is written, last."""
import time
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline import ledger as books
from data_pipeline.build_dir import RUN, BuildDir, Record
from data_pipeline.cells import SPLITS
from data_pipeline.ledger import Ledger
from data_pipeline.plan import Plan, SourcePlan
from data_pipeline.stores import store_split
from scgpt import __version__, files
from scgpt.data import Manifest
from scgpt.data.manifest import VOCAB, GeneSummary, ShardEntry, SourceEntry, SplitEntry, VocabEntry
from scgpt.errors import SourceError


def commit(build: BuildDir, plan: Plan, *, hashes: Sequence[str], blocks: Sequence[Record],
           shards: Mapping[str, Sequence[Record]], stores: Mapping[str, Sequence[Record]],
           timing: Mapping[str, Any]) -> Manifest:
    """Check the books, move the shards to their place, write vocab.json, run.json and, at last, manifest.json.

    Args:
        build: the claimed directory.
        plan: what was to be done.
        hashes: sha256 of each source file, in the order of the plan.
        blocks: the result of each block, in the order of the plan.
        shards: split -> the result of each shard, in order.
        stores: split -> the result of each piece of its store; nothing in the Arrow form.
        timing: what run.json shall tell; no checksum covers it.

    Raises DataError when the books do not agree, SourceError when no cell was written.
    """
    ledgers = _by_source(plan, blocks)
    _check(plan, ledgers, shards)
    splits = {name: _split_entry(plan, name, shards[name], stores) for name in SPLITS if name in shards}
    manifest = Manifest(
        created_by=f"scgpt-pretrain {__version__}", expression_kind=plan.config.cells.expression_kind,
        vocab=VocabEntry(name=plan.config.portable()["vocab"], sha256=plan.vocab.sha256, tokens=len(plan.vocab)),
        columns=list(plan.config.columns), splits=splits,
        sources=[_source_entry(source, digest, ledger)
                 for source, digest, ledger in zip(plan.sources, hashes, ledgers, strict=True)],
        plan_sha256=plan.sha256, seed=plan.config.seed, config=dict(plan.config.portable()))
    plan.vocab.save_json(build.out / VOCAB)
    files.write_json(build.out / RUN, {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **timing})
    build.remove_temporaries()   # of attempts that were killed: what is moved holds nothing else
    for split in splits:
        for name in (split, f"{split}.zarr"):
            if (build.path / name).is_dir():
                (build.path / name).rename(build.out / name)
    files.fsync_path(build.out)
    manifest.write(build.out)
    files.remove(build.path)
    return manifest


def _by_source(plan: Plan, blocks: Sequence[Record]) -> list[Ledger]:
    found: list[list[Ledger]] = [[] for _ in plan.sources]
    for block, record in zip(plan.blocks, blocks, strict=True):
        found[block.source].append(Ledger(**record["ledger"]))
    return [books.total(ledgers) for ledgers in found]


def _check(plan: Plan, ledgers: Sequence[Ledger], shards: Mapping[str, Sequence[Record]]) -> None:
    """What was planned = what was read = what is in the shards; per source."""
    written = [shard["sources"] for split in shards.values() for shard in split]
    for source, ledger in zip(plan.sources, ledgers, strict=True):
        where = str(source.path)
        books.check(ledger, where=where)
        books.same(source.n_cells, ledger.cells_in, what="cells", where=where)
        for what, expected in (("cells", sum(ledger.cells_written.values())), ("values", ledger.values_written),
                               ("sum", ledger.sum_written)):
            books.same(expected, sum(shard.get(source.name, {what: 0})[what] for shard in written), what=what,
                       where=where)
    if not any(sum(ledger.cells_written.values()) for ledger in ledgers):
        reasons = books.total(ledgers).filtered
        raise SourceError("no cell is left: " + ", ".join(f"{name} {cells:,}" for name, cells in reasons.items()),
                          where=", ".join(source.name for source in plan.sources), fix="loosen `cells`")


def _split_entry(plan: Plan, split: str, shards: Sequence[Record],
                 stores: Mapping[str, Sequence[Record]]) -> SplitEntry:
    if split in stores:
        return store_split(split, shards, stores[split], plan.config.shards)
    entries = [ShardEntry.model_validate(shard["entry"]) for shard in shards]
    return SplitEntry(cells=sum(entry.cells for entry in entries), tokens=sum(entry.tokens for entry in entries),
                      shards=entries, compression=plan.config.shards.codec)


def _source_entry(source: SourcePlan, digest: str, ledger: Ledger) -> SourceEntry:
    genes = source.genes
    return SourceEntry(
        name=source.name, file=source.path.name, bytes=source.bytes, sha256=digest, cells_in=ledger.cells_in,
        cells_written=sum(ledger.cells_written.values()), filtered=dict(sorted(ledger.filtered.items())),
        values=ledger.values_written, expression_sum=ledger.sum_written,
        genes=GeneSummary(style=genes.style, column=genes.column, n_genes=len(genes.tokens), n_mapped=genes.n_mapped,
                          overlap=genes.overlap, n_renamed=genes.renamed, n_merged=genes.n_merged,
                          unmapped=list(genes.unmapped), unmapped_sum=ledger.sum_unmapped))
