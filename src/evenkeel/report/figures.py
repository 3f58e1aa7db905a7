"""The report's figures, as plain values; every number comes from the report."""

from __future__ import annotations

from .bands import bands
from .build import Report
from .dots import finals, ways
from .lines import curves, sensitivity
from .plots import Figure, styles

__all__ = ["figures"]


def figures(report: Report) -> list[Figure]:
    """All figures, in the page's order; one without data says what would give it."""
    drawn = {each.arm for each in report.curves}
    first = [name for name in report.highlights if name in drawn]
    looks = styles([*first, *(arm.name for arm in report.arms if arm.name not in first)])
    return [
        curves(report, looks),
        finals(report),
        bands(report),
        sensitivity("rates", report.rates, looks),
        sensitivity("batches", report.batches, looks),
        ways(report),
    ]
