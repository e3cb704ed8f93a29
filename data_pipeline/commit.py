"""The end of a build: the books are compared with the plan and the shards, and the manifest is written, last."""
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline import ledger as books
from data_pipeline.build_dir import RUN, BuildDir, Record
from data_pipeline.cells import SPLITS
from data_pipeline.duplicates import DUPLICATE
from data_pipeline.ledger import Ledger
from data_pipeline.plan import Block, Plan, SourcePlan
from data_pipeline.quarantine import Quarantined
from data_pipeline.sources.identity import identity_of
from data_pipeline.stores import store_split
from scgpt import __version__, files
from scgpt.data import Manifest
from scgpt.data.manifest import (
    VOCAB,
    DuplicatesEntry,
    GeneSummary,
    QuarantinedEntry,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    VocabEntry,
)
from scgpt.errors import ConfigError, DataError, SourceError


@dataclass(frozen=True, slots=True)
class Results:
    """What the passes of a build have found."""

    identities: Sequence[Record]               # `sha256` or `etag` of each source of the plan; {}: it cannot be read
    blocks: Sequence[Block]                    # of the sources that could be read, in the order of the plan
    records: Sequence[Record]                  # the result of each of these blocks
    equals: Sequence[Record]                   # the equal cells of each part of all hashes
    shards: Mapping[str, Sequence[Record]]     # split -> the result of each shard, in order
    stores: Mapping[str, Sequence[Record]]     # split -> the result of each piece of its store; none in the Arrow form
    failed: Mapping[int, SourceError]          # place of a source in the plan -> why it is left out


def commit(build: BuildDir, plan: Plan, results: Results, *, timing: Mapping[str, Any]) -> Manifest:
    """Check the books, move the shards to their place, write vocab.json, run.json and, at last, manifest.json.

    Args:
        build: the claimed directory.
        plan: what was to be done.
        results: what was done.
        timing: what run.json shall tell; no checksum covers it.

    Raises DataError when the books do not agree or a donor or dataset is in two splits, SourceError when no cell was
    written.
    """
    ledgers = _by_source(plan, results)
    _check(plan, ledgers, results)
    groups = _groups(plan, results)
    splits = {name: _split_entry(plan, name, results, groups.get(name)) for name in SPLITS if name in results.shards}
    manifest = Manifest(
        created_by=f"scgpt-pretrain {__version__}", expression_kind=plan.config.cells.expression_kind,
        vocab=VocabEntry(name=plan.config.portable()["vocab"], sha256=plan.vocab.sha256, tokens=len(plan.vocab)),
        columns=list(plan.config.columns), splits=splits,
        sources=[_source_entry(plan.sources[place], results.identities[place], ledger, plan.config.columns)
                 for place, ledger in ledgers.items()],
        plan_sha256=plan.sha256, seed=plan.config.seed, config=dict(plan.config.portable()),
        duplicates=_duplicates(results, removed=plan.config.cells.remove_duplicates),
        quarantined=_quarantined(plan, results) or None)
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


def refuse_mended(plan: Plan, manifest: Manifest) -> None:
    """Raise ConfigError where a source that a complete corpus was built without is not what it was then.

    The plan hash covers the ends of a source only, and damage lies between them.
    """
    for entry in manifest.quarantined or []:
        source = next((source for source in plan.sources if source.name == entry.name), None)
        try:
            mended = source is not None and identity_of(source.path) not in ({"sha256": entry.sha256},
                                                                            {"etag": entry.etag})
        except SourceError:
            mended = False   # it cannot be read, still
        if mended:
            raise ConfigError(f"the source '{entry.name}' was left out of this corpus and is another now",
                              where=entry.file, fix="build with --fresh to have it in, or give another --out")


def _by_source(plan: Plan, results: Results) -> dict[int, Ledger]:
    """place of each source that was read -> its books, the duplicates that were left out among the filtered."""
    found = {place: Ledger() for place in range(len(plan.sources)) if place not in results.failed}
    for block, record in zip(results.blocks, results.records, strict=True):
        found[block.source].add(Ledger(**record["ledger"]))
    if plan.config.cells.remove_duplicates:
        for place, ledger in found.items():
            for record in results.equals:
                if plan.sources[place].name in record["sources"]:
                    ledger.leave_out(DUPLICATE, record["sources"][plan.sources[place].name])
    return found


def _check(plan: Plan, ledgers: Mapping[int, Ledger], results: Results) -> None:
    """What was planned = what was read = what is in the shards; per source."""
    written = [shard["sources"] for split in results.shards.values() for shard in split]
    exact = all(record["integer"] for record in results.records)   # else stored as float32
    for place, ledger in ledgers.items():
        source = plan.sources[place]
        where = str(source.path)
        books.check(ledger, where=where, exact=exact)
        books.same(source.n_cells, ledger.cells_in, what="cells", where=where)
        for what, expected in (("cells", sum(ledger.cells_written.values())), ("values", ledger.values_written),
                               ("sum", ledger.sum_written)):
            books.same(expected, sum(shard.get(source.name, {what: 0})[what] for shard in written), what=what,
                       where=where, exact=exact or what != "sum")
    if not any(sum(ledger.cells_written.values()) for ledger in ledgers.values()):
        reasons = books.total(ledgers.values()).filtered
        raise SourceError("no cell is left: " + ", ".join(f"{name} {cells:,}" for name, cells in reasons.items()),
                          where=", ".join(plan.sources[place].name for place in ledgers), fix="loosen `cells`")


def _groups(plan: Plan, results: Results) -> dict[str, list[str]]:
    """split -> its donors or datasets, sorted, where the corpus is split by them; none is in two splits."""
    split_of: dict[tuple[str | None, int], str] = {}   # cells without a group go by their source
    for block, record in zip(results.blocks, results.records, strict=True):
        for split, names in record["groups"].items():
            for name in names:
                other = split_of.setdefault((name, block.source if name is None else -1), split)
                if other != split:
                    raise DataError(f"the {plan.config.splits.by} '{name}' is in {other} and in {split}",
                                    where=plan.sources[block.source].name, fix="please report this: splits overlap")
    if plan.config.splits.by == "cell":
        return {}
    return {split: sorted(name for (name, _), of in split_of.items() if of == split and name is not None)
            for split in SPLITS}


def _duplicates(results: Results, *, removed: bool) -> DuplicatesEntry:
    compared, equal, across = (sum(record[what] for record in results.equals) for what in ("cells", "equal", "across"))
    books.same(sum(record["compared"] for record in results.records), compared, what="content hashes",
               where="all sources")
    return DuplicatesEntry(compared=compared, equal=equal, across_splits=across, removed=removed)


def _quarantined(plan: Plan, results: Results) -> list[QuarantinedEntry]:
    found = list(plan.quarantined)
    for place, error in sorted(results.failed.items()):
        source = plan.sources[place]
        found.append(Quarantined.of(error, source.path, source.name, cells=source.n_cells,
                                    **results.identities[place]))
    return [QuarantinedEntry(**asdict(source)) for source in found]


def _split_entry(plan: Plan, split: str, results: Results, groups: list[str] | None) -> SplitEntry:
    if split in results.stores:
        stored = store_split(split, results.shards[split], results.stores[split], plan.config.shards)
        return stored.model_copy(update={"groups": groups})
    entries = [ShardEntry.model_validate(shard["entry"]) for shard in results.shards[split]]
    return SplitEntry(cells=sum(entry.cells for entry in entries), tokens=sum(entry.tokens for entry in entries),
                      shards=entries, compression=plan.config.shards.codec, groups=groups)


def _source_entry(source: SourcePlan, identity: Mapping[str, str], ledger: Ledger,
                  columns: Sequence[str]) -> SourceEntry:
    genes = source.genes
    own = {name: source.obs.own_name[name] for name in columns if name in source.obs.own_name}
    return SourceEntry(
        name=source.name, file=source.path.name, bytes=source.bytes, **identity, cells_in=ledger.cells_in,
        cells_written=sum(ledger.cells_written.values()), filtered=dict(sorted(ledger.filtered.items())),
        values=ledger.values_written, expression_sum=ledger.sum_written, columns=own,
        genes=GeneSummary(style=genes.style, column=genes.column, n_genes=len(genes.tokens), n_mapped=genes.n_mapped,
                          overlap=genes.overlap, n_renamed=genes.renamed, n_merged=genes.n_merged,
                          unmapped=list(genes.unmapped), unmapped_sum=ledger.sum_unmapped))
