"""A collection as annbatch writes it: shuffled cells in AnnData groups `dataset_N` of a Zarr store, sharded."""
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr

from data_pipeline.sources import open_source
from scgpt.errors import SourceError
from tests.data_pipeline.atlases import build_here, cells_of, config_of, random_counts, write_h5ad
from tests.data_pipeline.sources.formats import gene_names

COUNTS = random_counts(1, 60, 40)


def write_collection(path: Path) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.attrs.update({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    order = np.random.default_rng(0).permutation(60)
    for number, rows in enumerate((order[:35], order[35:])):
        part = anndata.AnnData(COUNTS[rows].tocsr(), obs=pd.DataFrame({"row": rows}, index=[f"c{row}" for row in rows]),
                               var=pd.DataFrame(index=gene_names(40)))
        with anndata.settings.override(auto_shard_zarr_v3=True):
            anndata.io.write_elem(group, f"dataset_{number}", part)
    assert group["dataset_0/X/data"].shards is not None
    return path


def test_its_parts_are_sources_of_a_glob(tmp_path: Path) -> None:
    path = write_collection(tmp_path / "atlas.zarr")
    build_here(config_of(write_h5ad(tmp_path / "a.h5ad", COUNTS)), tmp_path / "expected")
    manifest = build_here(config_of({"path": str(path / "dataset_*")}), tmp_path / "found")
    assert [source.name for source in manifest.sources] == ["dataset_0", "dataset_1"]
    rows = {}
    for number in range(2):
        with open_source(path / f"dataset_{number}") as source:
            held = source.obs(["row"])["row"].to_pylist()
            rows |= {(f"dataset_{number}", place): row for place, row in enumerate(held)}
    expected = cells_of(tmp_path / "expected")
    assert {key: expected["a", row] for key, row in rows.items()} == cells_of(tmp_path / "found")


def test_the_collection_itself_names_its_parts(tmp_path: Path) -> None:
    path = write_collection(tmp_path / "atlas.zarr")
    with pytest.raises(SourceError, match=f"holds dataset_0, dataset_1.*give its parts: {path}/dataset_"):
        open_source(path)
