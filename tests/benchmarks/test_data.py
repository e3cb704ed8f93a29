import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.data import from_generator, scbank, without_ray, write_cells
from tests.data_pipeline.atlases import cells_of

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "data.py"


def told_by(*options: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, str(BENCHMARK), *options, "--json"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(BENCHMARK.parents[1])}, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_all_sides_write_the_same_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tools' ways keep is what the pipeline keeps of genes whose names are in the vocabulary as such."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "cells.h5ad"
    write_cells(file, 50)
    for side, run in (("ours", without_ray), ("scbank", scbank), ("generator", from_generator)):
        if side != "ours":
            (tmp_path / side).mkdir()
        run(file, tmp_path / side, 1)
    others = {"scbank": (0, pq.read_table(tmp_path / "scbank" / "X.datatable.parquet").to_pylist()),
              "generator": (1, datasets.load_from_disk(str(tmp_path / "generator")).to_list())}   # `<cls>` comes first
    ours = cells_of(tmp_path / "ours")
    assert len(ours) == 50
    for first, cells in others.values():
        assert len(cells) == 50
        for cell in cells:
            kept = ours["cells", cell["id"]]
            found = dict(zip(cell["genes"][first:], cell["expressions"][first:], strict=True))
            assert len(found) > 0.85 * len(kept)
            assert all(kept[gene] >= value for gene, value in found.items())
    assert np.mean([len(cell) for cell in ours.values()]) > 1_000


@pytest.mark.slow
def test_the_benchmark_runs_and_tells_its_figures() -> None:
    told = told_by("--cells", "300", "--rounds", "1", "--cores", "1", "--sides", "decompress,without-ray,scbank")
    for runs in told["runs"]["1"].values():
        assert runs[0]["seconds"] > 0
        assert runs[0]["peak_bytes"] > 1 << 20
    assert told["runs"]["1"]["without-ray"][0]["written_bytes"] > 300 * 1_500


@pytest.mark.slow
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_no_worker_takes_more_memory_than_the_plan_says(form: str) -> None:
    row, = told_by("--memory", form, "--cells", "60000")["memory"]
    assert 100 << 20 < row["worker_bytes"] <= row["promised_bytes"]
