"""What befalls a build from outside: sources that change, disks that refuse, kill -9 at the worst moments.

Each ends in one sentence or a dead process; the same command then makes the corpus of an uninterrupted build, byte for
byte, and nothing of ours is left: no process, no folder of Ray. On threads and on Ray alike.
"""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import h5py
import pytest
from scipy import sparse

from data_pipeline import plan
from data_pipeline.config import CorpusConfig
from data_pipeline.ray_folder import TEMPORARY
from scgpt.config import load_config
from tests.data_pipeline.atlases import ROOT, build_here, bytes_of, differing, random_counts, write_h5ad

pytestmark = [pytest.mark.slow, pytest.mark.system]   # a start of Ray is 14 s of CPU

BLOCK_VALUES = 4_000   # many tasks, so that there is time to meddle
# The command line, with small blocks. KILL_AT=before:MODULE:CLASS:METHOD (or after:) is where the process kills itself.
PROGRAM = f"""
import importlib, os, signal, sys
from data_pipeline import plan
from launch import cli
plan.BLOCK_VALUES = {BLOCK_VALUES}
if "KILL_AT" in os.environ:
    when, module, owner, method = os.environ.pop("KILL_AT").split(":")
    place = getattr(importlib.import_module(module), owner)
    original = getattr(place, method)
    def dying(*arguments, **options):
        if when == "after":
            original(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(place, method, dying)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Short, as Ray needs it, and of this test alone."""
    tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(prefix="c-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


class Build:
    """Two atlases, one of them stored by columns, and builds of them."""

    def __init__(self, folder: Path, temporary: Path, workers: str, undisturbed: dict[str, bytes]) -> None:
        self.folder, self.temporary, self.out = folder, temporary, folder / "corpus"
        self.atlases, self.config, self.undisturbed = *write_atlases(folder, workers), undisturbed

    def start(self, *, out: Path | None = None, kill_at: str = "") -> "subprocess.Popen[str]":
        words = ["data", "build", str(self.config), "--out", str(out or self.out)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"KILL_AT": kill_at} if kill_at else {})}
        return subprocess.Popen([sys.executable, "-c", PROGRAM, *words], cwd=ROOT, text=True, start_new_session=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)

    def fails(self, process: "subprocess.Popen[str]", code: int) -> str:
        """The one sentence that a build ends with; no corpus is there."""
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == code, stderr
        assert "Traceback" not in stderr
        assert not (self.out / "manifest.json").exists()
        assert not self.running()
        return stderr.splitlines()[-1]

    def completes(self) -> None:
        """The same command makes the corpus that one undisturbed process makes, and tidies up."""
        process = self.start()
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
        assert not differing(bytes_of(self.out), self.undisturbed)
        assert not self.running()
        assert not list(self.temporary.glob(f"{TEMPORARY}*"))

    def completes_here(self) -> None:
        """The same in this process, whose workers find what those of Ray have finished."""
        assert self.has(".build/records/block-*")
        build_without_ray(self.config, self.out)
        assert not differing(bytes_of(self.out), self.undisturbed)

    def running(self) -> list[str]:
        """Command lines of what Ray has started for builds of this test, once it had time to end."""
        mark, deadline = f"SCGPT_RAY_FOLDER={self.temporary}/".encode(), time.monotonic() + 60
        while (found := list(_with_environment(mark))) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def when(self, process: "subprocess.Popen[str]", moment: Callable[[], object]) -> None:
        """Return as soon as `moment` is true of a running build."""
        while not moment():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)

    def has(self, pattern: str) -> bool:
        return any(self.out.glob(pattern))


def write_atlases(folder: Path, workers: str) -> tuple[list[Path], Path]:
    """Two atlases, the same each time, and the configuration of their corpus."""
    atlases = [write_h5ad(folder / f"atlas{i}.h5ad", form(random_counts(i, 2500, 400, 0.1)))
               for i, form in enumerate((sparse.csr_matrix, sparse.csc_matrix))]
    config = folder / "corpus.yaml"
    config.write_text("sources: ['atlas*.h5ad']\ncells: {min_genes: 10}\nsplits: {valid: 0.2}\n"
                      f"shards: {{max_bytes: 512KiB}}\nworkers: {workers}\n")
    return atlases, config


def build_without_ray(config: Path, out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "BLOCK_VALUES", BLOCK_VALUES)
        build_here(load_config(CorpusConfig, str(config), kind="corpus"), out)


def _with_environment(mark: bytes) -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):   # of somebody else, or gone meanwhile
            if mark in (process / "environ").read_bytes():
                yield (process / "cmdline").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a build makes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    build_without_ray(write_atlases(folder, "threads")[1], folder / "corpus")
    return bytes_of(folder / "corpus")


@pytest.fixture(params=["threads", "ray"])
def build(tmp_path: Path, temporary: Path, undisturbed: dict[str, bytes], request: pytest.FixtureRequest) -> Build:
    return Build(tmp_path, temporary, request.param, undisturbed)


def test_a_source_that_is_cut_or_damaged_while_it_is_read(build: Build) -> None:
    atlas, whole = build.atlases[0], build.atlases[0].read_bytes()
    modified = atlas.stat().st_mtime_ns
    process = build.start()
    build.when(process, lambda: build.has(".build/records/block-*"))
    os.truncate(atlas, len(whole) // 2)
    told = build.fails(process, 1)
    assert "the source changed while the corpus was being built" in told
    assert "atlas0.h5ad" in told

    atlas.write_bytes(whole)
    os.utime(atlas, ns=(modified, modified))
    process = build.start()
    with h5py.File(atlas) as file:
        data = file["X/data"].id
        last = data.get_chunk_info(data.get_num_chunks() - 1)
    build.when(process, lambda: build.has(".build/records/block-*"))
    with atlas.open("r+b") as stream:   # as a failing disk does: no time of modification tells
        stream.seek(last.byte_offset + last.size // 2)
        stream.write(b"\xff" * 16)
    os.utime(atlas, ns=(modified, modified))
    told = build.fails(process, 1)
    assert "cannot be read" in told
    assert "atlas0.h5ad, X, rows" in told

    atlas.write_bytes(whole)
    os.utime(atlas, ns=(modified, modified))
    build.completes_here()


def test_a_source_that_changes_between_plan_and_read(build: Build) -> None:
    process = build.start()
    build.when(process, lambda: build.has(".build/plan.json"))
    write_h5ad(build.atlases[0], random_counts(7, 2400, 400, 0.1))
    told = build.fails(process, 1)
    assert "the source changed while the corpus was being built" in told
    assert "start the build again once nothing writes to it" in told
    shutil.rmtree(build.out)   # holds a plan of what the file was
    build_without_ray(build.config, build.folder / "undisturbed")
    build.undisturbed = bytes_of(build.folder / "undisturbed")
    build.completes()


def test_a_scheduler_s_sigterm_ends_a_build_that_goes_on(build: Build) -> None:
    process = build.start()
    build.when(process, lambda: build.has(".build/records/block-*"))
    process.terminate()
    assert build.fails(process, 75) == "interrupted: the same command continues"
    build.completes_here()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a read-only tmpfs")
def test_an_output_that_cannot_be_written_is_refused(build: Build) -> None:
    disk = build.folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk)], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        told = build.fails(build.start(out=disk / "corpus"), 2)
        assert told == (f"error: the directory cannot be used: Read-only file system ({disk / 'corpus'}); "
                        "give an --out that can be written")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_kill_9_while_a_source_is_cut_while_shards_are_merged_and_within_the_commit(build: Build) -> None:
    for pattern in (".build/cut/*", ".build/runs/block-*", ".build/train/*"):
        process = build.start()
        build.when(process, lambda pattern=pattern: build.has(pattern))
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert not build.has("manifest.json")
    for moment, committed in (("after:scgpt.vocab:GeneVocab:save_json", False),
                              ("before:scgpt.data:Manifest:write", False), ("after:scgpt.data:Manifest:write", True)):
        process = build.start(kill_at=moment)
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == -signal.SIGKILL, stderr
        assert build.has("manifest.json") == committed
        assert build.has(".build")
    build.completes()
