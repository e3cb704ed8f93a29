import gzip
import json
from contextlib import closing
from pathlib import Path

import torch

from pretrain.tracing import traced


def recorded(folder: Path, n_steps: int, *, leave_after: int) -> tuple[list[int], list[Path]]:
    """Steps that were handed out, and traces that were told; each step multiplies matrices named after it."""
    seen: list[int] = []
    told: list[Path] = []
    with closing(traced(iter(range(1, n_steps + 1)), folder, first_step=11, device=torch.device("cpu"),
                        tell=told.append)) as steps:
        for step in steps:
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(2, 2) @ torch.ones(2, 2)
            seen.append(step)
            if step == leave_after:
                break
    return seen, told


def names(path: Path) -> set[str]:
    with gzip.open(path) as stream:
        return {event["name"] for event in json.load(stream)["traceEvents"]}


def test_steps_4_to_6_of_a_start_are_in_the_trace_and_every_step_is_handed_on(tmp_path):
    seen, told = recorded(tmp_path / "profile", 9, leave_after=9)
    assert seen == list(range(1, 10))
    assert told == [tmp_path / "profile" / "step-00000014-00000016.json.gz"]
    assert {name for name in names(told[0]) if name.startswith("step")} == {"step 4", "step 5", "step 6"}
    assert "aten::mm" in names(told[0])


def test_a_start_that_ends_early_leaves_what_it_has(tmp_path):
    assert recorded(tmp_path / "none", 9, leave_after=2) == ([1, 2], [])
    seen, told = recorded(tmp_path / "profile", 5, leave_after=9)
    assert seen == list(range(1, 6))
    assert [path.name for path in told] == ["step-00000014-00000015.json.gz"]
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["step-00000014-00000015.json.gz"]
