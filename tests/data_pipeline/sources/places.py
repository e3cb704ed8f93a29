"""Places on the disk and in fsspec's memory, written to alike."""
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_pipeline.sources import Location


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    """An empty folder, on the disk and in fsspec's memory."""
    if request.param == "local":
        yield Location.of(tmp_path)
        return
    system = fsspec.filesystem("memory")
    system.makedirs("/lake", exist_ok=True)
    yield Location.of("memory://lake")
    system.rm("/lake", recursive=True)


def put(place: Location, content: bytes) -> Location:
    if place.is_remote:
        fsspec.filesystem("memory").pipe(place.url, content)
    else:
        place.path.parent.mkdir(parents=True, exist_ok=True)
        place.path.write_bytes(content)
    return place


def take(place: Location) -> None:
    if place.is_remote:
        fsspec.filesystem("memory").rm(place.url)
    else:
        place.path.unlink()
