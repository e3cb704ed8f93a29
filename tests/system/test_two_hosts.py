"""A Ray cluster of two hosts: two network namespaces with a cable between them, started as a user would."""
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scgpt.data import verify_corpus
from tests.data_pipeline.atlases import ROOT, build_here, bytes_of, random_counts, write_h5ad
from tests.system.hosts import FIRST, SECOND, Hosts, can_make_namespaces, two_hosts

RAY = Path(sys.executable).with_name("ray")
PORT = 6399
N_SOURCES = 10


pytestmark = [pytest.mark.slow, pytest.mark.system,
              pytest.mark.skipif(not can_make_namespaces(), reason="needs root, iproute2 and network namespaces")]


class Cluster(Hosts):
    """Hosts with Ray; what lies in `private` is another folder on the second."""

    @property
    def private(self) -> Path:
        return self.folder / "private"

    def start_ray(self, host: int) -> None:
        options = [f"--node-ip-address={(FIRST, SECOND)[host]}", "--num-cpus=1", "--num-gpus=0",
                   "--object-store-memory=80000000", f"--temp-dir={self.folder / 'ab'[host]}"]
        where = [f"--address={FIRST}:{PORT}"] if host else ["--head", f"--port={PORT}", "--include-dashboard=false"]
        words = [str(RAY), "start", *where, *options]
        if host == 1:   # `ip netns exec` gives a mount namespace of its own
            words = ["sh", "-c", f"mount -t tmpfs none {self.private} && exec {' '.join(words)}"]
        done = subprocess.run(self.command(host, *words), env=self.environment, capture_output=True, text=True,
                              timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def build(self, out: Path, **environment: str) -> "subprocess.Popen[str]":
        words = [sys.executable, "-m", "launch.cli", "data", "build", str(self.folder / "corpus.yaml"), "--out",
                 str(out), "--ray-address", f"{FIRST}:{PORT}", "--json"]
        return subprocess.Popen(self.command(0, *words), env={**self.environment, **environment}, cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def at_work(self, host: int) -> bool:
        """Whether a task of a build is running on a host."""
        for process in self.processes(host):
            try:
                if Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::find_or_do"):
                    return True
            except OSError:   # it has ended
                continue
        return False


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_hosts() as made:
        hosts = Cluster(made.folder, made.names, made.environment | {
            "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"})
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            hosts.environment.pop(name, None)
        hosts.private.mkdir()
        for i in range(N_SOURCES):
            write_h5ad(hosts.folder / f"atlas{i}.h5ad", random_counts(i, 1500, 400, 0.1))
        (hosts.folder / "corpus.yaml").write_text("sources: ['atlas*.h5ad']\ncells: {min_genes: 10}\n"
                                                  "splits: {valid: 0.2}\nshards: {max_bytes: 512KiB}\n")
        subprocess.run([RAY, "get-auth-token", "--generate"], env=hosts.environment, check=True, capture_output=True)
        hosts.start_ray(0)
        hosts.start_ray(1)
        yield hosts


@pytest.fixture(scope="module")
def local(cluster: Cluster) -> dict[str, bytes]:
    """What a build in one process makes of the same configuration."""
    from data_pipeline.config import CorpusConfig
    from scgpt.config import load_config

    build_here(load_config(CorpusConfig, str(cluster.folder / "corpus.yaml"), kind="corpus"), cluster.folder / "local")
    return bytes_of(cluster.folder / "local")


def test_both_hosts_work_and_write_what_one_process_writes(cluster: Cluster, local: dict[str, bytes]) -> None:
    out = cluster.folder / "both"
    process = cluster.build(out)
    worked = [False, False]
    while process.poll() is None:
        worked = [before or cluster.at_work(host) for host, before in enumerate(worked)]
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["cells_in"] == N_SOURCES * 1500
    assert worked == [True, True]
    assert bytes_of(out) == local


def test_a_directory_that_one_host_does_not_see_is_refused(cluster: Cluster) -> None:
    process = cluster.build(cluster.private / "corpus")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1
    assert f"the directory is not visible on {SECOND}" in stderr.splitlines()[-1]
    assert not list(cluster.private.iterdir())


def test_a_driver_without_the_token_of_the_cluster_is_told(cluster: Cluster) -> None:
    process = cluster.build(cluster.folder / "stranger", RAY_AUTH_TOKEN=secrets.token_hex(32))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2
    assert stderr.splitlines()[-1].startswith("error: no Ray cluster can be joined: ")
    assert "Traceback" not in stderr
    assert not (cluster.folder / "stranger").exists()


def test_a_killed_driver_leaves_nobody_at_work_and_can_be_started_again(cluster: Cluster,
                                                                        local: dict[str, bytes]) -> None:
    out = cluster.folder / "killed"
    process = cluster.build(out)
    while not list(out.glob(".build/records/block-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    again = cluster.build(out)
    _, stderr = again.communicate(timeout=400)
    assert again.returncode == 0, stderr
    assert bytes_of(out) == local
    deadline = time.monotonic() + 120
    while (cluster.at_work(0) or cluster.at_work(1)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not cluster.at_work(0)
    assert not cluster.at_work(1)


def test_the_loss_of_a_host_changes_no_byte(cluster: Cluster, local: dict[str, bytes]) -> None:
    """The second host dies while it does a task: Ray gives its tasks to the first."""
    out = cluster.folder / "lost"
    process = cluster.build(out)
    while not cluster.at_work(1):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    cluster.kill(1)
    _, stderr = process.communicate(timeout=400)
    if process.returncode != 0:   # it may give up, in one sentence; the same command then goes on
        assert stderr.splitlines()[-1].startswith("error: a Ray worker was lost for good")
        assert "Traceback" not in stderr
        _, stderr = cluster.build(out).communicate(timeout=400)
    verify_corpus(out, deep=True)
    assert bytes_of(out) == local
