"""The guide to other species, typed as printed."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scgpt.vocab import GeneVocab
from tests.readme import blocks

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[2]


def test_every_block_of_the_guide_runs_as_printed(tmp_path: Path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "scgpt").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m launch.cli "$@"\n')
    (bin_dir / "scgpt").chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    page = blocks(ROOT / "docs" / "own-species.md")
    assert [block.language for block in page] == ["bash"] * 3
    script = "".join(block.code for block in page)
    run = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, text=True,
                         stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    mouse = tmp_path / "out" / "mouse"
    assert "13,913 of 13,913 genes in the vocabulary" in run.stdout
    assert json.loads((mouse / "corpus" / "report.json").read_text())["totals"]["cells_kept"] == 100
    vocab = GeneVocab.from_file(mouse / "vocab.json")
    for place in ("corpus", "release"):
        assert GeneVocab.from_file(mouse / place / "vocab.json").sha256 == vocab.sha256

    import anndata

    assert anndata.read_h5ad(mouse / "embedded.h5ad").obsm["X_scGPT"].shape[0] == 100
