"""What the user's data shows: statistics that do not fit it, and what that does to the output."""

from __future__ import annotations

from collections.abc import Iterator

from ..observe import Observation
from .base import Found

__all__ = ["eval_gap", "mismatch"]

GAP = 0.5
"""The output's difference from which on it is told, relative to how the output varies."""
WIDE_GAP = 1.0
CHANGED = 0.25
FEW = 0.05
"""So few changed answers, with no norm that is off by itself, are the lag of any training."""


def mismatch(seen: Observation) -> Iterator[Found]:
    """Norms whose running statistics are not those of the data that they see."""
    if seen.measured is None:
        return
    for path, gap in seen.measured.own.items():
        if gap.size <= seen.measured.limit or seen.norms[path].never_updated:
            continue
        message = (
            f"{gap.size:.2f} deviations off what the data would give; worst owner {gap.owner}: "
            f"mean off by {gap.shift:+.2f} deviations, variance {gap.ratio:.3g} times the running "
            "one"
        )
        yield Found(path, gap.size, message)


def eval_gap(seen: Observation) -> Iterator[Found]:
    """The network's output with its running statistics against that with the data's own."""
    found = seen.measured
    if found is None or all(f.never_updated or not f.remembers for f in seen.batch_norms):
        return
    difference = found.difference
    if difference is None or difference <= GAP:
        return
    start = found.start
    few = found.changed is not None and found.changed <= FEW
    if start is None and few and difference <= WIDE_GAP:
        return
    if start is not None:
        where = f"it starts at {start}, {found.own[start].size:.2f} off"
    else:
        start = max(found.own, key=lambda path: found.own[path].size, default="")
        most = found.own[start].size if start else 0.0
        where = f"it adds up over {len(found.own)} norms, the most at {start} with {most:.2f}"
    changed = "" if found.changed is None else f", {100 * found.changed:.0f} % of answers change"
    is_error = difference > WIDE_GAP or (found.changed or 0.0) > CHANGED
    message = (
        f"the output is {min(difference, 1e6):.2f} deviations off what the data's statistics would "
        f"give{changed}; {where}"
    )
    yield Found(start, min(difference, 1e6), message, "error" if is_error else "warning")
