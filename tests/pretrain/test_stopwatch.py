import time

import pytest
import torch

from pretrain.stopwatch import Stopwatch


def test_parts_add_up_until_they_are_taken():
    watch = Stopwatch(torch.device("cpu"))
    for seconds in (0.01, 0.02):
        with watch.part("forward"):
            time.sleep(seconds)
    taken = watch.take()
    assert set(taken) == {"forward"}
    assert taken["forward"] >= 0.03
    assert watch.take() == {}


@pytest.mark.gpu
def test_on_a_gpu_it_measures_the_stream_and_does_not_wait():
    watch = Stopwatch(torch.device("cuda"))
    started = time.perf_counter()
    with watch.part("forward"):
        torch.cuda._sleep(200_000_000)   # cycles: about 0.1 s
    assert time.perf_counter() - started < 0.05
    assert watch.take()["forward"] > 0.05
