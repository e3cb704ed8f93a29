import itertools
import operator
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.charts import bar, histogram

RECT = re.compile(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"/>')


@given(st.floats(1e-3, 1e3), st.lists(st.tuples(st.floats(1.01, 10), st.integers(0, 1000)), min_size=1, max_size=30))
def test_areas_are_as_the_cells(first: float, bins: list[tuple[float, int]]) -> None:
    edges = [*itertools.accumulate((growth for growth, _ in bins), operator.mul, initial=first)]
    cells = [count for _, count in bins]
    drawn = histogram(edges, cells, mark=edges[0], label="x")
    rects = np.array([[float(number) for number in rect] for rect in RECT.findall(drawn)]).reshape(-1, 4)
    filled = [place for place, count in enumerate(cells) if count]
    assert len(rects) == len(filled)
    assert (rects[:, :2] >= 0).all()
    assert (rects[:, 1] + rects[:, 3] == pytest.approx(100, abs=0.02)) if len(rects) else True
    share = np.diff(np.log(edges))[filled] / (np.log(edges[-1]) - np.log(edges[0]))
    density = np.array(cells)[filled] / share
    for height, expected in zip(rects[:, 3], 100 * density / max(density, default=1), strict=True):
        assert height == pytest.approx(expected, abs=0.02)


def test_ticks_are_round_and_inside() -> None:
    drawn = histogram([10, 100, 1000, 50_000], [1, 2, 3], mark=30, label="genes")
    assert re.findall(r'<span style="left:[\d.]+%">([^<]+)</span>', drawn) == [
        "10", "30", "100", "300", "1,000", "3,000", "10,000", "30,000"]
    assert all(float(place) < 95 for place in re.findall(r'<span style="left:([\d.]+)%">', drawn))


def test_a_bar_shows_shares_and_leaves_out_what_is_nothing() -> None:
    drawn = bar([(30, ""), (0, "gone-1"), (10, "gone-2")], 80, "30 of 80")
    assert drawn == ('<div class="bar" role="img" aria-label="30 of 80"><i style="width:37.500%"></i>'
                     '<i class="gone-2" style="width:12.500%"></i></div>')
