"""Threads of this process as the workers of a build."""
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.build_dir import BuildDir, Record
from data_pipeline.progress import Progress
from data_pipeline.tasks import Layout
from data_pipeline.workers import Job, Threads
from tests.data_pipeline.atlases import config_of


class Interrupted(list[Job]):
    """Jobs of which only some are handed out before Ctrl-C; `units` of all can be counted first."""

    def __init__(self, jobs: list[Job], then: threading.Event) -> None:
        super().__init__(jobs)
        self._counted, self._then = False, then

    def __iter__(self) -> Iterator[Job]:
        yield from super().__iter__()
        if self._counted:
            threading.Timer(0.3, self._then.set).start()
            raise KeyboardInterrupt
        self._counted = True


def test_an_interruption_while_jobs_are_handed_out_begins_no_further_one(tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads(tmp_path)
    monkeypatch.setattr(threads, "_n_threads", 1)
    go_on, begun = threading.Event(), list[int]()

    def work(layout: Layout, number: int) -> Record:
        begun.append(number)
        go_on.wait(timeout=10)
        return {}

    layout = Layout(BuildDir(tmp_path, "0" * 64), config_of(tmp_path / "a.h5ad"), n_values=0, n_shards=(1, 1))
    jobs = Interrupted([Job(work, f"task-{number}", 1, (number,)) for number in range(4)], go_on)
    with pytest.raises(KeyboardInterrupt):
        threads.run("work", layout, jobs, "parts", Progress())
    assert begun in ([], [0])   # the thread may not have come to the first
