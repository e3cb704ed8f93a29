"""A training of which one rank stops (SIGSTOP: it lives, holds its connections, and does nothing) at a chosen place.

    stopping.py PLACE TRAINING-ARGUMENTS     PLACE: step, checkpoint or validation
"""
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from pretrain import checkpoint, train
from pretrain.engine import Engine
from pretrain.evaluation import HeldOut

AFTER = 12   # optimizer steps


def stopping(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, before which rank 1 stops once it has made AFTER steps."""
    def stopped(*args: Any, **options: Any) -> Any:
        if os.environ.get("RANK") == "1" and done[0] >= AFTER:
            os.kill(os.getpid(), signal.SIGSTOP)
        return method(*args, **options)
    return stopped


def counting(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method; `done` counts its calls."""
    def counted(*args: Any, **options: Any) -> Any:
        done[0] += 1
        return method(*args, **options)
    return counted


done = [0]
if __name__ == "__main__":
    place, words = sys.argv[-1], sys.argv[1:-1]
    if place == "step":
        Engine._sums = stopping(Engine._sums)
    elif place == "checkpoint":
        checkpoint._durable_sums = stopping(checkpoint._durable_sums)
    else:
        HeldOut.loss = stopping(HeldOut.loss)
    Engine.train = counting(Engine.train)
    sys.exit(train.main(words))
