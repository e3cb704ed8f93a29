"""DeepSpeed over pdsh on two hosts, as the README starts it: it trains, and the death of a host ends it soon."""
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.pretrain import runs
from tests.system.hosts import FIRST, SECOND, Hosts, can_make_namespaces, two_hosts

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
STEPS = ("train.max_steps=120", "model.dropout=0.1", "model.attention_dropout=0.1")

pytestmark = [pytest.mark.slow, pytest.mark.system,
              pytest.mark.skipif(not can_make_namespaces(), reason="needs root, iproute2 and network namespaces"),
              pytest.mark.skipif(SSHD is None or shutil.which("pdsh") is None, reason="needs pdsh and openssh-server")]


class Cluster(Hosts):
    """Hosts that let each other in with a key, and a hostfile with a rank on each."""

    def prepare(self) -> None:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key")], check=True)
        Path("/run/sshd").mkdir(exist_ok=True)   # the package's own, which a container may lack
        (self.folder / "hosts").write_text(f"{FIRST} slots=1\n{SECOND} slots=1\n")
        (self.folder / "deepspeed_env").write_text(
            f"GLOO_SOCKET_IFNAME=eth0\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nPYTHONPATH={runs.ROOT}\n")
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/key\nAuthorizedKeysFile {self.folder}/key.pub\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nPidFile none\n")
        self.environment |= {
            "DS_ENV_FILE": str(self.folder / "deepspeed_env"), "PYTHONPATH": str(runs.ROOT), "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PDSH_SSH_ARGS_APPEND": f"-F none -i {self.folder}/key -o StrictHostKeyChecking=no -o LogLevel=ERROR "
                                    f"-o UserKnownHostsFile={self.folder}/known_hosts "
                                    "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"}

    def start_sshd(self, host: int) -> None:
        """With half of the cores each, as two machines have: a rank there has the threads of one rank of two here."""
        assert SSHD is not None
        words = self.command(host, SSHD, "-f", str(self.folder / "sshd_config"))
        cores = sorted(os.sched_getaffinity(0))
        subprocess.run(words, check=True, preexec_fn=lambda: os.sched_setaffinity(0, cores[host::2] or cores))

    def train(self, corpus: Path, out: Path, *settings: str) -> "subprocess.Popen[str]":
        options = ["--hostfile", str(self.folder / "hosts"), "--master_addr", FIRST, "--no_ssh_check"]
        words = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), *options, "pretrain/train.py",
                 "demo", f"data.corpus={corpus}", *runs.SETTINGS, *settings, "--out", str(out)]
        return subprocess.Popen(self.command(0, *words), env=self.environment, cwd=runs.ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def at_work(self, host: int) -> list[str]:
        """What runs on a host, but its sshd."""
        found = []
        for process in self.processes(host):
            try:
                words = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:   # it has ended
                continue
            if "train.py" in words or "deepspeed" in words:
                found.append(words)
        return found

    def cut(self, host: int) -> None:
        """As a power cut or a pulled cable: no word to the other host."""
        subprocess.run(["ip", "-n", self.names[host], "link", "set", "eth0", "down"], check=True)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with two_hosts() as made:
        hosts = Cluster(made.folder, made.names, made.environment)
        hosts.prepare()
        for host in range(2):
            hosts.start_sshd(host)
        yield hosts


def assert_ended(cluster: Cluster, process: "subprocess.Popen[str]", *, within_s: float) -> None:
    """The job ends with a sentence and a code, and nothing of it is left on either host."""
    begun = time.monotonic()
    _, errors = process.communicate(timeout=within_s)
    assert process.returncode not in {0, 75}, errors
    assert "another rank is gone or hung" in errors
    assert "the same command continues from the last checkpoint" in errors
    while any(left := [cluster.at_work(host) for host in range(2)]):
        assert time.monotonic() - begun < within_s + 10, left
        time.sleep(0.1)


def test_a_host_that_dies_ends_the_job_and_the_other_goes_on_alone(cluster, corpus, tmp_path):
    """With two ranks there as with one on each: curve and weights are those of a run that nothing disturbed."""
    out, undisturbed = cluster.folder / "run", tmp_path / "run"
    process = cluster.train(corpus, out, *STEPS)
    runs.wait_for_step(process, out, 30, within_s=400)
    cluster.kill(1)
    assert_ended(cluster, process, within_s=60)
    assert "finished" not in runs.events(out)
    for folder in (out, undisturbed):
        code, errors = runs.train(corpus, folder, *STEPS, ranks=2)
        assert code == 0, errors
    assert "resume" in runs.events(out)
    assert runs.curve(out) == runs.curve(undisturbed)
    ours, theirs = runs.weights(out), runs.weights(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.skipif(not runs.FULL, reason="the longest too: SCGPT_FULL=1")
def test_a_host_that_falls_silent_ends_the_job_after_the_time_limit(cluster, corpus):
    """A host without power closes no connection: each side waits deepspeed.timeout_s, then ends."""
    out = cluster.folder / "run"
    process = cluster.train(corpus, out, *STEPS, "train.max_steps=100000", "deepspeed.timeout_s=15")
    runs.wait_for_step(process, out, 10, within_s=400)
    cluster.cut(1)
    assert_ended(cluster, process, within_s=90)
