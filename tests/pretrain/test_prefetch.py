import itertools
import signal
import subprocess
import sys
import threading
import time

import pytest

from pretrain.prefetch import Prefetch


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_whoever_is_fastest(workers):
    def make(number):
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number * number

    with Prefetch(make, iter(range(20)), workers=workers) as results:
        assert list(results) == [number * number for number in range(20)]
    assert not prefetch_threads()


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_than_the_bound_is_made_ahead(workers):
    begun = []

    def settled(n_expected):
        deadline = time.monotonic() + 10
        while len(begun) < n_expected and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)   # time to begin one too many
        return sorted(begun)

    with Prefetch(lambda number: begun.append(number), itertools.count(), workers=workers, ahead=3) as results:
        next(results)
        assert settled(4) == [0, 1, 2, 3]   # the one handed out, and three ahead
        next(results)
        assert settled(5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_is_raised_in_its_place_and_ends_the_threads(workers):
    def make(number):
        if number == 3:
            raise ValueError("cell 3 is broken")
        return number

    results = Prefetch(make, itertools.count(), workers=workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="cell 3 is broken"):
        next(results)
    assert not prefetch_threads()
    with pytest.raises(StopIteration):
        next(results)


def test_leaving_early_ends_the_threads():
    with Prefetch(lambda number: number, itertools.count(), workers=3) as results:
        assert next(results) == 0
        assert prefetch_threads()
    assert not prefetch_threads()


def test_waiting_is_measured_and_work_done_ahead_is_not():
    made = threading.Semaphore(0)

    def make(number):
        time.sleep(0.5)
        made.release()
        return number

    with Prefetch(make, itertools.count(), workers=1, ahead=1) as results:
        next(results)
        first = results.wait_s
        assert first >= 0.5
        made.acquire()
        made.acquire()   # the consumer's own work: the next item is made meanwhile
        next(results)
        assert results.wait_s - first < 0.4


@pytest.mark.parametrize(("ending", "code"), [("", 0), ("raise KeyboardInterrupt", -signal.SIGINT), ("os._exit(3)", 3)])
def test_nothing_outlives_the_process(ending, code):
    """A program that drops an endless iterator without closing it ends: else it would run for ever."""
    program = ("import itertools, os, time; from pretrain.prefetch import Prefetch\n"
               "results = Prefetch(lambda n: time.sleep(0.01), itertools.count(), workers=2)\n"
               f"next(results); print('begun', flush=True)\n{ending}")
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("begun\n", code), done.stderr
