"""A corpus in another form or compression: the same cells, ids, order and ledger, in other token files.

The metadata files are copied byte for byte, and they carry the borders of the Arrow shards along, so a corpus that is
converted to Zarr and back has the bytes that it had. The source may lie behind a URL; the result is a folder.
"""
import hashlib
import os
from pathlib import Path
from typing import Literal

import numpy as np

from scgpt import files
from scgpt.config import Config
from scgpt.data import arrow_format, zarr_format
from scgpt.data.corpus_files import CorpusFiles
from scgpt.data.ipc_message import Codec
from scgpt.data.manifest import VOCAB, Manifest, ObsEntry, PartEntry, ShardEntry, SplitEntry, StoreEntry
from scgpt.data.open_shards import open_shards
from scgpt.data.schema import offsets_of, part_name
from scgpt.data.shards import CellRange, Shards, part_bounds
from scgpt.data.verify import verify_corpus
from scgpt.errors import ConfigError, DataError

MAX_BYTES = 512 << 20   # of a Zarr shard, where the configuration of the corpus does not say


class ConvertConfig(Config):
    """What to make of a corpus."""

    form: Literal["arrow", "zarr"] | None = None        # null: that of the corpus
    compression: Literal["none", "zstd", "lz4"] = "none"   # for cold storage: such a corpus cannot be mapped


def convert(corpus: Path | str, out: Path, config: ConvertConfig) -> Manifest:
    """Write the corpus at a path or URL into the new folder `out`, which is whole or absent.

    Memory: one Arrow shard, or three times a Zarr shard. Raises DataError when the source is damaged (all of it is
    checked first), ConfigError when `out` exists.
    """
    if out.exists():
        raise ConfigError("the directory exists already", where=str(out), fix="give a new --out")
    files.remove_abandoned(out)
    source = CorpusFiles(corpus)
    manifest = verify_corpus(corpus)
    try:
        with files.publish(out) as temporary:
            return _write(source, manifest, temporary, config)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(f"the corpus cannot be written: {reason}", where=str(out),
                        fix="give an --out that can be written, or make room: nothing was left") from error


def _write(source: CorpusFiles, manifest: Manifest, out: Path, config: ConvertConfig) -> Manifest:
    out.mkdir(parents=True)
    (out / VOCAB).write_bytes(source.read(VOCAB))
    splits = {name: _convert_split(source, name, entry, out, config, manifest)
              for name, entry in manifest.splits.items()}
    shards = {**manifest.config.get("shards", {}), "compression": config.compression,
              "form": config.form or next(iter(manifest.splits.values())).form}
    made = manifest.model_copy(update={"splits": splits, "config": {**manifest.config, "shards": shards}})
    made.write(out)
    return made


def _convert_split(source: CorpusFiles, name: str, entry: SplitEntry, out: Path, config: ConvertConfig,
                   manifest: Manifest) -> SplitEntry:
    compression: Codec | None = None if config.compression == "none" else config.compression
    obs = [_copy(source, part.obs, out) for part in entry.parts]
    made = entry.model_copy(update={"shards": [], "store": None, "compression": compression})   # all else stays
    if not entry.cells:
        return made
    shards = open_shards(source, entry)
    if (config.form or entry.form) == "arrow":
        bounds = part_bounds([part.cells for part in entry.parts])
        return made.model_copy(update={"shards": [
            _write_arrow(shards, bounds[number], f"{name}/{part_name(number)}.arrow", known, out, compression)
            for number, known in enumerate(obs)]})
    parts = [PartEntry(cells=part.cells, tokens=part.tokens, obs=known)
             for part, known in zip(entry.parts, obs, strict=True)]
    max_bytes = int(manifest.config.get("shards", {}).get("max_bytes", MAX_BYTES))
    some = shards.fetch(np.zeros(1, np.int64))
    layout = zarr_format.StoreLayout(entry.cells, entry.tokens, some.genes.dtype, some.expressions.dtype, compression,
                                     max_bytes)
    return made.model_copy(update={"store": _write_zarr(shards, layout, f"{name}.zarr", parts, out)})


def _copy(source: CorpusFiles, obs: ObsEntry, out: Path) -> ObsEntry:
    """Copy a metadata file; it is held against the manifest once more on its way."""
    content = source.read(obs.file)
    if hashlib.sha256(content).hexdigest() != obs.sha256:
        raise DataError("the file changed while it was being converted", where=source.where(obs.file),
                        fix="start again once nothing writes to it")
    (out / obs.file).parent.mkdir(exist_ok=True)
    (out / obs.file).write_bytes(content)
    return obs


def _write_arrow(shards: Shards, bounds: tuple[int, int], name: str, obs: ObsEntry, out: Path,
                 compression: Codec | None) -> ShardEntry:
    cells = shards.fetch(np.arange(*bounds))
    path = out / name
    batches = arrow_format.write_shard(path, cells, compression=compression)
    return ShardEntry(file=name, cells=len(cells), tokens=len(cells.genes), bytes=path.stat().st_size,
                      sha256=files.sha256(path), batches=batches, obs=obs)


def _write_zarr(shards: Shards, layout: zarr_format.StoreLayout, store: str, parts: list[PartEntry],
                out: Path) -> StoreEntry:
    zarr_format.write_metadata(out / store, layout)
    cells, values = [part.cells for part in parts], [part.tokens for part in parts]
    first_cells, first_values = offsets_of(np.array(cells)).tolist(), offsets_of(np.array(values)).tolist()
    for array in layout.arrays:
        for number in range(layout.n_shards(array)):
            held = layout.parts(array, number, cells, values)
            first, last = first_cells[held.start], first_cells[held.stop]
            span = zarr_format.Span(CellRange(shards, first), last - first, first, first_values[held.start])
            zarr_format.write_shard(out / store, layout, array, number, span)
    return StoreEntry(path=store, files=zarr_format.store_files(out, store), parts=parts)
