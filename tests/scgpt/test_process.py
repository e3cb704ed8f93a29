"""A program ends with its code, whatever its threads are at."""
import subprocess
import sys

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
