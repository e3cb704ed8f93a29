"""A program begins with streams that are its own, and ends with its code, whatever its threads are at."""
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scgpt.errors import ConfigError
from scgpt.process import INTERRUPTING, Interrupter, exit_code, signals_interrupt

ROOT = Path(__file__).parents[2]

PROGRAM = """
import atexit, threading
import torch
from scgpt.process import end_process

def work():
    while True:
        torch.rand(3000).sort()

atexit.register(print, "handled", end="")
threading.Thread(target=work, daemon=True).start()
print("finished, ", end="")
end_process({code})
"""


def test_native_threads_do_not_abort_a_process_that_ends() -> None:
    for code in (0, 75, 3):
        ended = subprocess.run([sys.executable, "-c", PROGRAM.format(code=code)], capture_output=True, text=True,
                               check=False)
        assert (ended.returncode, ended.stdout, ended.stderr) == (code, "finished, handled", "")


def test_a_closed_output_does_not_keep_a_process_from_its_code() -> None:
    program = ("import sys; from scgpt.process import end_process; sys.stdout = open(1, 'w'); "
               "sys.stdout.write('lost'); end_process(75)")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait() == 75


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error
    return work


@pytest.mark.parametrize(("work", "code", "says"), [
    (lambda: 3, 3, ""), (raising(ConfigError("no", fix="do")), 2, "error: no; do\n"),
    (raising(MemoryError("all")), 1, "error: the memory is used up: all; make the model, "),
    (raising(KeyboardInterrupt()), 75, "interrupted: the same command continues\n")])
def test_what_ends_the_work_of_a_program_is_its_code_and_one_sentence(capsys, work, code, says) -> None:
    assert exit_code(work, debug=False) == code
    said = capsys.readouterr().err
    assert said.startswith(says)
    assert said.count("\n") == bool(says)


def test_a_fault_of_the_program_is_raised_on_and_a_traceback_is_shown_where_it_is_asked_for(capsys) -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(raising(ZeroDivisionError()), debug=False)
    assert exit_code(raising(ConfigError("no")), debug=True) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("Traceback")
    assert said[-1] == "error: no"


STREAMS = """
import os, sys
from scgpt.process import open_streams
open_streams()
stream = open(sys.argv[1], "w")
print("an answer")
print("a warning", file=sys.stderr)
os.write(2, b"a library's own")
stream.write("rows")
"""


def test_nothing_else_takes_the_place_of_streams_that_are_closed(tmp_path: Path) -> None:
    program, rows = tmp_path / "program.py", tmp_path / "rows"
    program.write_text(STREAMS)
    for closed in ("2>&-", "0<&- 2>&-", "0<&- >&- 2>&-"):
        ended = subprocess.run(["bash", "-c", f'exec "$0" "$@" {closed}', sys.executable, str(program), str(rows)],
                               capture_output=True, check=False)
        assert ended.returncode == 0
        assert rows.read_text() == "rows"


SHORTENED = """
import mmap, os, sys
from scgpt.process import run_program

def read_the_end():
    with open(sys.argv[1], "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        os.ftruncate(file.fileno(), 0)
        return mapped[-1]

run_program(read_the_end)
"""


def test_a_process_that_is_ended_for_a_shortened_file_says_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100_000))
    ended = subprocess.run([sys.executable, "-c", SHORTENED, str(tmp_path / "file")], capture_output=True, text=True,
                           check=False)
    assert ended.returncode == -signal.SIGBUS
    assert "Bus error" in ended.stderr
    assert "in read_the_end" in ended.stderr


@pytest.mark.parametrize("number", INTERRUPTING)
def test_signals_raise_and_what_was_raised_is_remembered(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with signals_interrupt():
        handler = signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert isinstance(handler, Interrupter)
        assert handler.number == number
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)   # raises nothing
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_answer_that_cannot_be_written_is_a_failure() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        for words in (["-m", "launch.cli", "config", "list"], ["-m", "launch.cli", "--help"],
                      ["-m", "launch.cli", "train", "demo", "data.corpus=x", "--print-deepspeed-config"],
                      ["pretrain/train.py", "demo", "data.corpus=x", "--print-deepspeed-config"]):
            done = subprocess.run([sys.executable, *words], stdout=full, stderr=subprocess.PIPE, text=True,
                                  check=False, cwd=ROOT, env=os.environ | {
                                      "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""})   # else argparse hides it
            assert done.returncode == 1
            assert done.stderr.startswith("error: what was done cannot be told: No space left on device (stdout); ")
            assert len(done.stderr.splitlines()) == 1


def test_a_failure_keeps_its_code_where_the_answer_is_lost_too() -> None:
    program = "import sys; from scgpt.process import end_process; sys.stdout.write('lost'); end_process(75)"
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True,
                              check=False, env=os.environ | {"PYTHONUNBUFFERED": ""})
    assert done.returncode == 75
    assert "what was done cannot be told" in done.stderr
