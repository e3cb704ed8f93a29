"""How a program of ours begins and ends: its streams, the signals that interrupt it, its answer, its exit code."""
import atexit
import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from scgpt.errors import EXIT_FAILED, EXIT_INTERRUPTED, ScgptError, explain
from scgpt.stderr import say

# What schedulers send, a terminal that is closed, and Ctrl-C.
INTERRUPTING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


def begin_program() -> None:
    """Before anything heavy is imported or opened: streams of our own, and threads that sleep while they wait."""
    open_streams()
    # Spinning, two threads on a busy machine made a training step ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")   # read once, when torch is imported


def open_streams() -> None:
    """Lead standard streams that were closed (`2>&-`) to /dev/null: the next file to be opened would take their place.

    What libraries write to stderr would go into that file. Call it before anything is opened.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:   # so Python marks those that it found closed
            nowhere = os.open(os.devnull, os.O_RDWR)   # the lowest number that is free: that of the stream
            setattr(sys, name, os.fdopen(nowhere, mode, closefd=False))


class Interrupter:
    """A signal handler that raises KeyboardInterrupt, and remembers the signal.

    Some libraries swallow what is raised while they are imported: whoever handles signals next looks at `number`.
    """

    number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note and raise."""
        self.number = number
        raise KeyboardInterrupt


def may_interrupt(number: signal.Signals) -> bool:
    """Whether a signal means the process: `nohup` has it ignore SIGHUP."""
    return signal.getsignal(number) is not signal.SIG_IGN


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block at INTERRUPTING: what is open is closed; the code is that of going on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = Interrupter()
    before = {number: signal.signal(number, handler) for number in INTERRUPTING if may_interrupt(number)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _tell(sentence: str, error: Exception | None) -> None:
    say(sentence if error is None else f"error: {sentence}")


def exit_code(work: Callable[[], int], *, debug: bool,
              tell: Callable[[str, Exception | None], None] = _tell) -> int:
    """Do what a program is for: the exit code that it returns, or that of what ended it, told in one sentence.

    Signals interrupt it. What must be a fault of the program itself is raised on.

    Args:
        work: returns an exit code, or raises.
        debug: show the traceback of an error first.
        tell: is given the sentence and the error, None for an interruption; stderr, where it is not said.
    """
    try:
        with signals_interrupt():
            return work()
    except KeyboardInterrupt:
        tell("interrupted: the same command continues", None)
        return EXIT_INTERRUPTED
    except Exception as found:
        error = explain(found)
        if error is None:
            raise
        if debug:
            traceback.print_exc()
        tell(str(error), found)
        return error.exit_code


def print_answer(text: str) -> None:
    """Print what a program was asked for, and flush it. A reader that has seen enough (`| head`) is no failure.

    Raises ScgptError where stdout cannot be written, as on a full disk: whoever asked has no answer, or half of one.
    """
    try:
        print(text, flush=True)  # noqa: T201 the answer
    except BrokenPipeError:
        _lead_nowhere()   # what the buffer still holds is not flushed at exit
    except OSError as error:
        _lead_nowhere()
        raise _untold(error) from error


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run `main`, then end the process with the code that it returns, or that argparse raises.

    Where the kernel ends it for what native code does (it read a mapped file that was shortened), stderr says where.
    """
    faulthandler.enable(file=2, all_threads=False)
    try:
        code = main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else EXIT_FAILED
    end_process(code)


def end_process(code: int) -> NoReturn:
    """End the process with `code`: exit handlers run and output is flushed, but the interpreter is not taken apart.

    Taking it apart aborts a process (std::terminate) whose native threads still want it: those of gloo live as long as
    the groups that DeepSpeed keeps, and one that is late to drop the last collective's tensors failed runs that had
    finished.
    """
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        pass   # nobody reads it any more
    except OSError as error:
        say(f"error: {_untold(error)}")
        code = code or EXIT_FAILED
    except ValueError:
        pass   # it was closed
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def _untold(error: OSError) -> ScgptError:
    return ScgptError(f"what was done cannot be told: {error.strerror or error}", where="stdout",
                      fix="give it a file on a disk with room")


def _lead_nowhere() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
