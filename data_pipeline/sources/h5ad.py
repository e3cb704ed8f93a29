"""`.h5ad`: AnnData in an HDF5 file, on a disk or behind a URL, with any filter that h5py or hdf5plugin reads."""
import contextlib
from collections.abc import Callable
from typing import BinaryIO

import h5py

from data_pipeline.sources.anndata_files import AnnDataFile
from data_pipeline.sources.base import AUTO
from data_pipeline.sources.faults import RESTORE
from data_pipeline.sources.location import Location
from scgpt.errors import ScgptError, SourceError

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SIGNATURE_PLACES = (0, 512, 1024, 2048)   # a file may begin with a block of somebody else's


class H5ad(AnnDataFile):
    """An h5ad file."""

    container = "HDF5"

    @classmethod
    def open(cls, location: Location, *, name: str, layer: str = AUTO) -> "AnnDataFile":
        """Open a file and choose its matrix; see `open_source`."""
        file, close = open_hdf5(location, fix="give an .h5ad file")
        return cls.of_root(file, location, name=name, layer=layer, close=close)


def open_hdf5(location: Location, *, fix: str) -> tuple[h5py.File, Callable[[], None]]:
    """An HDF5 file, and what closes it. Raises SourceError, with `fix`, when it is none or is damaged."""
    import hdf5plugin  # noqa: F401  registers the filters (zstd, blosc, ...) that files may use

    if location.is_folder():
        raise SourceError("this is a folder, not an HDF5 file", where=str(location), fix=fix)
    stack = contextlib.ExitStack()
    try:
        stream = stack.enter_context(location.open())
        return stack.enter_context(h5py.File(stream if location.is_remote else location.path, "r")), stack.close
    except ScgptError:
        stack.close()
        raise
    except Exception as error:
        what = f"a damaged HDF5 file: {location.cause(error)}" if _is_hdf5(stream) else "not an HDF5 file"
        stack.close()
        raise SourceError(what, where=str(location), fix=f"{fix}; {RESTORE}") from error


def _is_hdf5(stream: BinaryIO) -> bool:
    for place in _SIGNATURE_PLACES:
        stream.seek(place)
        if stream.read(len(_SIGNATURE)) == _SIGNATURE:
            return True
    return False
