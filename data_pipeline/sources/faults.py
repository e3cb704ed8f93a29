"""Whatever a library raises about a damaged or odd source, as one sentence with the place."""
import contextlib
from collections.abc import Iterator

from data_pipeline.sources.location import Location
from scgpt.errors import ScgptError, SourceError

RESTORE = "restore or replace the file, or take it out of `sources`"


@contextlib.contextmanager
def reading(path: Location, what: str, *, fix: str = RESTORE) -> Iterator[None]:
    """Turn what a reader, a codec or a network raises while `what` of a source is read into a SourceError."""
    try:
        yield
    except ScgptError:
        raise
    except Exception as error:
        raise SourceError(f"cannot be read: {path.cause(error)}", where=f"{path}, {what}", fix=fix) from error
