import importlib
import os
from pathlib import Path

import pytest

from data_pipeline.sources import Location
from data_pipeline.sources.base import Source
from data_pipeline.sources.identity import fingerprint
from data_pipeline.sources.kinds import KINDS, kind_of, open_source
from scgpt.errors import ConfigError, SourceError


@pytest.mark.parametrize(("name", "kind"), [
    ("a.h5ad", "h5ad"), ("A.H5AD", "h5ad"), ("a.zarr", "zarr"), ("a.zarr.zip", "zarr"), ("a.h5", "10x_h5"),
    ("a.parquet", "lists"), ("a.scb", "scbank"), ("a.soma", "soma")])
def test_a_name_tells_the_kind(tmp_path: Path, name: str, kind: str) -> None:
    assert kind_of(Location.of(tmp_path / name)) == kind


@pytest.mark.parametrize(("held", "kind"), [
    ("zarr.json", "zarr"), (".zgroup", "zarr"), ("matrix.mtx.gz", "10x_mtx"), ("GSM1_matrix.mtx", "10x_mtx"),
    ("__tiledb_group.tdb", "soma"), ("gene_vocab.json", "scbank"), ("part-0.parquet", "lists")])
def test_what_a_folder_holds_tells_its_kind(tmp_path: Path, held: str, kind: str) -> None:
    (tmp_path / held).touch()
    assert kind_of(Location.of(tmp_path)) == kind


def test_a_folder_of_atlases_is_told_how_to_name_them(tmp_path: Path) -> None:
    (tmp_path / "a.h5ad").touch()
    with pytest.raises(SourceError, match=r"names no kind of atlas.*for all atlases in it: .*/\*\.h5ad"):
        kind_of(Location.of(tmp_path))
    with pytest.raises(SourceError, match="suffix '.txt' names no kind"):
        kind_of(Location.of(tmp_path / "a.txt"))


def test_what_no_reader_may_open_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.h5ad")   # opening it would wait for ever
    with pytest.raises(SourceError, match="neither a file nor a folder"):
        open_source(tmp_path / "a.h5ad")


def test_a_name_that_no_manifest_can_hold_is_refused(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.h5ad"))
    path.write_bytes(b"")
    for look in (open_source, lambda place: fingerprint(Location.of(place))):
        with pytest.raises(ConfigError, match="no UTF-8 text.*rename it") as caught:
            look(path)
        str(caught.value).encode()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_reader(kind: str) -> None:
    module, _, name = KINDS[kind].reader.partition(":")
    assert issubclass(getattr(importlib.import_module(f"data_pipeline.sources.{module}"), name), Source)
    assert KINDS[kind].suffixes or KINDS[kind].holds
