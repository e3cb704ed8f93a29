"""Which reader the tokens of a split need: mapped Arrow, Arrow batch by batch, or Zarr."""
from scgpt.data.arrow_format import map_shards
from scgpt.data.corpus_files import CorpusFiles
from scgpt.data.manifest import SplitEntry
from scgpt.data.shards import Shards


def open_shards(files: CorpusFiles, entry: SplitEntry) -> Shards:
    """Open the tokens of a split that holds cells.

    Raises DataError: a file is missing, has another size, or does not hold what the manifest says.
    """
    if entry.store is not None:
        from scgpt.data.zarr_format import ZarrShards

        return ZarrShards(files, entry)
    if files.folder is not None and entry.compression is None:
        return map_shards(files, entry.shards)
    from scgpt.data.record_batches import BatchShards

    return BatchShards(files, entry.shards)
