"""stderr of a program that outlives whoever reads it.

Where stderr leads nowhere any more (`2>&1 | head`, a terminal that was closed, a full disk), what is shown is dropped
from then on, and the work goes on.
"""
import io
import os
import sys


class LastingStderr(io.TextIOBase):
    """stderr, which becomes /dev/null when it can no longer be written to."""

    def write(self, text: str) -> int:
        """Write and flush; the characters taken."""
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            _lead_nowhere()
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""

    def isatty(self) -> bool:
        """Whether a terminal shows it."""
        return sys.stderr.isatty()

    def fileno(self) -> int:
        """stderr's own."""
        return sys.stderr.fileno()


def _lead_nowhere() -> None:
    """For the whole process: other libraries write there too, and Python flushes what it still holds at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stderr.fileno())
    os.close(nowhere)


def say(line: str) -> None:
    """One line to stderr."""
    LastingStderr().write(f"{line}\n")
