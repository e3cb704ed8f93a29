"""`make demo`: the whole chain on the real cells of this repository, each step by the command a user would type.

Atlases to corpus, training on two ranks that is killed with SIGKILL in the middle and continued by the same command,
release, the embedding of a library that no corpus has seen, two pictures, a table. What is there already is reused; a
demo that was interrupted goes on.
"""
import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.summaries import describe_filtered
from scgpt.errors import EXIT_DONE, EXIT_INTERRUPTED, CheckpointError, ConfigError, DataError, ScgptError
from scgpt.files import remove, write_json

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = Path("examples/atlas/held-out/pancreas-baron2016-lib1.h5ad")
KILL_AT = 0.55          # share of the steps after which the training is killed
POLL_S = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code."""
    args = _parse(argv)
    if not (ROOT / HELD_OUT).exists():
        return _fail(ConfigError("the demo needs the cells under examples/atlas", where=str(ROOT),
                                 fix="run it in a clone of the repository: make demo"))
    if args.gpu and not gpu_count():
        say("gpu-check: torch finds no CUDA GPU here, so there is nothing to check (make demo runs on CPUs)")
        return EXIT_DONE
    os.chdir(ROOT)
    if args.fresh:
        remove(args.out)
    try:
        run(Demo(args.out, args.seed, gpu=args.gpu))
    except KeyboardInterrupt:
        say("interrupted: the same command continues")
        return EXIT_INTERRUPTED
    except ScgptError as error:
        return _fail(error)
    return EXIT_DONE


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.demo", description="example: make demo SEED=1")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    parser.add_argument("--out", type=Path, help="default: out/demo, out/demo-seed-N for another seed")
    parser.add_argument("--fresh", action="store_true", help="remove what is there first")
    parser.add_argument("--gpu", action="store_true", help="train on all GPUs of this machine; no kill")
    args = parser.parse_args(argv)
    name = ("gpu-check" if args.gpu else "demo") + (f"-seed-{args.seed}" if args.seed else "")
    args.out = args.out or Path("out") / name
    return args


def say(line: str = "") -> None:
    """One line to the terminal, at once, also where stdout is a file."""
    print(line, flush=True)  # noqa: T201 the demo talks


def _fail(error: ScgptError) -> int:
    print(f"error: {error}", file=sys.stderr)  # noqa: T201
    return error.exit_code


@dataclass
class Demo:
    """Where the demo's things lie, and what is known of the stages that are done (`demo.json`)."""

    out: Path
    seed: int
    gpu: bool = False
    done: dict[str, dict[str, Any]] = field(default_factory=dict)   # stage -> what it found, with `seconds`

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        if self.record.exists():
            self.done = json.loads(self.record.read_text())
        elif any(self.out.iterdir()):
            raise DataError("this folder holds something else", where=str(self.out),
                            fix="give another --out, or remove it")
        else:
            write_json(self.record, self.done)

    @property
    def record(self) -> Path:
        """What the demo remembers."""
        return self.out / "demo.json"

    def path(self, name: str) -> Path:
        """A file or folder of the demo."""
        return self.out / name

    def stage(self, name: str, title: str, outputs: Sequence[str], work: Callable[["Demo"], dict[str, Any]]) -> None:
        """Do a stage unless its outputs are there and recorded; a stage that runs makes all later ones run again."""
        if name in self.done and all(self.path(output).exists() for output in outputs):
            say(f"== {title}: reused {', '.join(str(self.path(output)) for output in outputs)}")
            return
        say(f"== {title}")
        self.done = dict(list(self.done.items())[:list(self.done).index(name)]) if name in self.done else self.done
        start = time.monotonic()
        found = work(self)
        self.done[name] = {**found, "seconds": round(time.monotonic() - start, 1)}
        write_json(self.record, self.done)


def run(demo: Demo) -> None:
    """The stages in order, then the table."""
    say(f"demo: into {demo.out}, seed {demo.seed}")
    demo.stage("corpus", "atlases to corpus", ["corpus"], build_corpus)
    demo.stage("training", "training", ["run"], train)
    demo.stage("release", "checkpoint to release", ["release"], release)
    demo.stage("embedding", "held-out cells", ["cells-embedded.h5ad"], embed)
    demo.stage("scores", "scores and pictures", ["loss.png", "embedding.png"], score)
    say()
    say(table(demo))


def build_corpus(demo: Demo) -> dict[str, Any]:
    """Build and check the corpus."""
    answer = scgpt("data", "build", "demo", "--out", str(demo.path("corpus")))
    scgpt("data", "verify", str(demo.path("corpus")), "--deep")
    return answer


def train(demo: Demo) -> dict[str, Any]:
    """Train; kill every process of the training in the middle, once; continue."""
    command = training_command(demo)
    if not demo.gpu and "killed_at" not in demo.done.get("kill", {}):
        killed_at = kill_midway(command, demo.path("run"))
        demo.done["kill"] = {"killed_at": killed_at}
        write_json(demo.record, demo.done)
        say(f"== killed at step {killed_at} (kill -9 of the launcher and both ranks); the same command continues")
    call(training_command(demo))
    return {"resumed_at": resumed_steps(demo.path("run"))}


def training_command(demo: Demo) -> list[str]:
    """`deepspeed` as a user types it: a rank a GPU, two ranks where there is none.

    The port is free, so that another training on this machine does not matter.
    """
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    return [deepspeed, "--num_gpus", str(gpu_count() or 2), "--master_port", str(free_port()), "--log_level", "error",
            "pretrain/train.py", "demo", f"data.corpus={demo.path('corpus')}", f"train.seed={demo.seed}",
            "--out", str(demo.path("run"))]


def gpu_count() -> int:
    """GPUs that torch can train on."""
    import torch

    return torch.cuda.device_count()


def quiet_environment() -> dict[str, str]:
    """Without a GPU, tell DeepSpeed so: it warns otherwise in every process, before any log level is read."""
    return dict(os.environ) if gpu_count() else {**os.environ, "DS_ACCELERATOR": "cpu"}


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_midway(command: Sequence[str], run_dir: Path) -> int:
    """Start `command` and SIGKILL it with all its children once KILL_AT of the steps are done; the last step logged."""
    import psutil
    import yaml

    say(f"$ {shlex.join([Path(command[0]).name, *command[1:]])}")
    process = subprocess.Popen(command, env=quiet_environment())  # noqa: S603 our own command line
    step, last = 0, None
    try:
        while last is None or step < KILL_AT * last:
            time.sleep(POLL_S)
            if process.poll() is not None:
                raise CheckpointError(f"the training ended before it was to be killed, with code {process.returncode}",
                                      where=str(run_dir), fix="read its messages above")
            step = max((row["step"] for row in metrics(run_dir)), default=0)
            if last is None and (run_dir / "config.yaml").exists():
                last = yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["max_steps"]
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            member.kill()
        process.wait()
        psutil.wait_procs(family)
    finally:
        if process.poll() is None:      # interrupted: the ranks got the signal too, and save
            process.wait()
    return step


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that was torn by the kill is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def resumed_steps(run_dir: Path) -> list[int]:
    """The steps from which the run was continued, from events.jsonl."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event["step"] for event in events if event["event"] == "resume"]


def release(demo: Demo) -> dict[str, Any]:
    """Export the best checkpoint, and check what was written."""
    remove(demo.path("release"))
    scgpt("export", str(demo.path("run")), "--out", str(demo.path("release")))
    return scgpt("verify", str(demo.path("release")))


def embed(demo: Demo) -> dict[str, Any]:
    """Embed the held-out library."""
    return scgpt("embed", str(demo.path("release")), str(HELD_OUT), "--out", str(demo.path("cells-embedded.h5ad")))


def score(demo: Demo) -> dict[str, Any]:
    """Neighbour accuracy of the held-out cells beside random weights and PCA; the pictures."""
    from launch.scores import score_and_draw

    return score_and_draw(demo.path, HELD_OUT, seed=demo.seed, resumed_at=demo.done["training"]["resumed_at"],
                          rows=metrics(demo.path("run")))


def scgpt(*words: str) -> dict[str, Any]:
    """Run a command of `scgpt`; what it answers with --json."""
    command = [sys.executable, "-m", "launch.cli", *words]
    say(f"$ scgpt {shlex.join(words)}")
    finished = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    _check(finished.returncode, f"scgpt {shlex.join(words)}")
    return dict(json.loads(finished.stdout.splitlines()[-1]))


def call(command: Sequence[str]) -> None:
    """Run a program whose output is for the reader."""
    say(f"$ {shlex.join([Path(command[0]).name, *command[1:]])}")
    _check(subprocess.run(command, env=quiet_environment(), check=False).returncode, shlex.join(command))  # noqa: S603


def _check(code: int, command: str) -> None:
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code != EXIT_DONE:
        raise CheckpointError(f"a step of the demo failed with code {code}", where=command,
                              fix="read its message above")


def table(demo: Demo) -> str:
    """What the demo found, for people."""
    corpus, scores = demo.done["corpus"], demo.done["scores"]
    tokens = ", ".join(f"{split['tokens']:,} {name}" for name, split in corpus["splits"].items())
    seconds = {name: found["seconds"] for name, found in demo.done.items() if "seconds" in found}
    seconds["together"] = sum(seconds.values())
    accuracy = scores["knn_accuracy"]
    rows = [
        ("cells", f"{corpus['cells_in']:,} in, {corpus['cells_kept']:,} kept, filtered: {describe_filtered(corpus)}"),
        ("gene values", tokens),
        ("training loss", f"{scores['train_first']:.1f} at the start, {scores['train_last']:.1f} at the end"),
        ("validation loss", f"{scores['valid']:.1f}; predicting each gene's mean: {scores['gene_mean']:.1f}"),
        ("cell types", f"15-NN accuracy {accuracy['trained']:.3f} on {scores['cells']:,} held-out cells"),
        ("", f"the same model with random weights: {accuracy['random']:.3f}; PCA: {accuracy['pca']:.3f}"),
        ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())),
        ("release", str(demo.path("release"))),
        ("pictures", f"{demo.path('loss.png')}, {demo.path('embedding.png')}"),
    ]
    return "\n".join(f"{name:16} {text}" for name, text in rows)


if __name__ == "__main__":
    sys.exit(main())
