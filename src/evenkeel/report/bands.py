"""The figure of a hidden unit's input over training, as the paper's figure 1."""

from __future__ import annotations

from typing import Any

from .build import Band, Report
from .markup import Cell, Column, Table
from .plots import Figure, axis, base_layout, finite, label

__all__ = ["bands"]


def bands(report: Report) -> Figure:
    """15, 50 and 85 % of a hidden unit's input, without and with batch norm on equal axes."""
    key, title = "bands", "The input of a hidden unit"
    if not report.bands:
        text = (
            "No trial that ended well has the input of a hidden unit; the preset paper has it, as "
            "in the paper's figure 1: evenkeel study --preset paper"
        )
        return Figure(key, title, missing=text)
    places = {band.arm: place for place, band in enumerate(report.bands)}
    pair: tuple[str, ...] = report.pair or tuple(places)[:2]
    data = [
        trace
        for side, name in enumerate(pair)
        for trace in _traces(report.bands[places[name]], side)
    ]
    layout, narrow = _layouts(two=len(pair) > 1)
    return Figure(
        key,
        title,
        caption="15, 50 and 85 % of one hidden unit's input over fixed test images along the "
        "training, the mean over seeds, on equal axes: the middle unit of the last activation. "
        "The band is not an interval; it holds 70 % of the images.",
        label="Bands of 15, 50 and 85 % of a hidden unit's input: " + " and ".join(pair) + ".",
        spec={
            "data": data,
            "layout": layout,
            "narrow": narrow,
            "height": 360,
            "narrow_height": 520 if len(pair) > 1 else 320,
            "choices": [_choice(band) for band in report.bands],
            "chosen": [places[name] for name in pair],
        },
        table=_table(report),
    )


def _layouts(*, two: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two panels on equal axes, side by side, or on a narrow page one below the other."""
    steps, value = "training step", "input of the unit"
    layout = base_layout(
        xaxis=axis(steps, zeroline=False, domain=[0, 0.48 if two else 1]), yaxis=axis(value)
    )
    if not two:
        return layout, {}
    layout["xaxis2"] = axis(steps, zeroline=False, domain=[0.52, 1], anchor="y2", matches="x")
    layout["yaxis2"] = axis("", anchor="x2", matches="y", showticklabels=False)
    narrow = {
        "xaxis": {"domain": [0, 1], "title": {"text": ""}},
        "xaxis2": {"domain": [0, 1]},
        "yaxis": {"domain": [0.54, 1]},
        "yaxis2": {"domain": [0, 0.46], "title": {"text": value}, "showticklabels": True},
    }
    return layout, narrow


def _choice(band: Band) -> dict[str, Any]:
    return {
        "name": band.arm,
        "title": label(band.arm),
        "x": list(band.steps),
        "low": finite(band.low),
        "middle": finite(band.middle),
        "high": finite(band.high),
    }


def _traces(band: Band, side: int) -> list[dict[str, Any]]:
    """Low, high and middle of one panel, in this order."""
    colour = f"@c{side + 1}"
    common = {"x": list(band.steps), "mode": "lines", "hoverinfo": "x+y"}
    if side:
        common |= {"xaxis": "x2", "yaxis": "y2"}
    edge = {**common, "line": {"color": colour, "width": 1}}
    return [
        {**edge, "y": finite(band.low), "name": "15 %"},
        {**edge, "y": finite(band.high), "name": "85 %", "fill": "tonexty",
         "fillcolor": f"{colour}/18"},
        {**common, "y": finite(band.middle), "name": "50 %",
         "line": {"color": colour, "width": 2.5}},
    ]  # fmt: skip


def _table(report: Report) -> Table:
    columns = (
        Column("arm", False),
        Column("step"),
        *(Column(name) for name in ("15 %", "50 %", "85 %")),
    )
    rows = tuple(
        (Cell(band.arm), Cell(str(step)), *(Cell(f"{value:.3f}") for value in values))
        for band in report.bands
        for step, *values in zip(band.steps, band.low, band.middle, band.high, strict=True)
    )
    return Table("bands-table", "The input of a hidden unit, by arm and step.", columns, rows)
