"""Train: `deepspeed [launcher options] pretrain/train.py CONFIG [key=value ...] --out RUN`, or `scgpt train` alone."""
import sys
from pathlib import Path

if __name__ == "__main__":   # run as a script, its folder comes first: `pretrain` is found beside it, not in it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
from collections.abc import Sequence

from scgpt.errors import ConfigError, ScgptError
from scgpt.process import begin_program, exit_code, print_answer, run_program
from scgpt.stderr import say
from scgpt.words import path


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train; the exit code, see scgpt/errors.py.

    A failure is one sentence on stderr, from rank 0 or from the rank that has it alone.
    """
    begin_program()
    parser = argparse.ArgumentParser(prog="pretrain/train.py", description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one that ships")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="settings on top of it")
    parser.add_argument("--out", type=path, metavar="RUN", help="run directory; an interrupted run is continued")
    parser.add_argument("--print-deepspeed-config", action="store_true", help="print what DeepSpeed is given, and stop")
    parser.add_argument("--profile", action="store_true", help="trace a few steps into RUN/profile")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)   # the launcher's; LOCAL_RANK says the same
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args(argv)
    return exit_code(lambda: _run(args), debug=args.debug, tell=_tell)   # the loop has signal handlers of its own


def _tell(sentence: str, error: Exception | None) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        say(sentence if error is None else f"error: {sentence}")
    elif error is not None and not _is_of_all_ranks(error):
        say(f"error: rank {rank}: {sentence}")


def _is_of_all_ranks(error: Exception) -> bool:
    """Whether every rank raises it, so that one tells it."""
    if not isinstance(error, ScgptError):
        return False
    from pretrain.world import RankError

    return not isinstance(error, RankError)


def _run(args: argparse.Namespace) -> int:
    from pretrain.config import TrainConfig
    from scgpt.config import load_config

    config = load_config(TrainConfig, args.config, args.overrides, kind="pretrain")
    if args.print_deepspeed_config:
        from pretrain.deepspeed_json import describe_json

        print_answer(describe_json(config, int(os.environ.get("WORLD_SIZE", "1"))))
        return 0
    if args.out is None:
        raise ConfigError("there is no run directory", where="command line", fix="give --out RUN")
    from pretrain.loop import train

    return train(config, args.out, profile=args.profile)


if __name__ == "__main__":
    run_program(main)
