import json
from pathlib import Path

import pytest

from scgpt.data import Manifest
from scgpt.errors import DataError

from .cells import random_cells, write_corpus


def test_a_manifest_reads_back_equal_and_writes_the_same_bytes(tmp_path: Path):
    manifest = write_corpus(tmp_path, {"train": [random_cells([3, 4])]})
    assert Manifest.read(tmp_path) == manifest
    assert (tmp_path / "manifest.json").read_bytes() == manifest.to_bytes()
    assert json.loads(manifest.to_bytes())["sha256"] == manifest.sha256


@pytest.mark.parametrize("change", [
    lambda text: text.replace(b'"cells": 2', b'"cells": 3', 1),
    lambda text: text + b"\n",
    lambda text: text.replace(b": ", b":  ", 1),
    lambda text: b"{}",
    lambda text: b"[]",
    lambda text: b"\xff",
])
def test_a_changed_manifest_is_refused(tmp_path: Path, change):
    write_corpus(tmp_path, {"train": [random_cells([3, 4])]})
    path = tmp_path / "manifest.json"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match="was changed after it was written"):
        Manifest.read(tmp_path)


def test_what_is_not_needed_is_absent_as_in_the_manifests_of_older_packages(tmp_path: Path):
    manifest = write_corpus(tmp_path, {"train": [random_cells([3, 4])]})
    split = json.loads((tmp_path / "manifest.json").read_bytes())["splits"]["train"]
    assert list(split) == ["cells", "tokens", "shards"]
    assert list(split["shards"][0]) == ["file", "cells", "tokens", "bytes", "sha256", "batches", "obs"]
    packed = manifest.splits["train"].model_copy(update={"compression": "lz4"})
    assert packed.model_dump(mode="json")["compression"] == "lz4"


def test_a_newer_format_is_told_from_a_damaged_one(tmp_path: Path):
    write_corpus(tmp_path, {"train": [random_cells([3, 4])]})
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"format_version": 1', b'"format_version": 2'))
    with pytest.raises(DataError, match="format version 2, this package reads up to 1"):
        Manifest.read(tmp_path)
