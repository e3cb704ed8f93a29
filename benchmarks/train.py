"""What the training loop costs beside a bare forward, backward and update of the same engine on the same batches.

    python benchmarks/train.py                            # scgpt-10m, 60 steps of 32 cells: some 5 minutes on 2 cores
    python benchmarks/train.py --steps 20 --out docs/benchmarks/train.md

One process, two sides that take turns step by step: the real loop (loader, counts, seeds, learning rate, metrics rows,
checkpoints), then the bare step on the batch that it has just done, its tensors and counts at hand. A side's figure is
the median of its steps, and the difference is the median of pairs, so what else the machine does meets both. Rows and
checkpoints come every few steps here, and are charged at the intervals of --log-every and --save-every.
"""
import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.data_sides import pipeline, write_cells
from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.data import BatchTensors, GlobalStep, Loader
from pretrain.engine import Engine
from pretrain.loop import Training
from pretrain.metrics import METRICS, read_rows
from pretrain.prefetch import Prefetch
from pretrain.recovery import Interruption
from pretrain.run_directory import open_run
from pretrain.world import join_world
from scgpt.config import load_config

WARM_UP = 3       # steps that are not counted
ROW_EVERY, CHECKPOINT_EVERY = 5, 20   # steps, in this run
PARTS = ("to_device_s", "forward_s", "backward_s", "optimizer_s")


class Turns:
    """The loader of a training; after each step, before the next one is asked for, the bare side has its turn.

    So what the loader prepares ahead, begun when a step is handed out, runs during the loop's turn.
    """

    def __init__(self, loader: Loader, engine: Engine) -> None:
        self._loader, self._engine = loader, engine
        self.loop_s: list[float] = []   # of each step: the wait for its batch, and all that the loop does with it
        self.waits_s: list[float] = []
        self.bare_s: list[float] = []

    @property
    def wait_s(self) -> float:
        """As the loader's."""
        return self._steps.wait_s

    def batches(self, first_step: int = 0) -> "Turns":
        """As the loader's."""
        self._steps: Prefetch[GlobalStep] = self._loader.batches(first_step)
        return self

    def __enter__(self) -> "Turns":
        self._steps.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._steps.close()

    def __iter__(self) -> Iterator[GlobalStep]:
        while True:
            begun = time.perf_counter()
            step = next(self._steps)
            self.waits_s.append(time.perf_counter() - begun)
            yield step
            self.loop_s.append(time.perf_counter() - begun)
            self.bare_s.append(self._bare(step))

    def _bare(self, step: GlobalStep) -> float:
        """Seconds of forward, backward and update alone."""
        engine = self._engine
        counts = engine.objective.counts(step.micro_batches, step=step.step)
        tensors: list[BatchTensors] = [batch.to(engine.world.device) for batch in step.tensors]
        begun = time.perf_counter()
        for batch in tensors:
            sums = engine.objective.sums(engine.deepspeed, batch, step=step.step)
            engine.deepspeed.backward(sums.scaled(counts=counts, copies=len(tensors)))
            engine.deepspeed.step()
        return time.perf_counter() - begun


def timed(call: Callable[..., None]) -> tuple[Callable[..., None], list[float]]:
    """The same call, and the list that its seconds go into."""
    seconds: list[float] = []

    def wrapped(*args: Any) -> None:
        begun = time.perf_counter()
        call(*args)
        seconds.append(time.perf_counter() - begun)

    return wrapped, seconds


def measure(config: TrainConfig, run: Path) -> dict[str, Any]:
    """Seconds of each side, of rows and of checkpoints."""
    with ExitStack() as stack:
        corpus = Corpus.open(config)
        interruption = stack.enter_context(Interruption(None))
        world = stack.enter_context(join_world(timeout_s=600))
        training = Training(config, corpus, stack.enter_context(open_run(config, run, corpus, world)), world,
                            interruption)
        turns = Turns(training.loader, training.engine)
        training.loader = turns  # type: ignore[assignment]
        training._tell, tell_s = timed(training._tell)  # type: ignore[method-assign]
        training._save, save_s = timed(training._save)  # type: ignore[method-assign]
        training.run()
    rows = [row for row in read_rows(run / METRICS) if row["split"] == "train"][1:]
    return {"loop_s": turns.loop_s, "wait_s": turns.waits_s, "bare_s": turns.bare_s, "tell_s": tell_s, "save_s": save_s,
            "parts": {name: statistics.median(row[name] for row in rows) for name in PARTS},
            "tokens": statistics.median(row["tokens_per_s"] * row["step_time_s"] for row in rows)}


def summary(found: dict[str, Any], *, log_every: int, save_every: int) -> dict[str, float]:
    """Seconds a step by part, and the shares of a bare step that the loop adds; of steps without row or checkpoint."""
    plain = [number for number in range(WARM_UP, len(found["loop_s"]))
             if (number + 1) % ROW_EVERY and (number + 1) % CHECKPOINT_EVERY]
    median = statistics.median
    bare = median(found["bare_s"][number] for number in plain)
    wait = median(found["wait_s"][number] for number in plain)
    pairs = [found["loop_s"][number] - found["bare_s"][number] for number in plain]
    added, (lower, _, upper) = median(pairs), statistics.quantiles(pairs, n=4)
    parts = found["parts"]
    row, checkpoint = median(found["tell_s"]) / log_every, median(found["save_s"]) / save_every
    loop = median(found["loop_s"][number] for number in plain)
    return {"bare": bare, "loop": loop, "data wait": wait, "to device": parts["to_device_s"],
            "forward": parts["forward_s"], "backward": parts["backward_s"], "optimizer": parts["optimizer_s"],
            "all else": added - wait - parts["to_device_s"], "metrics": row, "checkpoint": checkpoint,
            "checkpoint itself": median(found["save_s"]), "row itself": median(found["tell_s"]),
            "overhead": (added + row + checkpoint) / bare, "overhead of the loop": added / bare,
            "lower quartile": lower / bare, "upper quartile": upper / bare,
            "overhead of metrics": row / bare, "overhead of checkpoints": checkpoint / bare, "steps": len(plain)}


def page(told: dict[str, float], options: argparse.Namespace, tokens: float) -> str:
    """The page with what it was measured on."""
    import torch

    command = " ".join(["python benchmarks/train.py", *sys.argv[1:]])
    lines = [f"| {name} | {1e3 * told[name]:,.2f} | {told[name] / told['bare']:.2%} |"
             for name in ("bare", "loop", "data wait", "to device", "forward", "backward", "optimizer", "all else",
                          "metrics", "checkpoint")]
    return (f"# What the training loop costs\n\n`{command}` ({platform.machine()}, {torch.get_num_threads()} threads, "
            f"torch {torch.__version__}): {options.model}, steps of {options.cells} cells ({tokens:,.0f} tokens) in "
            f"two micro-batches, float32; medians of {told['steps']:.0f} pairs of steps in turns. The loop adds "
            f"**{told['overhead']:.2%}** to a bare forward, backward and update: {told['overhead of the loop']:.2%} in "
            f"each step (half of the pairs: {told['lower quartile']:.2%} to {told['upper quartile']:.2%}), "
            f"{told['overhead of metrics']:.2%} for a row every {options.log_every} steps "
            f"({1e3 * told['row itself']:,.1f} ms each), {told['overhead of checkpoints']:.2%} for a checkpoint every "
            f"{options.save_every} ({told['checkpoint itself']:,.2f} s each, durable and hashed).\n\n"
            "| part | ms a step | of a bare step |\n|---|---|---|\n" + "\n".join(lines) + "\n\n"
            "`loop` is a step without row and checkpoint. `all else` is the median of pairs (loop - bare) less the "
            "wait and the copy: counting, the all-reduce of counts, seeds, learning rate, sums for the row.\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scgpt-10m", help="a model configuration that ships (default scgpt-10m)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each side (default 60)")
    parser.add_argument("--cells", type=int, default=32, help="cells a step, in two micro-batches (default 32)")
    parser.add_argument("--log-every", type=int, default=10, help="steps a row is charged to (default 10)")
    parser.add_argument("--save-every", type=int, default=1000, help="steps a checkpoint is charged to (default 1000)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a page")
    parser.add_argument("--out", type=Path, help="also write the page there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cells(folder / "cells.h5ad", max(200, 8 * options.cells))
        pipeline(folder / "cells.h5ad", folder / "corpus", 1)
        model = Path(__file__).resolve().parents[1] / "configs" / "model" / f"{options.model}.yaml"
        (folder / "train.yaml").write_text(f"include: {model}\n")
        config = load_config(TrainConfig, str(folder / "train.yaml"), [
            f"data.corpus={folder / 'corpus'}", "data.valid_split=null", f"train.max_steps={options.steps}",
            f"batch.global_batch_size={options.cells}", f"batch.micro_batch_size={options.cells // 2}",
            f"train.log_every={ROW_EVERY}", f"train.save_every={CHECKPOINT_EVERY}", "train.keep_last=1",
            "model.dropout=0.0", "model.attention_dropout=0.0", "train.precision=fp32"], kind="pretrain")
        found = measure(config, folder / "run")
    told = summary(found, log_every=options.log_every, save_every=options.save_every)
    text = json.dumps(told) if options.json else page(told, options, found["tokens"])
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
