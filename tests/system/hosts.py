"""Two hosts on one machine: two network namespaces with a cable between them, and a disk that both see."""
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

FIRST, SECOND = "10.77.0.1", "10.77.0.2"   # of one cable only: no other run sees them


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"scgpt-probe-{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return made


@dataclass
class Hosts:
    """Host 0 and host 1."""

    folder: Path          # short: sockets lie below it
    names: tuple[str, str]
    environment: dict[str, str]

    def command(self, host: int, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[host], *words]

    def processes(self, host: int) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=False)
        return [int(word) for word in found.stdout.split()]

    def kill(self, host: int) -> None:
        """All processes of a host at once: the host is gone."""
        deadline = time.monotonic() + 20
        while (left := self.processes(host)) and time.monotonic() < deadline:
            for process in left:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        assert not left


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Made, and at the end emptied and removed."""
    word = secrets.token_hex(3)
    with ExitStack() as cleanup:
        folder = Path(tempfile.mkdtemp(prefix="h-", dir="/tmp"))
        cleanup.callback(shutil.rmtree, folder)
        (folder / "home").mkdir()
        names = (f"scgpt-a-{word}", f"scgpt-b-{word}")
        _cable(names, cleanup)
        hosts = Hosts(folder, names, {**os.environ, "HOME": str(folder / "home"), "TMPDIR": str(folder)})
        cleanup.callback(hosts.kill, 0)
        cleanup.callback(hosts.kill, 1)
        yield hosts


def _cable(names: tuple[str, str], cleanup: ExitStack) -> None:
    """Two network namespaces, an `eth0` in each."""
    for name in names:
        subprocess.run(["ip", "netns", "add", name], check=True)
        cleanup.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
    subprocess.run(["ip", "-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns",
                    names[1]], check=True)
    for name, address in zip(names, (FIRST, SECOND), strict=True):
        subprocess.run(["ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0"], check=True)
        for link in ("lo", "eth0"):
            subprocess.run(["ip", "-n", name, "link", "set", link, "up"], check=True)
