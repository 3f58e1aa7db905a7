"""Figures of lines: accuracy along the way, and against one setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .build import Line, Report
from .markup import Cell, Column, Table
from .numbers import Curve, Interval
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
    numbers_axis,
    stretch,
    styles,
)
from .tables import span
from .wording import percent

__all__ = ["curves", "sensitivity"]

_LOG_FROM = 3  # budgets that differ by more than this factor need a logarithmic axis
_TITLES = {"rates": "Learning rates", "batches": "Batch sizes"}
_SETTINGS = {"rates": "learning rate", "batches": "batch size"}
_PRESETS = {"rates": "learning-rate", "batches": "batch-size"}


def curves(report: Report, looks: Mapping[str, Style]) -> Figure:
    """Test accuracy against steps, with bands; the highlighted arms are shown at first."""
    key, title = "curves", "Accuracy along the way"
    if not report.curves:
        text = "No trial ended well, so there are no curves; the preset quick gives some: "
        return Figure(key, title, missing=text + "evenkeel study --preset quick")
    shown = set(report.highlights) & {curve.arm for curve in report.curves}
    shown = shown or {report.curves[0].arm}
    budgets = [curve.steps[-1] for curve in report.curves if curve.arm in shown]
    data = [
        trace
        for place, curve in enumerate(report.curves)
        for trace in _curve_traces(curve, looks[curve.arm], place, curve.arm in shown)
    ]
    return Figure(
        key,
        title,
        caption="Test accuracy against training steps, the mean over seeds of the trials that "
        "ended well; bands are 95 % bootstrap intervals of that mean. The dotted line is the "
        f"target, {percent(report.target, 0)}.",
        label=f"Lines of test accuracy against training steps for {len(report.curves)} arms.",
        spec={
            "data": [_target(report), *data],
            "layout": base_layout(
                hovermode="x unified",
                xaxis=axis("training step", zeroline=False, hoverformat=",d"),
                yaxis=axis("test accuracy", tickformat=PERCENT, zeroline=False),
            ),
            "narrow": {"hovermode": "closest"},
            "height": 420,
            "narrow_height": 320,
            "stretch": stretch("y", [v for c in report.curves for v in c.high], on=False),
            "log": {"on": max(budgets) > _LOG_FROM * min(budgets)},
        },
        table=_curves_table(report.curves),
        legend=tuple(
            Entry(curve.arm, looks[curve.arm], "line", place, curve.arm in shown)
            for place, curve in enumerate(report.curves)
        ),
    )


def _intervals(curve: Curve) -> list[Interval]:
    return [Interval(*point) for point in zip(curve.mean, curve.low, curve.high, strict=True)]


def _curve_traces(curve: Curve, style: Style, place: int, shown: bool) -> list[dict[str, Any]]:
    """The band's two edges and the line; ``meta`` ties them to the legend."""
    common = {
        "x": list(curve.steps),
        "meta": place,
        "visible": True if shown else "legendonly",
        "mode": "lines",
    }
    edge = {**common, "line": {"width": 0}, "hoverinfo": "skip"}
    fill = {"fill": "tonexty", "fillcolor": f"{style.colour}/18"}
    return [
        {**edge, "y": list(curve.low)},
        {**edge, "y": list(curve.high), **fill},
        {
            **common,
            "y": list(curve.mean),
            "line": {"color": style.colour, "dash": style.dash, "width": 2},
            "name": label(curve.arm),
            "text": [hover(curve.arm, i) for i in _intervals(curve)],
            "hoverinfo": "text+x",
        },
    ]


def _target(report: Report) -> dict[str, Any]:
    """A line at the target, over all steps."""
    steps = [step for curve in report.curves for step in curve.steps]
    return {
        "x": [min(steps), max(steps)],
        "y": [report.target, report.target],
        "meta": "target",
        "mode": "lines",
        "line": {"color": "@muted", "dash": "dot", "width": 1},
        "hoverinfo": "skip",
    }


def _curves_table(found: Sequence[Curve]) -> Table:
    columns = (Column("arm", False), Column("step"), Column("accuracy"), Column("95 % interval"))
    rows = tuple(
        (Cell(each.arm), Cell(str(step)), Cell(percent(i.mean, 2)), Cell(span(i, digits=2)))
        for each in found
        for step, i in zip(each.steps, _intervals(each), strict=True)
    )
    return Table("curves-table", "Accuracy along the way, by arm and step.", columns, rows)


def sensitivity(key: str, found: Sequence[Line], looks: Mapping[str, Style]) -> Figure:
    """Final accuracy against a setting, one line for each recipe that has several values of it."""
    title, setting = _TITLES[key], _SETTINGS[key]
    if not found:
        preset = _PRESETS[key]
        text = f"No recipe of this study has results at more than one {setting}; the preset "
        command = f"{preset} tries several: evenkeel study --preset {preset}"
        return Figure(key, title, missing=text + command)
    fallback = styles([str(place) for place in range(len(found))])
    named = [looks.get(line.label, fallback[str(n)]) for n, line in enumerate(found)]
    legend = [Entry(line.label, style, "point") for line, style in zip(found, named, strict=True)]
    if any(diverged for line in found for _, _, diverged in line.points):
        mark = Style("@ink", "solid", "x-thin")
        legend.append(Entry("a value at which some trials diverged", mark, "mark"))
    intervals = [i for line in found for _, i, _ in line.points]
    means = [i.mean for i in intervals]
    also = " The learning rate goes with the batch size." if key == "batches" else ""
    return Figure(
        key,
        title,
        caption=f"Final test accuracy against the {setting}, all else equal: the mean over seeds "
        f"with its 95 % bootstrap interval.{also}",
        label=f"Lines of final test accuracy against the {setting} for {len(found)} recipes.",
        spec={
            "data": [
                trace
                for line, style, x in zip(found, named, _places(found), strict=True)
                for trace in _line_traces(line, style, setting, x)
            ],
            "layout": base_layout(
                xaxis=numbers_axis(setting, [v for line in found for v, _, _ in line.points]),
                yaxis=axis("final test accuracy", tickformat=PERCENT, zeroline=False),
            ),
            "height": 380,
            "narrow_height": 320,
            "stretch": stretch("y", bounds(intervals), on=max(means) - min(means) > WIDE_SPREAD),
        },
        table=_lines_table(key, found),
        legend=tuple(legend),
    )


def _places(found: Sequence[Line]) -> list[list[float]]:
    """Where each line's points go: at their values, but a little apart from the other lines'."""
    values = [value for line in found for value, _, _ in line.points]
    width = math.log(max(values) / min(values)) if min(values) > 0 else 0.0
    shifts = [width * 0.006 * (n - (len(found) - 1) / 2) for n in range(len(found))]
    return [
        [value * math.exp(shift) for value, _, _ in line.points]
        for line, shift in zip(found, shifts, strict=True)
    ]


def _line_traces(
    line: Line, style: Style, setting: str, x: Sequence[float]
) -> list[dict[str, Any]]:
    """Intervals, the line with its dots, and crosses where trials diverged."""
    spans: dict[str, list[float | None]] = {"x": [], "y": []}
    for place, (_, i, _) in zip(x, line.points, strict=True):
        if i.low is not None and i.high is not None:
            spans["x"] += [place, place, None]
            spans["y"] += [i.low, i.high, None]
    texts = [
        hover(line.label, i, f"{setting} {value:g}", *_diverged(diverged))
        for value, i, diverged in line.points
    ]
    at = zip(x, line.points, strict=True)
    crossed = [(place, i.mean) for place, (_, i, diverged) in at if diverged]
    ink = {"width": 2, "color": "@ink"}
    return [
        {**spans, "mode": "lines", "line": {"color": style.colour, "width": 1.5},
         "hoverinfo": "skip"},
        {"x": list(x), "y": [i.mean for _, i, _ in line.points],
         "mode": "lines+markers", "name": label(line.label), "text": texts, "hoverinfo": "text",
         "line": {"color": style.colour, "dash": style.dash, "width": 2},
         "marker": {"color": style.colour, "symbol": style.symbol, "size": 9}},
        {"x": [place for place, _ in crossed], "y": [mean for _, mean in crossed],
         "mode": "markers", "hoverinfo": "skip",
         "marker": {"symbol": "x-thin", "size": 13, "color": "@ink", "line": ink}},
    ]  # fmt: skip


def _diverged(count: int) -> list[str]:
    return [f"{count} {'trial' if count == 1 else 'trials'} diverged"] if count else []


def _lines_table(key: str, found: Sequence[Line]) -> Table:
    columns = (
        Column("recipe", False),
        Column(_SETTINGS[key]),
        Column("accuracy"),
        Column("95 % interval"),
        Column("trials diverged"),
    )
    rows = tuple(
        (
            Cell(line.label),
            Cell(f"{value:g}"),
            Cell(percent(i.mean, 2)),
            Cell(span(i, digits=2)),
            Cell(str(diverged)),
        )
        for line in found
        for value, i, diverged in line.points
    )
    return Table(f"{key}-table", f"Final accuracy by {_SETTINGS[key]}.", columns, rows)
