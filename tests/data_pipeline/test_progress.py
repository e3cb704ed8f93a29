import io
import time

import pytest

from data_pipeline import progress as module
from data_pipeline.progress import Progress


def test_without_a_terminal_there_are_lines_with_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINE_EVERY_S", 0.0)
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.start("tokenise", 3000, "cells", found=1000)
        time.sleep(0.01)
        progress.advance(500)
        progress.finish()
    first, middle, last = stream.getvalue().splitlines()
    assert first == "tokenise: 3,000 cells, 1,000 of them done before"
    assert "1,500 of 3,000 cells" in middle
    assert "cells/s" in middle
    assert "s left" in middle
    assert last.startswith("tokenise: done in 0.0 s")


def test_on_a_terminal_there_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(stream) as progress:
        progress.start("merge", 4, "shards")
        for _ in range(4):
            progress.advance(1)
        progress.finish()
    assert "merge" in stream.getvalue()
    assert "4/4" in stream.getvalue()
