"""One changed byte of any file of a corpus or a release turns its verification red."""
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import cli

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[2]
# run.json (times) and report.* are what checksums leave out; the lock holds nothing.
NOT_COVERED = {"run.json", "report.html", "report.json", ".lock"}


def scgpt(*words: str) -> None:
    run = subprocess.run([sys.executable, "-m", "launch.cli", *words], cwd=ROOT, capture_output=True, text=True,
                         check=False, timeout=400)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tampering") / "corpus"
    scgpt("data", "build", "demo", "--out", str(folder))
    return folder


@pytest.fixture(scope="module")
def release(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tampering")
    scgpt("train", "demo", f"data.corpus={corpus}", "train.max_steps=4", "train.eval_every=4", "train.save_every=4",
          "--out", str(folder / "run"))
    scgpt("export", str(folder / "run"), "--out", str(folder / "release"))
    return folder / "release"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_COVERED)


def changes(path: Path) -> Iterator[str]:
    """Flip one bit of the first, the middle and the last byte; cut the last byte; add one; remove the file."""
    content = path.read_bytes()
    try:
        for place in sorted({0, len(content) // 2, len(content) - 1}):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
            yield f"bit 0 of byte {place} of {path.name} flipped"
        path.write_bytes(content[:-1])
        yield f"{path.name} without its last byte"
        path.write_bytes(content + b"\n")
        yield f"{path.name} with a byte more"
        path.unlink()
        yield f"{path.name} removed"
    finally:
        path.write_bytes(content)


def unnoticed(folder: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The changes after which the command stays green, or says more or less than one sentence."""
    assert cli.main([*command, str(folder)]) == 0
    missed = []
    capsys.readouterr()
    for path in files_of(folder):
        for change in changes(path):
            code, shown = cli.main([*command, str(folder)]), capsys.readouterr()
            if code != 1 or not shown.err.startswith("error: ") or shown.err.count("\n") != 1:
                missed.append(f"{change}: exit code {code}, {shown.err!r}")
    (folder / "unlisted.bin").write_bytes(b"1")
    if cli.main([*command, str(folder)]) != 1:
        missed.append("a file more")
    (folder / "unlisted.bin").unlink()
    assert cli.main([*command, str(folder)]) == 0
    return missed


def test_every_change_of_a_corpus_is_found(corpus: Path, capsys: pytest.CaptureFixture[str]):
    names = {str(path.relative_to(corpus)) for path in files_of(corpus)}
    assert {"manifest.json", "vocab.json", "train/part-00000.arrow", "train/part-00000.obs.parquet",
            "valid/part-00000.arrow"} <= names
    assert unnoticed(corpus, ["data", "verify"], capsys) == []


def test_every_change_of_a_release_is_found(release: Path, capsys: pytest.CaptureFixture[str]):
    names = {path.name for path in files_of(release)}
    assert {"model.safetensors", "best_model.pt", "args.json", "vocab.json", "config.json", "README.md",
            "SHA256SUMS"} <= names
    assert unnoticed(release, ["verify"], capsys) == []


def test_only_times_and_reports_are_left_out_of_a_corpus(corpus: Path):
    left_out = {path.name for path in corpus.rglob("*") if path.is_file()} - {path.name for path in files_of(corpus)}
    assert left_out <= NOT_COVERED
    json.loads((corpus / "run.json").read_bytes())
