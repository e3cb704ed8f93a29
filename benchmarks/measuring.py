"""A command in a process of its own, bound to some cores: seconds, CPU of all its processes, memory, bytes written."""
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

ROOT = Path(__file__).resolve().parents[1]
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a command."""

    seconds: float
    cpu_s: float          # of all processes
    peak_bytes: int       # resident, of all processes together
    worker_bytes: int     # resident at most, of the largest process
    written_bytes: int
    told: str             # last line that it printed


def measure(command: Sequence[str], out: Path, cores: int, *, only: str = "") -> Run:
    """Run a command that writes below the new folder `out`, bound to `cores` cores, and look at its processes.

    `only`: start of the command line of the processes that `worker_bytes` is about. Raises RuntimeError with the last
    lines of a command that fails.
    """
    import psutil

    allowed = sorted(os.sched_getaffinity(0))[:cores]
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores), "NUMBA_NUM_THREADS": str(cores),
                   "HF_HOME": str(out / ".hf"), "PYTHONPATH": os.pathsep.join(
                       [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    out.mkdir(parents=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as told:
        started = time.perf_counter()
        process = psutil.Popen(command, env=environment, stdout=told, stderr=subprocess.STDOUT, cwd=ROOT,
                               preexec_fn=lambda: os.sched_setaffinity(0, allowed))
        cpu: dict[tuple[int, float], float] = {}
        peak = worker = 0
        while process.poll() is None:
            together = 0
            for member in _family(process):
                try:
                    times, resident = member.cpu_times(), member.memory_info().rss
                    command_line = " ".join(member.cmdline())
                    highest = _highest_resident(member.pid)
                except (psutil.Error, OSError):   # it has ended
                    continue
                cpu[member.pid, member.create_time()] = times.user + times.system
                together += resident
                if command_line.startswith(only):
                    worker = max(worker, highest)
            peak = max(peak, together)
            time.sleep(_LOOK_EVERY_S)
        seconds = time.perf_counter() - started
        told.seek(0)
        lines = told.read().splitlines()
    if process.returncode != 0:
        raise RuntimeError("\n".join(lines[-12:]))
    shutil.rmtree(out / ".hf", ignore_errors=True)
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)   # exact, but blind to processes of others, as Ray's are
    reaped = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, max(sum(cpu.values()), reaped), peak, worker, written, lines[-1] if lines else "")


def _family(process: "psutil.Process") -> "list[psutil.Process]":
    import psutil

    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _highest_resident(process: int) -> int:
    """The most memory that a process ever had resident, in bytes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def this_machine(packages: Sequence[str]) -> str:
    """This machine, its load, and the versions of what is installed of `packages`."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return (f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
            f"Python {platform.python_version()}, {', '.join(found)}")
