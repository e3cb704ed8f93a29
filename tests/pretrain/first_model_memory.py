"""A program of the tests: what memory a rank takes until DeepSpeed gets the model.

    first_model_memory.py FOLDER key=value ...

Each rank writes [bytes that the process has grown by at most, bytes of the whole model in float32] to FOLDER/RANK.json.
"""
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.deepspeed_package import quiet_deepspeed
from pretrain.engine import Engine
from pretrain.world import join_world
from scgpt.config import load_config
from scgpt.process import end_process


def memory(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


class Enough(Exception):
    """The model is there."""


def main(folder: Path, words: list[str]) -> None:
    """Build the model of a configuration."""
    config = load_config(TrainConfig, "demo", words, kind="pretrain")
    with join_world(timeout_s=120) as world:
        corpus = Corpus.open(config)
        quiet_deepspeed(world.device)
        import deepspeed

        def stop(**options: Any) -> None:
            raise Enough

        deepspeed.initialize = stop
        small = config.model_copy(update={"model": config.model.model_copy(update={"n_layers": 1})})
        with suppress(Enough):
            Engine(small, corpus.vocab, world)   # loads what is loaded on first use
        Path("/proc/self/clear_refs").write_text("5")   # the peak begins anew
        before = memory("VmRSS")
        with suppress(Enough):
            Engine(config, corpus.vocab, world)
        found = [memory("VmHWM") - before, 4 * config.model.count_parameters(len(corpus.vocab))]
        (folder / f"{world.rank}.json").write_text(json.dumps(found))
        world.barrier()


if __name__ == "__main__":
    place, *settings = (word for word in sys.argv[1:] if not word.startswith("--"))   # the launcher's own
    main(Path(place), settings)
    end_process(0)
