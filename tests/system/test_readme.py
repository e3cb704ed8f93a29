"""README typed as printed into a fresh clone, in an empty home: one test, because each step builds on the last."""
import os
import pwd
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.readme import blocks

pytestmark = [pytest.mark.system, pytest.mark.timeout(2400)]
ROOT = Path(__file__).resolve().parents[2]
REUSE_CPU_S = 60.0    # a second demo only looks at what is there


@pytest.fixture
def machine() -> Iterator[Path]:
    """An empty home and an empty temporary directory, under a path short enough for sockets; a clone goes beside."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone of the repository")
    folder = Path(tempfile.mkdtemp(prefix="readme-", dir="/tmp"))
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    subprocess.run(["git", "clone", "--quiet", "--no-local", str(ROOT), str(folder / "clone")], check=True)
    yield folder
    shutil.rmtree(folder)


def test_a_build_runs_where_the_temporary_directory_has_a_long_path(tmp_path: Path):
    long = tmp_path / ("x" * 60)
    long.mkdir()
    command = [sys.executable, "-m", "launch.cli", "data", "build", "demo", "--out", str(tmp_path / "corpus")]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "TMPDIR": str(long)}, capture_output=True, text=True,
                         check=False)
    assert run.returncode == 0, run.stderr
    assert list(long.iterdir()) == []


def environment(machine: Path) -> dict[str, str]:
    """A newcomer's: PATH, an empty home, and what pip needs to reach the package index that this machine uses."""
    kept = {name: value for name, value in os.environ.items()
            if name.startswith(("PIP_", "SSL_")) or name.lower().endswith("_proxy") or name == "LANG"}
    kept.pop("PIP_CACHE_DIR", None)
    user_pip = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".config" / "pip" / "pip.conf"
    if user_pip.exists():
        kept["PIP_CONFIG_FILE"] = str(user_pip)
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(machine / "home"), "TMPDIR": str(machine / "tmp"),
            "PYTHON": str(Path(sys._base_executable).resolve()), **kept}


def shell(machine: Path, script: str) -> str:
    """Run a script with bash in the clone; everything it printed."""
    run = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=machine / "clone", env=environment(machine),
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         check=False)
    assert run.returncode == 0, f"code {run.returncode}\n{run.stdout[-8000:]}"
    return run.stdout


def cpu_seconds() -> float:
    """Of all programs that this process has started and that have ended; a busy machine takes no more of them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_every_block_of_the_readme_runs_as_printed(machine: Path):
    page = blocks(ROOT / "README.md")
    typed = [block for block in page if block.reason_not_executed is None and block.language in ("bash", "python")]
    assert {block.language for block in page} >= {"bash", "python"}
    assert all(block.reason_not_executed != "" for block in page)
    assert typed[0].code == "make demo\n"

    first = shell(machine, typed[0].code)
    assert "the same command continues" in first   # it was killed
    assert re.search(r"^validation loss +[\d.]+", first, re.MULTILINE)
    for name in ("corpus/manifest.json", "run/metrics.jsonl", "release/best_model.pt", "loss.png", "embedding.png"):
        assert (machine / "clone" / "out" / "demo" / name).exists()

    assert [path for folder in ("home", "tmp") for path in (machine / folder).iterdir()] == []

    before = cpu_seconds()
    second = shell(machine, typed[0].code)
    assert cpu_seconds() - before < REUSE_CPU_S
    assert second.count("reused") == first.count("== ") - 1   # all stages, and no kill
    assert first.splitlines()[-9:] == second.splitlines()[-9:]

    shell(machine, "".join(block.code for block in typed[1:] if block.language == "bash"))
    for block in typed:
        if block.language == "python":
            shell(machine, f".venv/bin/python - <<'END'\n{block.code}END\n")

    assert shell(machine, "git status --porcelain") == ""
