"""Settings of all tests: a test that hangs fails, none fails for its time on a busy machine or for who started it."""
import signal
from pathlib import Path

import pytest
from hypothesis import settings

SLOW_S = 1200   # a start of a training takes 5 s on two idle cores, and was seen to take 50 beside other work

settings.register_profile("untimed", settings(), deadline=None)   # else as Hypothesis has it here, or under CI
settings.load_profile("untimed")

# A script that starts tests with `&` has them ignore Ctrl-C, nohup a closed terminal: they send both, to children too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of whole programs have at least SLOW_S, all others what pyproject.toml says."""
    for item in items:
        if any(item.get_closest_marker(name) for name in ("slow", "system")):
            given = item.get_closest_marker("timeout")
            if given is None or given.args[0] < SLOW_S:
                item.add_marker(pytest.mark.timeout(SLOW_S), append=False)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 random cells to train on and 13 held out, for trainings that only read them."""
    from tests.pretrain.runs import make_corpus  # it imports torch, which other tests do without

    return make_corpus(tmp_path_factory.mktemp("cells") / "corpus")
