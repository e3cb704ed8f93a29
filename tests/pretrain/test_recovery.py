import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from pretrain.recovery import Interruption, hold_rank, rollback_targets
from pretrain.world import World, join_world
from scgpt.errors import CheckpointError
from scgpt.process import INTERRUPTING, signals_interrupt

_HOLDER = """
import fcntl, sys
stream = open(sys.argv[1], "a+")
fcntl.flock(stream, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def world():
    with join_world(timeout_s=10) as joined:
        yield joined


def hold_elsewhere(path):
    """A process that holds a rank's lock until its stdin is closed."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("4711 elsewhere\n")
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, str(path)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_process_alone_is_rank_0_of_1_without_a_port_and_leaves_no_trace(world):
    assert world == World(0, 0, 1, 1, torch.device("cpu"))
    assert "MASTER_PORT" not in os.environ
    assert world.sum(torch.tensor([1.5, 2.5], dtype=torch.float64)).tolist() == [1.5, 2.5]
    assert world.gather("a") == ["a"]


def test_a_failure_of_rank_0_is_raised_as_it_is(world):
    def fail():
        raise CheckpointError("torn")

    with pytest.raises(CheckpointError, match="torn"):
        world.of_first(fail)


def test_a_held_run_names_its_process(world, tmp_path):
    with hold_rank(tmp_path, world, tell=pytest.fail):
        assert (tmp_path / "ranks" / "rank-00000").read_text().split()[0] == str(os.getpid())


@pytest.mark.parametrize("name", ["rank-00000", "rank-00005"])   # 5: a rank that this start does not have
def test_ranks_of_the_last_start_are_waited_for(world, tmp_path, name):
    process, told = hold_elsewhere(tmp_path / "ranks" / name), []

    def tell(line):
        told.append(line)
        process.stdin.close()   # now it ends

    with hold_rank(tmp_path, world, tell=tell, wait_s=60):
        assert process.wait(timeout=60) == 0   # it has gone before we began
    assert told == ["waiting for process 4711 on elsewhere, a rank of the last start that is still there"]
    process.stdout.close()


def test_a_run_in_use_is_refused_and_its_process_named(world, tmp_path):
    process = hold_elsewhere(tmp_path / "ranks" / "rank-00000")
    held = hold_rank(tmp_path, world, tell=lambda line: None, wait_s=0.2)
    with pytest.raises(CheckpointError, match="the run is in use: process 4711 on elsewhere"), held:
        pytest.fail("it began beside the other")
    process.kill()
    process.communicate()
    with hold_rank(tmp_path, world, tell=pytest.fail):   # the kernel dropped the lock with the process
        pass


@pytest.mark.parametrize("number", INTERRUPTING)
def test_a_signal_asks_to_stop_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with Interruption(None) as interruption:
        assert interruption.reason is None
        os.kill(os.getpid(), number)
        assert interruption.reason == f"signal {number.name}"
    assert signal.getsignal(number) == before


def test_a_signal_that_was_swallowed_before_asks_to_stop():
    with signals_interrupt():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        with Interruption(None) as interruption:
            assert interruption.reason == "signal SIGTERM"


def test_a_hang_up_that_is_ignored_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)   # as nohup does
    try:
        with Interruption(None) as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_twice_ends_at_once():
    with Interruption(None) as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interruption.reason == "signal SIGINT"


def test_the_time_limit_asks_to_stop():
    with Interruption(3600.0) as interruption:
        assert interruption.reason is None
    with Interruption(0.05) as interruption:
        time.sleep(0.06)
        assert interruption.reason == "train.max_time_s is over"


@pytest.mark.parametrize(("saved", "last_update", "rollbacks", "expected"), [
    ([10, 20, 30], 33, [], [30, 20, 10]),
    ([10, 20, 30], 30, [], [20, 10]),               # what was saved right before the trouble may be its cause
    ([10, 20, 27, 28], 29, [], [20, 10, 28, 27]),   # others are of interruptions: an uninterrupted run has none there
    ([10, 20, 30, 34], 37, [[20, 34]], [34, 10]),   # 34 has the weights of 20, and an update after them was finite
    ([10, 20, 30, 34], 34, [[20, 34]], [10]),       # none was: 20 is no better
    ([10, 14], 14, [[10, 14]], []),
    ([], 5, [], []),
])
def test_a_run_goes_back_to_the_newest_weights_that_did_not_lead_to_trouble(saved, last_update, rollbacks, expected):
    assert rollback_targets(saved, last_update=last_update, rollbacks=rollbacks, save_every=10) == expected
