"""How a program of ours ends."""
import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End the process with `code`: exit handlers run and output is flushed, but the interpreter is not taken apart.

    Taking it apart aborts a process (std::terminate) whose native threads still want it: those of gloo live as long as
    the groups that DeepSpeed keeps, and one that is late to drop the last collective's tensors failed runs that had
    finished.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):   # nobody reads it any more
            stream.flush()
    os._exit(code)
