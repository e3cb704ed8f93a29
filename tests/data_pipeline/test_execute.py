"""Builds on threads and on a real Ray. A small build of each serves the fast tests; crashes and signals are `slow`."""
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import execute
from data_pipeline.build_dir import BuildDir
from data_pipeline.config import CorpusConfig
from data_pipeline.estimate import estimate
from data_pipeline.execute import BuildResult, build
from data_pipeline.plan import make_plan
from data_pipeline.progress import Progress
from data_pipeline.ray_folder import TEMPORARY
from scgpt.config import load_config
from scgpt.data import Manifest, TokenDataset, verify_corpus
from scgpt.errors import ConfigError, DataError, SourceError
from tests.data_pipeline.atlases import ROOT, build_here, bytes_of, cells_of, config_of, random_counts, write_h5ad

WORKERS = ("threads", "ray")
both = pytest.mark.parametrize("workers", WORKERS)

# A driver of its own: small blocks and shards, so that there are many tasks; prints when it is done.
DRIVER = """
import os, sys
from pathlib import Path
from data_pipeline import plan
from data_pipeline.config import CorpusConfig
from data_pipeline.execute import build
from scgpt.config import validate
plan.BLOCK_VALUES = 20_000
build(validate(CorpusConfig, {"sources": sys.argv[2:], "cells": {"min_genes": 10}, "splits": {"valid": 0.2},
                              "shards": {"max_bytes": "512KiB"}, "workers": os.environ["WORKERS"]}), Path(sys.argv[1]))
print("complete")
"""


@pytest.fixture(scope="module", params=WORKERS)
def demo(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest,
         ) -> Iterator[tuple[Path, BuildResult]]:
    out = tmp_path_factory.mktemp("ray") / "corpus"
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.chdir(out.parent)   # a relative directory must mean the same to every worker
        config = load_config(CorpusConfig, "demo", [f"workers={request.param}"], kind="corpus")
        result = build(config, Path("corpus"))
    assert not list(home.iterdir())
    assert ("Ray" in result.workers) == (request.param == "ray")
    yield out, result
    shutil.rmtree(out)


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Short, as Ray needs it, and shared with no other build on the machine."""
    tmp_path_factory.getbasetemp()   # pytest's own folder must not be made inside
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


def left_by_us() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"))


def test_the_demo_corpus_is_whole_and_accounts_for_every_cell(demo: tuple[Path, BuildResult]) -> None:
    out, result = demo
    assert verify_corpus(out, deep=True) == result.manifest == Manifest.read(out)
    assert set(result.seconds) == {"plan", "tokenise", "duplicates", "merge", "commit"}
    assert sum(source.cells_in for source in result.manifest.sources) == 3176
    for source in result.manifest.sources:
        assert source.cells_in == source.cells_written + sum(source.filtered.values())
    names = {path.name for path in out.iterdir()}
    assert names == {"manifest.json", "vocab.json", "run.json", ".lock", "train", "valid"}


def test_either_writes_the_bytes_that_one_thread_writes(demo: tuple[Path, BuildResult], tmp_path: Path) -> None:
    build_here(load_config(CorpusConfig, "demo", kind="corpus"), tmp_path / "here")
    assert bytes_of(demo[0]) == bytes_of(tmp_path / "here")


def test_no_folder_of_this_machine_is_in_the_corpus(demo: tuple[Path, BuildResult]) -> None:
    for name, content in bytes_of(demo[0]).items():
        assert str(ROOT).encode() not in content, name
        assert str(demo[0]).encode() not in content, name


def test_hugging_face_datasets_opens_the_shards(demo: tuple[Path, BuildResult], tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    corpus = TokenDataset.open(demo[0])
    mapped = corpus.to_hf()
    assert len(mapped) == len(corpus)
    for cell in (0, 1500, len(corpus) - 1):
        assert mapped[cell]["genes"] == corpus[cell]["genes"].tolist()
        assert mapped[cell]["cell_id"] == corpus[cell]["cell_id"]


def test_a_complete_corpus_is_checked_and_not_built_again(demo: tuple[Path, BuildResult],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def no_workers(*_: object) -> None:
        raise AssertionError("workers were started")

    monkeypatch.setattr(execute, "_workers", no_workers)
    out, first = demo
    again = build(load_config(CorpusConfig, "demo", kind="corpus"), out)
    assert (again.manifest, again.seconds) == (first.manifest, {})
    part = out / first.manifest.splits["train"].shards[0].file
    content = part.read_bytes()
    try:
        part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError, match="sha256.*--fresh"):
            build(load_config(CorpusConfig, "demo", kind="corpus"), out)
    finally:
        part.write_bytes(content)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379", "127.0.0.1:70000"])
def test_an_address_where_no_cluster_answers_is_told_at_once(tmp_path: Path, address: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match="no Ray cluster can be joined: .*--ray-address HOST:PORT"):
        build(load_config(CorpusConfig, "demo", kind="corpus"), tmp_path / "out", ray_address=address)
    assert time.monotonic() - started < 30
    assert not (tmp_path / "out").exists()


def test_threads_do_what_starting_ray_would_not_speed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    plan = make_plan(config_of(write_h5ad(tmp_path / "a.h5ad", random_counts(1, 50, 60))))
    assert not execute.ray_pays(plan)   # whatever a value may cost
    started: list[str | None] = []
    monkeypatch.setattr(execute, "ray_workers", lambda address, _: started.append(address))
    directory = BuildDir(tmp_path / "out", plan.sha256)

    def asked(workers: str, address: str | None = None) -> list[str | None]:
        started.clear()
        config = plan.config.model_copy(update={"workers": workers})
        execute._workers(replace(plan, config=config), directory, address)
        return list(started)

    assert (asked("auto"), asked("threads"), asked("ray"), asked("auto", "h:1")) == ([], [], [None], ["h:1"])
    with pytest.raises(ConfigError, match="and a Ray cluster too .*h:1.*; leave out --ray-address"):
        asked("threads", "h:1")
    monkeypatch.setenv("RAY_ADDRESS", "h:2")
    assert (asked("auto"), asked("threads")) == (["h:2"], [])
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(execute, "has_started", lambda: True)
    assert asked("auto") == [None]


def test_a_sample_tells_where_the_number_of_values_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(config_of(write_h5ad(tmp_path / "a.h5ad", random_counts(1, 50, 60))))
    judged = estimate(plan)
    assert judged is not None
    assert not judged.core_s > execute._RAY_PAYS_S
    monkeypatch.setattr(execute, "estimate", lambda _: judged)
    for limit, pays in ((judged.core_s / 2, True), (judged.core_s * 2, False)):
        monkeypatch.setattr(execute, "_RAY_PAYS_S", limit)
        monkeypatch.setattr(execute, "_VALUE_S", (0.0, np.inf))
        assert execute.ray_pays(plan) == pays
    monkeypatch.setattr(execute, "_RAY_PAYS_S", 1.0)
    for bounds, pays in (((0.0, 1e-9), False), ((1e-2, np.inf), True)):
        monkeypatch.setattr(execute, "_VALUE_S", bounds)
        monkeypatch.setattr(execute, "estimate", None)   # no sample is built
        assert execute.ray_pays(plan) == pays


# ---- slow: builds in processes of their own


def driver(out: Path, *sources: Path, workers: str = "ray", **options: object) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(out), *map(str, sources)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            env=os.environ | {"WORKERS": workers}, **options)


@pytest.fixture(scope="module")
def atlases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from scipy import sparse

    folder = tmp_path_factory.mktemp("atlases")
    return [write_h5ad(folder / f"atlas{i}.h5ad", form(random_counts(i, 2500, 400, 0.1)))
            for i, form in enumerate((sparse.csr_matrix, sparse.csc_matrix))]


@pytest.fixture(scope="module")
def uninterrupted(atlases: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A corpus that Ray made, as threads make it; and the seconds of either."""
    folder, seconds = tmp_path_factory.mktemp("whole"), dict[str, float]()
    for workers in WORKERS:
        started = time.monotonic()
        process = driver(folder / workers, *atlases, workers=workers)
        stdout, stderr = process.communicate(timeout=200)
        assert (process.returncode, stdout) == (0, "complete\n"), stderr
        seconds[workers] = time.monotonic() - started
    verify_corpus(folder / "ray", deep=True)
    assert bytes_of(folder / "threads") == bytes_of(folder / "ray")
    return folder / "ray", seconds


@both
@pytest.mark.slow
def test_kill_9_at_random_moments_changes_no_byte(atlases: list[Path], uninterrupted: tuple[Path, dict[str, float]],
                                                  tmp_path: Path, workers: str) -> None:
    """The driver is killed with -9, again and again, and started again; the corpus is the uninterrupted one."""
    whole, duration_s = uninterrupted[0], uninterrupted[1][workers]
    draw = random.Random(20)
    out = tmp_path / "corpus"
    for _ in range(20 if os.environ.get("SCGPT_FULL") else 5):
        process = driver(out, *atlases, workers=workers)
        time.sleep(draw.uniform(0.2, 0.95) * duration_s)
        process.kill()
        process.communicate(timeout=60)
        if (out / "manifest.json").exists():   # killed after the commit: what it left is tidied, then begin another
            driver(out, *atlases, workers=workers).communicate(timeout=200)
            assert bytes_of(out) == bytes_of(whole)
            shutil.rmtree(out)
    process = driver(out, *atlases, workers=workers)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert bytes_of(out) == bytes_of(whole)


@pytest.mark.slow
def test_killed_workers_are_replaced_and_change_no_byte(
        atlases: list[Path], uninterrupted: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    process = driver(tmp_path / "corpus", *atlases)
    killed = 0
    while process.poll() is None:
        time.sleep(0.15)
        if killed < 5:   # the most that one task is tried again
            for worker in workers_of(process.pid):
                os.kill(worker, signal.SIGKILL)
                killed += 1
                break
    stdout, stderr = process.communicate(timeout=200)
    assert killed
    assert (process.returncode, stdout) == (0, "complete\n"), stderr   # what Ray says of them is no answer
    assert bytes_of(tmp_path / "corpus") == bytes_of(uninterrupted[0])


def workers_of(pid: int) -> list[int]:
    """Ray workers that do a task of ours, below a process."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes()
            session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
        except (OSError, ValueError):
            continue
        if session == pid and command.startswith(b"ray::find_or_do"):
            found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_one_worker_and_two_write_the_same(atlases: list[Path], uninterrupted: tuple[Path, dict[str, float]],
                                           tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    process = driver(tmp_path / "corpus", *atlases, preexec_fn=lambda: os.sched_setaffinity(0, {cpu}))
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert bytes_of(tmp_path / "corpus") == bytes_of(uninterrupted[0])


@both
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_build_tidily_and_it_can_go_on(
        atlases: list[Path], uninterrupted: tuple[Path, dict[str, float]], tmp_path: Path, number: signal.Signals,
        workers: str) -> None:
    before = set(left_by_us())
    out = tmp_path / "corpus"
    process = driver(out, *atlases, workers=workers)
    deadline = time.monotonic() + 100
    while not list(out.glob(".build/records/block-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert set(left_by_us()) <= before
    process = driver(out, *atlases, workers=workers)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert bytes_of(out) == bytes_of(uninterrupted[0])


@both
@pytest.mark.slow
def test_what_a_worker_raises_reaches_the_user_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        workers: str) -> None:
    monkeypatch.setattr("data_pipeline.sources.base.PROBE_VALUES", 100)
    before = set(left_by_us())
    counts = random_counts(5, 300, 40)
    counts.data[-1] = 0.5
    path = write_h5ad(tmp_path / "poor.h5ad", counts)
    with pytest.raises(SourceError, match="row 299 holds 0.5") as caught:
        build(config_of(path, workers=workers), tmp_path / "out", progress=Progress())
    assert type(caught.value) is SourceError
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert set(left_by_us()) <= before


# A program that has started Ray itself, with a source that fails late and then with good ones.
HOST = """
import sys
from pathlib import Path
import ray
from data_pipeline import plan
from data_pipeline.config import CorpusConfig
from data_pipeline.execute import build
from data_pipeline.sources import base
from scgpt.config import validate
from scgpt.errors import SourceError
plan.BLOCK_VALUES, base.PROBE_VALUES = 20_000, 100
ray.init(num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[1], log_to_driver=False)
out = Path(sys.argv[2])
try:
    build(validate(CorpusConfig, {"sources": sys.argv[3:], "cells": {"min_genes": 10}}), out / "bad")
except SourceError:
    print("refused", flush=True)
done = build(validate(CorpusConfig, {"sources": sys.argv[4:], "cells": {"min_genes": 10}, "splits": {"valid": 0.2},
                                     "shards": {"max_bytes": "512KiB"}}), out / "good")
assert done.workers == "Ray, 2 CPUs"
assert ray.is_initialized()
ray.shutdown()
print("complete")
"""


@pytest.mark.slow
def test_inside_a_program_that_has_its_own_ray(atlases: list[Path], uninterrupted: tuple[Path, dict[str, float]],
                                               tmp_path: Path) -> None:
    counts = random_counts(6, 2500, 400, 0.1)
    counts.data[-1] = 0.5
    bad = write_h5ad(tmp_path / "bad.h5ad", counts)
    done = subprocess.run([sys.executable, "-c", HOST, tempfile.gettempdir(), str(tmp_path), str(bad),
                           *map(str, atlases)], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\ncomplete\n"), done.stderr
    assert bytes_of(tmp_path / "good") == bytes_of(uninterrupted[0])


@both
@pytest.mark.slow
@pytest.mark.system
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small tmpfs")
def test_a_full_disk_is_told_and_the_build_goes_on_with_more_room(
        atlases: list[Path], uninterrupted: tuple[Path, dict[str, float]], tmp_path: Path, workers: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        process = driver(disk / "corpus", *atlases, workers=workers)
        _, stderr = process.communicate(timeout=200)
        assert process.returncode != 0
        assert "the corpus cannot be written: " in stderr.splitlines()[-1]
        assert "No space left on device" in stderr.splitlines()[-1]
        assert not (disk / "corpus" / "manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        process = driver(disk / "corpus", *atlases, workers=workers)
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
        assert bytes_of(disk / "corpus") == bytes_of(uninterrupted[0])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_two_builds_side_by_side_do_not_disturb_each_other(
        atlases: list[Path], uninterrupted: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    both = [driver(tmp_path / name, *atlases) for name in ("a", "b")]
    refused = None
    while refused is None and both[0].poll() is None:
        if (tmp_path / "a" / ".lock").exists():
            refused = driver(tmp_path / "a", *atlases)
        time.sleep(0.05)
    assert refused is not None
    assert "another build is already at work here" in refused.communicate(timeout=200)[1]
    for process, name in zip(both, ("a", "b"), strict=True):
        _, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
        assert bytes_of(tmp_path / name) == bytes_of(uninterrupted[0])


@pytest.mark.slow
def test_the_real_driver_s_corpus_holds_every_value_of_its_atlases(
        atlases: list[Path], uninterrupted: tuple[Path, dict[str, float]]) -> None:
    from data_pipeline.sources import open_source

    found = cells_of(uninterrupted[0])
    for path in atlases:
        with open_source(path) as source:
            rows = source.read_rows(0, source.n_cells)
        for row in range(rows.shape[0]):
            values = np.sort(rows.data[rows.indptr[row]:rows.indptr[row + 1]])
            assert values.tolist() == sorted(found[path.stem, row].values())


@both
@pytest.mark.slow
def test_either_leaves_out_duplicates_and_a_damaged_source_as_one_thread_does(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
    monkeypatch.setattr("data_pipeline.plan.BLOCK_VALUES", 20_000)
    monkeypatch.setattr("data_pipeline.sources.base.PROBE_VALUES", 100)
    counts = random_counts(1, 600, 400, 0.2)
    good = write_h5ad(tmp_path / "good.h5ad", counts)
    again = write_h5ad(tmp_path / "again.h5ad", counts[100:400])
    poor = random_counts(2, 600, 400, 0.2)
    poor.data[poor.indptr[400]] = -1
    poor.data[poor.indptr[590]] = 0.5
    config = config_of(good, write_h5ad(tmp_path / "poor.h5ad", poor), again, on_error="skip", splits={"valid": 0.2},
                       cells={"remove_duplicates": True}, shards={"max_bytes": "64KiB"}, workers=workers)
    manifest = build(config, tmp_path / "out", progress=Progress()).manifest
    assert [source.filtered for source in manifest.sources] == [{}, {"duplicate": 300}]
    assert manifest.quarantined is not None
    assert manifest.quarantined[0].reason.startswith("row 400 holds -1")
    build_here(config, tmp_path / "here")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "here")
