"""Bars and histograms as HTML and SVG: no script, colours from the page's style sheet, labels that keep their size."""
import itertools
import math
from collections.abc import Sequence

from data_pipeline.markup import Html, tag

_LAST_TICK = 95   # per cent of the axis: a label further right would stick out
_LEAST = 1e-9     # what a value of 0 counts as on a logarithmic axis


def bar(parts: Sequence[tuple[float, str]], whole: float, label: str) -> Html:
    """A bar of parts (size, class of the style sheet); what they leave of the whole stays empty."""
    pieces = (tag("i", class_=kind or None, style=f"width:{100 * size / max(whole, 1):.3f}%")
              for size, kind in parts if size)
    return tag("div", *pieces, class_="bar", role="img", aria_label=label)


def histogram(edges: Sequence[float], cells: Sequence[int], *, mark: float, label: str) -> Html:
    """A histogram over a logarithmic axis with round ticks, and a line at `mark`.

    Args:
        edges: of the bins, ascending, (bins + 1,).
        cells: in each bin, (bins,). The area of a bar tells them, so that bins of unequal width do not mislead.
        mark: where the line stands.
        label: for who cannot see it.
    """
    first, last = _log(edges[0]), _log(edges[-1])
    width = max(last - first, _LEAST)

    def across(value: float) -> float:
        return 100 * (_log(value) - first) / width

    sides = [(across(low), across(high)) for low, high in itertools.pairwise(edges)]
    heights = [count / max(right - left, _LEAST) for count, (left, right) in zip(cells, sides, strict=True)]
    top = max(heights, default=0) or 1.0
    bars = (Html(f'<rect x="{left:.3f}" y="{100 * (1 - height / top):.2f}" width="{max(right - left - 0.25, 0.1):.3f}" '
                 f'height="{100 * height / top:.2f}"/>')
            for height, (left, right) in zip(heights, sides, strict=True) if height)
    plot = tag("div", tag("svg", *bars, viewBox="0 0 100 100", preserveAspectRatio="none", aria_hidden="true"),
               tag("span", class_="mark", style=f"left:{across(mark):.2f}%"),
               class_="plot", role="img", aria_label=label)
    labels = (tag("span", f"{value:,g}", style=f"left:{across(value):.2f}%") for value in _ticks(edges[0], edges[-1])
              if across(value) < _LAST_TICK)
    return tag("div", plot, tag("div", *labels, class_="ticks"))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis: 1, 10, 100; with 2 and 5, or 3, between them where there is room."""
    decades = range(math.floor(_log(low) / math.log(10)), math.ceil(_log(high) / math.log(10)) + 1)
    steps = (1, 2, 5) if len(decades) <= 3 else (1, 3) if len(decades) <= 5 else (1,)
    return [value for decade in decades for step in steps if low <= (value := step * 10.0**decade) <= high]


def _log(value: float) -> float:
    return math.log(max(value, _LEAST))
