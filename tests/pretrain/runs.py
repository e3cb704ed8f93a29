"""Real trainings of a very small model, as subprocesses: on one rank, or on several under the deepspeed launcher."""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pretrain.checkpoint import SUMS, find, sums_bytes, validate
from pretrain.metrics import read_rows
from pretrain.shards import Shards
from scgpt.files import sha256
from tests.scgpt.data.cells import random_cells, write_corpus

ROOT = Path(__file__).resolve().parents[2]
TIMINGS = {"cells_per_s", "tokens_per_s", "tflops_per_s", "mfu", "step_time_s", "step_time_p50_s", "step_time_p95_s",
           "data_wait_s", "to_device_s", "forward_s", "backward_s", "optimizer_s", "memory_bytes", "slowest_rank",
           "slowest_rank_ratio", "eval_s"}
MODEL = ("model.n_layers=2", "model.d_model=16", "model.n_heads=2", "model.d_hid=16", "objective.context_length=32")
SETTINGS = (*MODEL, "batch.global_batch_size=8", "batch.micro_batch_size=2", "schedule.warmup_steps=3",
            "train.log_every=5", "train.eval_every=50", "train.save_every=20", "tracking.wandb=disabled",
            "deepspeed.timeout_s=200")   # what a rank may lag behind on a busy machine


def make_corpus(folder: Path, *, n_train: int = 60, n_valid: int = 13) -> Path:
    lengths = [3 + (7 * i) % 50 for i in range(n_train + n_valid)]
    write_corpus(folder, {"train": [random_cells(lengths[:n_train], source="train")],
                          "valid": [random_cells(lengths[n_train:], seed=1, source="valid")]})
    return folder


def write_two_sources(folder: Path) -> Path:
    """A corpus whose metadata name two sources."""
    make_corpus(folder)
    for path in folder.rglob("*.obs.parquet"):
        table = pq.read_table(path)
        sources = pa.array(["ab"[i % 2] for i in range(len(table))]).dictionary_encode()
        pq.write_table(table.set_column(table.column_names.index("source"), "source", sources), path)
    return folder


def free_port() -> int:
    """One that no connection takes by chance before the launcher's first rank listens on it, seconds from now.

    Connections and servers without a port of their own have those of the system's range, 32768 and up.
    """
    while True:
        port = random.randrange(20_000, 32_768)
        with socket.socket() as probe, suppress(OSError):   # taken: another one
            probe.bind(("127.0.0.1", port))
            return port


def command(corpus: Path, out: Path, settings: tuple[str, ...], ranks: int) -> list[str]:
    return launched("pretrain/train.py", "demo", f"data.corpus={corpus}", *SETTINGS, *settings, "--out", str(out),
                    ranks=ranks)


def launched(*words: str, ranks: int) -> list[str]:
    """A Python program and its arguments: alone, or on several ranks under the launcher."""
    if ranks == 1:
        return [sys.executable, *words]
    launcher = [sys.executable, str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks),
                "--master_port", str(free_port())]
    return [*launcher, *words]


def start(corpus: Path, out: Path, *settings: str, ranks: int = 1,
          errors: int = subprocess.PIPE) -> "subprocess.Popen[str]":
    """Begin, or continue, a training in a process group of its own."""
    return begin(command(corpus, out, settings, ranks), errors=errors)


def begin(words: list[str], *, errors: int = subprocess.PIPE) -> "subprocess.Popen[str]":
    """Start a program in a process group of its own; `errors`: where its stderr goes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT),
                                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=errors,
                            start_new_session=True)


def program(path: Path, *words: str, ranks: int, within_s: float = 500) -> tuple[int, str]:
    """Run a program of the tests on `ranks` ranks; exit code and stderr."""
    process = begin(launched(str(path), *words, ranks=ranks))
    try:
        _, errors = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, errors


FULL = bool(os.environ.get("SCGPT_FULL"))


def gate(folder: Path, *cases: tuple[str, ...], ranks: int, steps: int) -> list[dict[str, Any]]:
    """What gate.py tells of each case: CONFIG, then settings. All in one group of ranks."""
    files = [folder / f"{number}.pt" for number in range(len(cases))]
    content = [{"words": case, "steps": steps, "out": str(file)}
               for case, file in zip(cases, files, strict=True)]
    (folder / "cases.json").write_text(json.dumps(content))
    code, errors = program(ROOT / "tests/pretrain/gate.py", str(folder / "cases.json"), ranks=ranks,
                           within_s=3000 if FULL else 500)
    assert code == 0, errors
    return [torch.load(file) for file in files]


def train(corpus: Path, out: Path, *settings: str, ranks: int = 1) -> tuple[int, str]:
    """Train to the end; exit code and stderr."""
    process = start(corpus, out, *settings, ranks=ranks)
    _, errors = process.communicate(timeout=500)
    return process.returncode, errors


def train_here(corpus: Path, out: Path, *settings: str) -> int:
    """Train on one rank in this process; the exit code. Raises ScgptError. Many short runs cost one import."""
    from pretrain import loop
    from pretrain.config import TrainConfig
    from scgpt.config import load_config

    words = [f"data.corpus={corpus}", *SETTINGS, *settings]
    with warnings.catch_warnings():   # torch's and DeepSpeed's own
        warnings.simplefilter("ignore")
        return loop.train(load_config(TrainConfig, "demo", words, kind="pretrain"), out)


def wait_for_step(process: "subprocess.Popen[str]", out: Path, step: int, *, within_s: float = 400) -> None:
    deadline = time.monotonic() + within_s
    while not any(row["step"] >= step for row in read_rows(out / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no such step in time"
        time.sleep(0.01)


def wait_for_start(process: "subprocess.Popen[str]", out: Path, number: int, *, within_s: float = 400) -> None:
    """Until a run was begun or continued that many times: RUN/ranks names the processes of this start."""
    deadline = time.monotonic() + within_s
    while sum(event in {"start", "resume"} for event in events(out)) < number:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no such start in time"
        time.sleep(0.01)


def rank_processes(out: Path) -> list[int]:
    return [int(path.read_text().split()[0]) for path in sorted((out / "ranks").glob("rank-*"))]


def kill_all(process: "subprocess.Popen[str]", out: Path) -> None:
    """kill -9: launcher, node launcher and ranks, at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until_gone(rank_processes(out))


def wait_until_gone(processes: list[int], *, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while any(is_alive(process) for process in processes):
        assert time.monotonic() < deadline, "the ranks are still there"
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def curve(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """(split, step) -> what was measured there, without timings; of repeated steps the last."""
    return {(row["split"], row["step"]): {key: value for key, value in row.items() if key not in TIMINGS}
            for row in read_rows(out / "metrics.jsonl")}


def weights(out: Path, step: str = "latest") -> dict[str, torch.Tensor]:
    folder = find(out, step)
    state = validate(folder)
    shards = Shards(folder, stage=state.zero_stage, world_size=state.world_size)
    return {name: shards.read(name) for name in shards.shapes}


def events(out: Path) -> list[str]:
    return [row["event"] for row in read_rows(out / "events.jsonl")]


def state_of(out: Path, step: str = "latest") -> dict[str, Any]:
    result: dict[str, Any] = json.loads((find(out, step) / "state.json").read_bytes())
    return result


def sign(folder: Path) -> None:
    """Write the checksums of a checkpoint or release that a test has changed."""
    files = [path for path in folder.iterdir() if path.name != SUMS]
    (folder / SUMS).write_bytes(sums_bytes({path.name: sha256(path) for path in files}))
