import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import ScheduleConfig
from pretrain.schedule import learning_rate


def rates(kind="cosine", warmup_steps=10, total_steps=110, lr=0.5):
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup_steps)
    return [learning_rate(step, lr=lr, schedule=schedule, total_steps=total_steps)
            for step in range(1, total_steps + 1)]


def test_warmup_rises_in_equal_steps_to_the_full_rate():
    assert rates()[:10] == pytest.approx([0.05 * step for step in range(1, 11)])


def test_the_cosine_begins_at_the_full_rate_passes_half_in_the_middle_and_ends_just_above_zero():
    curve = rates()
    assert curve[10] == 0.5
    assert curve[60] == pytest.approx(0.25)
    assert 0 < curve[-1] < 0.001
    assert curve[10:] == sorted(curve[10:], reverse=True)


def test_constant_stays():
    assert set(rates(kind="constant")[10:]) == {0.5}


@pytest.mark.parametrize(("warmup_steps", "interval", "factor"), [(0, 100, 0.99), (0, 7, 0.5), (10, 7, 0.5)])
def test_steps_are_those_of_torchs_schedule_after_the_warmup(warmup_steps, interval, factor):
    schedule = ScheduleConfig(kind="step", warmup_steps=warmup_steps, interval=interval, factor=factor)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    torchs = torch.optim.lr_scheduler.StepLR(optimizer, interval, factor)
    for step in range(warmup_steps + 1, 400):
        rate = learning_rate(step, lr=0.5, schedule=schedule, total_steps=400)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        torchs.step()


def test_no_warmup_begins_at_the_full_rate():
    assert rates(warmup_steps=0)[0] == 0.5


@given(st.integers(0, 50), st.integers(1, 80), st.integers(1, 200))
def test_the_rate_is_never_negative_nor_above_the_highest(warmup_steps, total_steps, step):
    rate = learning_rate(step, lr=0.5, schedule=ScheduleConfig(warmup_steps=warmup_steps), total_steps=total_steps)
    assert 0 <= rate <= 0.5
