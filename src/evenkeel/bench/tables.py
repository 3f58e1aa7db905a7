"""Results for the terminal: a table for each layout and dtype, then what follows from them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from .results import (
    AGAIN,
    BARE_COMPILED,
    LOW,
    OURS,
    OURS_COMPILED,
    Results,
    Row,
    best_of_layouts,
    geometric_means,
    losses,
    over_best,
    totals,
)
from .timing import geometric_mean

__all__ = ["sentences", "tables"]

SHOWN = {
    "floor": "floor",
    "bare": "no norm",
    BARE_COMPILED: "bare c",
    "eager": "eager",
    AGAIN: "again",
    "eval": "eval",
    "fx": "fx",
    "freeze": "freeze",
    "compile": "compile",
    OURS: "ours",
    OURS_COMPILED: "ours c",
    LOW: "low mem.",
}
SAID = {
    **SHOWN,
    AGAIN: AGAIN,
    LOW: LOW,
    OURS_COMPILED: "ours compiled",
    BARE_COMPILED: "no norm compiled",
}
"""The same in a sentence, which has room."""
OVER = (
    ("eager", "bare"),
    (OURS, "bare"),
    ("compile", BARE_COMPILED),
    (OURS_COMPILED, BARE_COMPILED),
    (OURS_COMPILED, "compile"),
    (LOW, "eager"),
    (AGAIN, "eager"),
)
"""What `geometric_means` does not compare: the price of batch norm, and sides of `steps` alone."""
UNITS = {"s": ("ms", 1e3), "bytes": ("MB", 1e-6)}


def tables(results: Results) -> Iterator[Table]:
    """A table of medians and ratios for each layout and dtype, at most 80 columns wide."""
    unit, scale = UNITS[results.unit]
    for (layout, dtype), rows in results.groups().items():
        sides = [side for side in SHOWN if any(side in row.sides for row in rows)]
        table = Table(
            title=f"{layout} {dtype}, {unit}", title_justify="left", box=None, pad_edge=False
        )
        table.add_column("case", overflow="fold", min_width=12)
        for side in sides:
            table.add_column(SHOWN[side], justify="right", no_wrap=True)
        against = "best" if results.kind == "fold" else "eager"
        table.add_column(f"ours/{against}", justify="right", no_wrap=True)
        if "floor" in sides:
            table.add_column("of floor", justify="right", no_wrap=True)
        if results.kind == "fold":
            table.add_column("left", justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*_cells(row, sides, scale, results.kind))
        yield table


def _cells(row: Row, sides: Sequence[str], scale: float, kind: str) -> Iterator[str]:
    yield escape(row.name)
    for side in sides:
        yield _short(row.sides[side].median * scale) if side in row.sides else "-"
    ratio = row.over_best if kind == "fold" else row.ratios.get("eager")
    yield "-" if ratio is None else f"{ratio.median:.2f}"
    if "floor" in sides:
        known = OURS in row.sides and "floor" in row.sides
        yield f"{row.sides['floor'].median / row.sides[OURS].median:.0%}" if known else "-"
    if kind == "fold":
        yield f"{row.left[OURS]} of {row.left['eval']}" if {OURS, "eval"} <= {*row.left} else "-"


def sentences(results: Results) -> Iterator[str]:
    """What the rows say together: means, whole networks, losses, and what did not run."""
    unit, scale = UNITS[results.unit]
    for (layout, dtype), rows in results.groups().items():
        where = f"{layout} {dtype}"
        for peer, mean in geometric_means(rows).items():
            count = sum(peer in row.ratios for row in rows)
            yield f"{where}: ours / {peer} is {mean:.2f} (geometric mean of {_of(count)})"
        if results.kind == "fold":
            yield from _folded(rows, where)
        for side, other in OVER:
            yield from _over(rows, where, side, other)
        for network, sums in totals(rows).items():
            parts = [f"{SHOWN[s]} {_short(sums[s] * scale)}" for s in SHOWN if s in sums]
            yield f"{where}: all norms of {network}, {unit}: {', '.join(parts)}"
        faults = _faults(rows)
        if faults:
            yield f"{where}: page faults of a call, median: {faults}"
    # In memory the layouts do not differ.
    for name, dtype, (row, peer), best in best_of_layouts(results.rows if unit == "ms" else ()):
        theirs, own = row.sides[peer].median, best.sides[OURS].median
        yield (
            f"{name} {dtype}, best layouts: {peer} {row.layout} {_short(theirs * scale)} {unit}, "
            f"ours {best.layout} {_short(own * scale)} {unit}, ratio {own / theirs:.2f}"
        )
    yield from _losses(results)
    yield from _absent(results)
    for what in results.left_out:
        yield f"left out: {what}"
    if not results.finished:
        yield "stopped before the end"


def _folded(rows: Sequence[Row], where: str) -> Iterator[str]:
    """Ours against the best of torch's, whichever that is, and the norms that are left."""
    mean = over_best(rows)
    if mean is not None:
        count = sum(row.over_best is not None for row in rows)
        yield f"{where}: ours / the best of torch is {mean:.2f} (geometric mean of {_of(count)})"
    parts = []
    for side in SHOWN:
        told = [row.left for row in rows if side in row.left and "eval" in row.left]
        if told and side != "eval":
            total = sum(left["eval"] for left in told)
            parts.append(f"{SHOWN[side]} {sum(left[side] for left in told)} of {total}")
    if parts:
        yield f"{where}: norms left: {', '.join(parts)}"


def _over(rows: Sequence[Row], where: str, side: str, other: str) -> Iterator[str]:
    both = [row.sides for row in rows if side in row.sides and other in row.sides]
    ratios = [sides[side].median / sides[other].median for sides in both]
    if ratios:
        of = f"geometric mean of {_of(len(ratios))}"
        of += f", {min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else ""
        yield f"{where}: {SAID[side]} / {SAID[other]} is {geometric_mean(ratios):.2f} ({of})"


def _losses(results: Results) -> Iterator[str]:
    compared = sum(bool(row.ratios) for row in results.rows)
    worse = "slower" if results.unit == "s" else "larger"
    lost = losses(results.rows)
    if not compared:
        return
    yield f"ours is {worse} than the best peer in {len(lost)} of {_of(compared)}" + (
        ":" if lost else ""
    )
    for loss in lost:
        noise = "" if loss.is_clear else " (within the noise)"
        yield f"  {loss.name}, {loss.layout} {loss.dtype}: {loss.ratio:.3f} x {loss.peer}{noise}"


def _absent(results: Results) -> Iterator[str]:
    """The sides that were not timed; those with one reason in one sentence."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in results.rows:
        for side, reason in row.absent.items():
            found.setdefault((side, reason), []).append(f"{row.name} {row.layout} {row.dtype}")
    for (side, reason), where in found.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        yield f"{SAID.get(side, side)} is missing on {where[0]}{more}: {reason}"


def _faults(rows: Sequence[Row]) -> str:
    parts = []
    for side in SHOWN:
        counts = [row.sides[side].faults for row in rows if side in row.sides]
        known = [count for count in counts if count is not None]
        if known:
            parts.append(f"{SHOWN[side]} {statistics.median(known):.0f}")
    return ", ".join(parts)


def _of(count: int) -> str:
    return f"{count} case" if count == 1 else f"{count} cases"


def _short(number: float) -> str:
    """About three digits."""
    for limit, digits in ((100, 0), (10, 1), (0.1, 2)):
        if number >= limit:
            return f"{number:.{digits}f}"
    return f"{number:.4f}"
