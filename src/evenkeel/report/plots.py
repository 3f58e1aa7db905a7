"""What all figures share: their shape for the page's script, colours by name, axes, hover text.

A figure's ``spec`` holds plain Plotly traces and a plain layout. Colours are names such as ``@c1``
or ``@c1/20`` (20 % opaque), which the page's script looks up in its style sheet, so that a figure
follows a change between light and dark. Beside ``data`` and ``layout`` a spec may have:

    height, narrow_height   pixels, the second below 560 pixels of width
    narrow      a layout to merge over the first below that width
    stretch     {"axis": "x" or "y", "on": bool, "floor": the least error}: whether the axis shows
                accuracy as the log of the error, which stretches it towards 100 %
    log         {"on": bool}: whether the x axis is logarithmic
    lift        how far above its row an arm's name goes below that width, in rows
    choices     [{"name", "title", "x", "low", "middle", "high"}]: bands that a reader may pick
    chosen      the places of the two bands that are picked at first
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .markup import Table
from .numbers import Interval
from .tables import span
from .wording import percent

__all__ = [
    "COLOURS",
    "PERCENT",
    "WIDE_SPREAD",
    "Entry",
    "Figure",
    "Style",
    "axis",
    "base_layout",
    "bounds",
    "finite",
    "hover",
    "label",
    "numbers_axis",
    "stretch",
    "styles",
]

PERCENT = ",.1~%"
WIDE_SPREAD = 0.2
"""Accuracies further apart than this are shown on a stretched axis at first."""
COLOURS = 6
"""How many colours the style sheet has, --c1 and on."""
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon")
_LONGEST = 34


@dataclass(frozen=True)
class Style:
    """How an arm's line looks, the same in every figure."""

    colour: str
    dash: str
    symbol: str


@dataclass(frozen=True)
class Entry:
    """A line of a figure's legend; ``place`` is the group of traces that it shows and hides.

    ``place`` is None in a legend that only explains.
    """

    name: str
    style: Style
    shape: str = "line"
    place: int | None = None
    shown: bool = True


@dataclass(frozen=True)
class Figure:
    """One figure: what the page's script draws, its words, and its numbers as a table.

    Attributes:
        key: its name in links.
        caption: what it shows, and what its bands and intervals are.
        label: what it shows, for a reader who cannot see it.
        spec: see above; None for a figure without data.
        missing: why a figure has no data, and what would give it.
    """

    key: str
    title: str
    caption: str = ""
    label: str = ""
    spec: dict[str, Any] | None = None
    table: Table | None = None
    legend: tuple[Entry, ...] = ()
    missing: str = ""


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each arm; the first ones differ in colour, later ones in their dashes too."""
    return {
        name: Style(
            f"@c{place % COLOURS + 1}",
            _DASHES[place // COLOURS % len(_DASHES)],
            _SYMBOLS[place % len(_SYMBOLS)],
        )
        for place, name in enumerate(names)
    }


def base_layout(**more: Any) -> dict[str, Any]:
    """A layout without background, frame or drag."""
    return {
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "@ink"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "dragmode": False,
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "@card",
            "bordercolor": "@line",
            "font": {"color": "@ink", "size": 12},
            "align": "left",
            "namelength": -1,
        },
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        **more,
    }


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a grid, which makes room for its labels."""
    return {
        "title": {"text": escape(title, quote=False), "standoff": 8},
        "gridcolor": "@grid",
        "linecolor": "@line",
        "zerolinecolor": "@grid",
        "automargin": True,
        "fixedrange": True,
        **more,
    }


def numbers_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """An axis for a setting: logarithmic, with a tick at each value that has the room."""
    ordered = sorted(set(values))
    if ordered[0] <= 0:
        return axis(title)
    logs = [math.log10(value) for value in ordered]
    room = (logs[-1] - logs[0]) / 11
    ticks: list[int] = []
    for place, value in enumerate(logs):
        if not ticks or value - logs[ticks[-1]] >= room:
            ticks.append(place)
    pad = max((logs[-1] - logs[0]) * 0.06, 0.1)
    return axis(
        title,
        type="log",
        tickmode="array",
        tickvals=[ordered[place] for place in ticks],
        ticktext=[f"{ordered[place]:g}" for place in ticks],
        range=[logs[0] - pad, logs[-1] + pad],
        zeroline=False,
    )


def stretch(axis_name: str, accuracies: Sequence[float], *, on: bool) -> dict[str, Any]:
    """How far an axis may stretch towards 100 %: to half the least error above zero."""
    errors = [1 - value for value in accuracies if value < 1 - 1e-9]
    floor = max(min(errors, default=0.01) / 2, 1e-5)
    return {"axis": axis_name, "on": on, "floor": floor}


def label(name: str) -> str:
    """A name as an axis may show it: not too long, and without meaning as markup."""
    short = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "\u2026"
    return _plain(short)


def _plain(text: str) -> str:
    """Text without meaning as markup or, by its dollar signs, as mathematics."""
    return escape(text, quote=False).replace("$", "&#36;")


def hover(name: str, i: Interval, *more: str) -> str:
    """What a point says: a name, its accuracy with interval, and further lines."""
    known = i.low is not None
    value = f"{percent(i.mean, 2)} ({span(i, digits=2)})" if known else percent(i.mean, 2)
    return "<br>".join([f"<b>{label(name)}</b>", value, *(_plain(line) for line in more)])


def bounds(intervals: Sequence[Interval]) -> list[float]:
    """Every number in some intervals."""
    found = [value for i in intervals for value in (i.mean, i.low, i.high)]
    return [value for value in found if value is not None]


def finite(values: Sequence[float]) -> list[float | None]:
    """Numbers for JSON: what is not finite leaves a gap."""
    return [value if math.isfinite(value) else None for value in values]
