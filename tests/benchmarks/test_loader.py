import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import loader, loader_cold, loader_peers, loader_sides
from benchmarks.loader_corpus import arrays_of, corpus_of, h5ad_of, real_cells
from benchmarks.loader_public import PublicCollator
from benchmarks.loader_stages import STAGES
from scgpt.collate import CollateConfig, collate

ROOT = Path(__file__).parents[2]
N_CELLS = 512   # one global batch


def test_the_public_method_does_the_work_that_ours_does():
    """Equal lengths, equal mean bins (ties are drawn, 3 % apart would be 20 sigma), equal shares hidden."""
    torch = pytest.importorskip("torch")
    cells, config = real_cells().take(np.arange(300)), CollateConfig(600)
    examples = [{"genes": torch.from_numpy(np.insert(cells.genes[span].astype(np.int64), 0, loader_sides.CLS_ID)),
                 "expressions": torch.from_numpy(np.insert(cells.expressions[span].astype(np.float32), 0, -2))}
                for span in map(slice, cells.offsets[:-1], cells.offsets[1:])]
    torch.manual_seed(0)
    public = {key: rows.numpy() for key, rows in PublicCollator(loader_sides.PAD_ID, 600)(examples).items()}
    packed = collate(cells, config, cls_id=loader_sides.CLS_ID, seed=0, epochs=0)
    padded = packed.padded(loader_sides.PAD_ID, config.pad_value)
    assert public["gene"].shape == padded["gene"].shape
    np.testing.assert_array_equal((public["gene"] != loader_sides.PAD_ID).sum(1), np.diff(packed.cu_seqlens))
    bins = [side["expr"][side["expr"] > 0].mean() for side in (public, padded)]
    assert bins[0] == pytest.approx(bins[1], rel=0.03)
    hidden = [(side["masked_expr"] == config.mask_value).sum() for side in (public, padded)]
    assert hidden[0] == pytest.approx(hidden[1], rel=0.02)


def test_every_form_holds_the_same_cells(tmp_path):
    import anndata

    corpus = corpus_of(tmp_path, 100)
    found = corpus.fetch(np.arange(100))
    matrix = anndata.read_h5ad(h5ad_of(tmp_path, 100)).X
    genes, expressions, offsets = (np.load(arrays_of(tmp_path, 100) / f"{name}.npy")
                                   for name in ("genes", "expressions", "offsets"))
    for other in ((genes, expressions, offsets), (matrix.indices, matrix.data, matrix.indptr)):
        for mine, its in zip((found.genes, found.expressions, found.offsets), other, strict=True):
            np.testing.assert_array_equal(mine, its)
    corpus.verify()


def test_a_form_that_was_not_finished_is_not_taken_as_one(tmp_path):
    with pytest.raises(RuntimeError, match="killed"), loader_peers.made(tmp_path / "form-100") as temporary:
        temporary.mkdir()
        raise RuntimeError("killed")
    assert not (tmp_path / "form-100").exists()
    with loader_peers.made(tmp_path / "form-100") as temporary:
        temporary.mkdir()
    assert (tmp_path / "form-100").is_dir()


def test_no_cgroup_is_left_whatever_happens():
    with pytest.raises(KeyError), loader_cold.memory_limit(1 << 30) as group:
        if group is None:
            pytest.skip("no memory cgroup can be made here")
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                                 preexec_fn=lambda: loader_cold.join(group))
        assert str(child.pid) in (group / "cgroup.procs").read_text().split()
        raise KeyError
    assert not group.exists()
    assert child.wait(timeout=10) != 0


def test_a_peer_that_does_not_end_is_told_as_missing_with_all_that_it_started(tmp_path):
    code = (f"import pathlib, subprocess, sys, time; sleeper = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
            f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(subprocess.Popen(sleeper).pid)); time.sleep(60)")
    entries = [loader.Entry("peers", "slafdb", "", 1, None, [sys.executable, "-c", code])]
    assert loader.measure(entries, 1, 2, limit_s=3) == {"slafdb": "it fails: not done within 3 s"}
    assert entries[0].runs == []
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_side_of_ours_that_fails_ends_the_benchmark():
    with pytest.raises(RuntimeError, match="no such side"):
        loader.measure([loader.Entry("warm", "loader", "", 1, None, [sys.executable, "-c", "exit('no such side')"])],
                       1, 1)


@pytest.mark.slow
def test_every_side_reads_the_same_cells_and_tells_its_figures(tmp_path):
    """The whole program, with the peers that this interpreter holds."""
    command = [sys.executable, str(ROOT / "benchmarks" / "loader.py"), "--cells", str(N_CELLS), "--peer-cells",
               str(N_CELLS), "--contexts", "8192", "--cores", "1", "--rounds", "1", "--seconds", "0.05",
               "--stage-steps", "1", "--folder", str(tmp_path), "--check", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    cells = corpus_of(tmp_path, N_CELLS).fetch(np.arange(N_CELLS))
    expected = {"cells": N_CELLS, "genes": len(cells.genes), "gene_ids": int(cells.genes.sum(dtype=np.int64))}
    counts = int(cells.expressions.sum(dtype=np.int64))
    for side, seen in told["seen"].items():   # at this context no gene is left out
        assert {name: seen[name] for name in expected} == expected, side
        assert seen["counts"] in (counts, None), side
    assert {side for side in told["seen"] if side.startswith("warm")} == {
        "warm public collator", "warm loader", "warm loader 1 worker", "warm fetch"}
    installed = set(loader_peers.PEERS) - set(told["missing"])
    assert {side for side in told["seen"] if side.startswith("peers")} == {f"peers {side}" for side in
                                                                           {"fetch", *installed}}
    assert all("pip install" in reason for reason in told["missing"].values())
    for entry in told["entries"]:
        run, = entry["runs"]
        assert run["cells"] > 0
        assert run["seconds"] >= 0.05
        assert run["cpu_s"] >= 0
    assert {entry["side"] for entry in told["entries"] if entry["part"] == "cold"} == {"fetch"}   # of one core
    assert told["cold"]["corpus_bytes"] > 4 * len(cells.genes)
    stages = told["stages"]["8192"]
    assert set(stages["ns"]) == set(STAGES)
    assert stages["tokens"] == pytest.approx(stages["values"] + 1)
    assert stages["copy_bytes_per_s"] > 1e6
