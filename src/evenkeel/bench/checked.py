"""Sides are timed only if their numbers are right: which are, and a row for each layout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .results import OURS, Row, reason_of, row_of, wrong
from .timing import SHORTEST, Samples, interleaved

__all__ = ["Checked", "checked", "rows_of"]


@dataclass
class Checked:
    """The sides that run and are right, why others are not timed, how far we are off.

    Args:
        sides: what to time, by name.
        absent: why a side is not timed.
        difference: how far our numbers are from the truth, relative.
        left: for folded networks, how many norms each side still has, where it tells.
    """

    sides: dict[str, Callable[[], Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    difference: float | None = None
    left: dict[str, int] = field(default_factory=dict)


def checked(
    builders: Mapping[str, Callable[[], Any]], off: Callable[[str, Any], float], allowed: float
) -> Checked:
    """Builds each side, and keeps those that are off by no more than rounding explains.

    ``off`` runs a side of this name, and tells how far from the truth it is, relative.
    """
    found = Checked()
    for name, builder in builders.items():
        try:
            side = builder()
            far = off(name, side)
        except Exception as error:  # whatever one side fails with, the others go on
            found.absent[name] = reason_of(error)
            continue
        if name == OURS:
            found.difference = far
        if far <= allowed:
            found.sides[name] = side
        else:  # numbers that are none end here too
            found.absent[name] = wrong(far, allowed)
    return found


def rows_of(
    name: str,
    dtype: str,
    layouts: Mapping[str, Checked],
    *,
    seconds: float,
    shortest: float = SHORTEST,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Row]:
    """Times all layouts of a network in the same rounds, as `interleaved`; a row for each."""
    timed = {
        f"{layout} {side}": call
        for layout, found in layouts.items()
        for side, call in found.sides.items()
    }
    samples: dict[str, Samples] = {}
    if timed:
        samples = interleaved(timed, seconds=seconds, shortest=shortest, clock=clock)
    for layout, found in layouts.items():
        own = {side: samples[f"{layout} {side}"] for side in found.sides}
        yield row_of(
            name, layout, dtype, own,
            absent=found.absent, difference=found.difference, left=found.left,
        )  # fmt: skip
