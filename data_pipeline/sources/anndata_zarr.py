"""AnnData in a Zarr store, version 2 or 3, sharded or not: a folder, a zipped folder, or a prefix behind a URL.

What a store's format calls consolidated metadata is not used: a copy may tell of arrays that are gone. A chunk that was
never written reads as zeros, as Zarr says; of a sparse matrix no chunk may be missing (AnnDataFile looks).
"""
import contextlib
from typing import Any

from data_pipeline.sources.anndata_files import AnnDataFile
from data_pipeline.sources.base import AUTO
from data_pipeline.sources.faults import RESTORE
from data_pipeline.sources.location import Location
from scgpt.errors import ScgptError, SourceError


class AnnDataZarr(AnnDataFile):
    """An AnnData Zarr store."""

    container = "Zarr"

    @classmethod
    def open(cls, location: Location, *, name: str, layer: str = AUTO) -> "AnnDataFile":
        """Open a store and choose its matrix; see `open_source`."""
        import zarr

        opened = contextlib.ExitStack()
        try:
            store, path = _store(location)
            opened.callback(store.close)
            root = zarr.open_group(store, path=path, mode="r", use_consolidated=False)
        except ScgptError:
            raise
        except Exception as error:
            opened.close()
            raise SourceError(f"not a Zarr group: {location.cause(error)}", where=str(location),
                              fix=f"give a folder that anndata has written with write_zarr; {RESTORE}") from error
        return cls.of_root(root, location, name=name, layer=layer, close=opened.close)


def _store(location: Location) -> tuple[Any, str]:
    """The store, and where the root group is in it: a zipped store may have a folder around it."""
    from zarr.storage import FsspecStore, LocalStore, ZipStore

    if location.is_remote and location.is_folder():
        return FsspecStore.from_url(location.url, read_only=True), ""
    if location.is_folder():
        return LocalStore(location.path, read_only=True), ""
    from zipfile import ZipFile

    with ZipFile(location.path) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    within = "" if len(tops) > 1 or not any("/" in name for name in names) else tops.pop()
    return ZipStore(location.path, mode="r"), within
