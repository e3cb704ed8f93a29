import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.data import Case, Run, beyond_start, table, table_beyond_start
from benchmarks.data_sides import from_generator, pipeline, scbank, write_cells
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
    for side, run in (("ours", pipeline), ("scbank", scbank), ("generator", from_generator)):
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
    told = told_by("--cells", "300,600", "--rounds", "1", "--cores", "1", "--sides", "decompress,pipeline,scdl",
                   "--compression", "gzip,lzf,none", "--python", "scdl=/bin/false")
    assert len(told["runs"]) == 2 * 2 * 3
    assert set(told["missing"]) == {"scdl"}
    sizes = [told["file_bytes"][f"{name} 600"] for name in ("gzip", "lzf", "none")]
    assert sizes == sorted(sizes)
    for run in told["runs"]:
        assert run["seconds"] > 0
        assert run["peak_bytes"] > 1 << 20
        assert (run["written_bytes"] > run["cells"] * 1_500) == (run["side"] == "pipeline")


def test_two_sizes_tell_the_start_from_what_a_cell_costs() -> None:
    def runs(cpu_s: float) -> list[Run]:
        return [Run(2 * seconds, seconds, 1 << 20, 0, 800, "") for seconds in (cpu_s, cpu_s + 100, cpu_s - 0.5)]

    results = {Case("gzip", 1, side, cells): runs(start + cell * cells) for cells in (100, 1000)
               for side, start, cell in (("decompress", 1.0, 0.01), ("pipeline", 3.0, 0.02))}
    found = beyond_start(results)
    assert found["gzip", 1, "pipeline"] == pytest.approx((3.0, 0.02))
    assert table_beyond_start(results)[-1] == "| gzip | 1 | pipeline | 3.0 | 20,000 | 2.0 x |"
    assert table(results)[-1] == (
        "| gzip | 1 | pipeline | 1,000 | 22 | 46.0 (45.0 to 246.0) | 23.0 | 2.1 x | 1 MiB | 1 |")
    assert beyond_start({case: found for case, found in results.items() if case.cells == 100}) == {}
    assert table_beyond_start({}) == []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_no_worker_takes_more_memory_than_the_plan_says(form: str) -> None:
    row, = told_by("--memory", form, "--cells", "60000")["memory"]
    assert 100 << 20 < row["worker_bytes"] <= row["promised_bytes"]
