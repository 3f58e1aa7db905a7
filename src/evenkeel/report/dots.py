"""Figures of dots, one row for each arm: final accuracy, and the four ways of inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .answers import FourWays
from .build import Report
from .markup import Cell, Column, Table
from .numbers import ArmSummary, Interval
from .plots import (
    PERCENT,
    WIDE_SPREAD,
    Entry,
    Figure,
    Style,
    axis,
    base_layout,
    bounds,
    hover,
    label,
    stretch,
)
from .tables import WAYS, span, ways_of_all
from .wording import percent

__all__ = ["finals", "ways"]

_ROW = 26  # pixels for an arm
_LOOKS = {
    "running": Style("@c1", "solid", "circle"),
    "batch": Style("@c3", "solid", "diamond-open"),
    "folded": Style("@c2", "solid", "square-open"),
    "skipped": Style("@c4", "solid", "x"),
}


def finals(report: Report) -> Figure:
    """Final accuracy by arm with intervals, the baseline marked."""
    key, title = "finals", "Final accuracy"
    known = [(arm, arm.accuracy) for arm in report.arms if arm.accuracy is not None]
    if not known:
        text = "No trial was trained to its end; the preset quick gives final accuracies: "
        return Figure(key, title, missing=text + "evenkeel study --preset quick")
    base = next((a for arm, a in known if arm.name == report.baseline), None)
    names = [arm.name for arm, _ in known]
    data = [_vertical(base.mean, len(known))] if base is not None else []
    data += [
        _spans([(a, float(place)) for place, (_, a) in enumerate(known)], "@c1", 2),
        _dots(known, report.baseline),
    ]
    means = [a.mean for _, a in known]
    return Figure(
        key,
        title,
        caption="Final test accuracy, the mean over seeds with its 95 % bootstrap interval. "
        f"The square and the dotted line are the baseline, '{report.baseline}'; a filled dot "
        "differs from it on matched seeds (corrected p below 0.05), a hollow one is not known to.",
        label=f"Dots with intervals of the final test accuracy of {len(known)} arms.",
        spec={
            "data": data,
            "layout": base_layout(
                xaxis=axis("final test accuracy", tickformat=PERCENT, zeroline=False),
                yaxis=_names_axis(names, report.baseline),
            ),
            "height": 80 + _ROW * len(known),
            "narrow_height": 80 + 42 * len(known),
            "lift": 0.16,
            "stretch": stretch(
                "x", bounds([a for _, a in known]), on=max(means) - min(means) > WIDE_SPREAD
            ),
        },
        table=_finals_table(known),
    )


def _finals_table(known: Sequence[tuple[ArmSummary, Interval]]) -> Table:
    columns = (Column("arm", False), Column("accuracy"), Column("95 % interval"))
    rows = tuple(
        (Cell(arm.name), Cell(percent(a.mean, 2)), Cell(span(a, digits=2))) for arm, a in known
    )
    return Table("finals-table", "Final accuracy by arm.", columns, rows)


def _dots(known: Sequence[tuple[ArmSummary, Interval]], baseline: str) -> dict[str, Any]:
    """A dot for each arm: filled where it differs from the baseline, which is a square."""

    def symbol(arm: ArmSummary) -> str:
        if arm.name == baseline:
            return "square"
        sure = arm.against is not None and arm.against.differs
        return "circle" if sure else "circle-open"

    colours = ["@c2" if arm.name == baseline else "@c1" for arm, _ in known]
    return {
        "x": [a.mean for _, a in known],
        "y": list(range(len(known))),
        "mode": "markers",
        "marker": {
            "color": colours,
            "symbol": [symbol(arm) for arm, _ in known],
            "size": 10,
            "line": {"width": 2, "color": colours},
        },
        "text": [hover(arm.name, a, *_trouble(arm)) for arm, a in known],
        "hoverinfo": "text",
    }


def _trouble(arm: ArmSummary) -> list[str]:
    counts = ((arm.diverged, "diverged"), (arm.failed, "failed"))
    return [f"{count} of {arm.trials} trials {what}" for count, what in counts if count]


def _spans(intervals: Sequence[tuple[Interval, float]], colour: str, width: int) -> dict[str, Any]:
    """Horizontal lines from low to high, as one trace."""
    x: list[float | None] = []
    y: list[float | None] = []
    for i, place in intervals:
        if i.low is not None and i.high is not None:
            x += [i.low, i.high, None]
            y += [place, place, None]
    line = {"color": colour, "width": width}
    return {"x": x, "y": y, "mode": "lines", "line": line, "hoverinfo": "skip"}


def _vertical(x: float, count: int) -> dict[str, Any]:
    line = {"color": "@c2", "dash": "dot", "width": 1}
    return {
        "x": [x, x],
        "y": [-0.7, count - 0.3],
        "mode": "lines",
        "line": line,
        "hoverinfo": "skip",
    }


def _names_axis(names: Sequence[str], baseline: str) -> dict[str, Any]:
    """An axis of arms, the first one at the top."""
    texts = [f"<b>{label(name)}</b>" if name == baseline else label(name) for name in names]
    return axis(
        "",
        tickmode="array",
        tickvals=list(range(len(names))),
        ticktext=texts,
        range=[len(names) - 0.3, -0.7],
        zeroline=False,
    )


def ways(report: Report) -> Figure:
    """Accuracy in the four ways of inference, for each arm that has them."""
    key, title = "inference", "Four ways of inference"
    found = report.inference
    if not found:
        text = (
            "No arm of this study has norms with running statistics that ended well; the preset "
            "quick has: evenkeel study --preset quick"
        )
        return Figure(key, title, missing=text)
    data = [trace for n, (way, _) in enumerate(WAYS) for trace in _way_traces(found, way, n)]
    intervals = [getattr(each, way) for each in found for way, _ in WAYS]
    means = [i.mean for i in intervals]
    return Figure(
        key,
        title,
        caption="Test accuracy of the trained networks with their norms treated in four ways: the "
        "mean over seeds with its 95 % bootstrap interval.",
        label=f"Dots of test accuracy in four ways of inference for {len(found)} arms.",
        spec={
            "data": data,
            "layout": base_layout(
                xaxis=axis("test accuracy", tickformat=PERCENT, zeroline=False),
                yaxis=_names_axis([each.arm for each in found], ""),
            ),
            "height": 80 + 36 * len(found),
            "narrow_height": 80 + 62 * len(found),
            "lift": 0.36,
            "stretch": stretch("x", bounds(intervals), on=max(means) - min(means) > WIDE_SPREAD),
        },
        table=ways_of_all(found),
        legend=tuple(Entry(f"norms {words}", _LOOKS[way], "mark") for way, words in WAYS),
    )


def _way_traces(found: Sequence[FourWays], way: str, order: int) -> list[dict[str, Any]]:
    """One way's intervals and marks, each a little below those of the way before."""
    style = _LOOKS[way]
    places = [place + 0.19 * (order - 1.5) for place in range(len(found))]
    intervals: list[Interval] = [getattr(each, way) for each in found]
    words = dict(WAYS)[way]
    return [
        _spans(list(zip(intervals, places, strict=True)), style.colour, 1),
        {
            "x": [i.mean for i in intervals],
            "y": places,
            "mode": "markers",
            "marker": {"color": style.colour, "symbol": style.symbol, "size": 8},
            "name": words,
            "text": [
                hover(each.arm, i, f"norms {words}")
                for each, i in zip(found, intervals, strict=True)
            ],
            "hoverinfo": "text",
        },
    ]
