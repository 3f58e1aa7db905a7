"""What a benchmark found, as data: rows of sides, and one JSON file of them all."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import FormatError
from .shapes import places
from .timing import Measure, Ratio, Samples, geometric_mean

__all__ = [
    "AGAIN",
    "BARE_COMPILED",
    "LOW",
    "OURS",
    "OURS_COMPILED",
    "PEERS",
    "Loss",
    "Results",
    "Row",
    "best_of_layouts",
    "geometric_means",
    "losses",
    "over_best",
    "reason_of",
    "row_of",
    "totals",
    "wrong",
]

SCHEMA = 1
OURS = "evenkeel"
LOW = "low memory"
"""Ours, with activations computed again in backward: `accelerate` with memory='low'."""
AGAIN = "eager again"
"""Eager once more, from a copy of its own: how far two sides differ that are the same."""
OURS_COMPILED = "evenkeel compiled"
"""Ours through torch.compile."""
BARE_COMPILED = "bare compiled"
"""The network without norms through torch.compile: what norms cost one that is compiled."""
PEERS = ("eager", "eval", "fx", "freeze", "compile")
"""Who we are compared with; any other side, such as a bare copy, is a bound.

`eager` trains and `eval` does not; `fx` and `freeze` are torch's ways to fold.
"""


@dataclass(frozen=True)
class Row:
    """One case in one layout and dtype.

    Args:
        name: of the case, the same in every layout and dtype.
        layout: nchw or channels_last.
        dtype: float32 or bfloat16.
        sides: what each took, in the unit of the whole benchmark.
        ratios: ours over each peer's.
        counts: for an op, how often each network has it.
        absent: sides that did not run, or whose numbers were wrong, with the reason.
        difference: how far our numbers are from eager's or eval's, relative.
        left: for folded networks, how many norms each side still has, where it tells.
    """

    name: str
    layout: str
    dtype: str
    sides: Mapping[str, Measure]
    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    difference: float | None = None
    left: Mapping[str, int] = field(default_factory=dict)

    @property
    def group(self) -> tuple[str, str]:
        """Layout and dtype."""
        return self.layout, self.dtype

    @property
    def best_peer(self) -> str | None:
        """The fastest of the peers that ran."""
        ran = [peer for peer in PEERS if peer in self.sides]
        return min(ran, key=lambda peer: self.sides[peer].median, default=None)

    @property
    def over_best(self) -> Ratio | None:
        """Ours over the fastest of the peers; None where one of both is missing."""
        peer = self.best_peer
        return None if peer is None else self.ratios.get(peer)


@dataclass
class Results:
    """All rows of a run, with what is needed to repeat it.

    Args:
        kind: ops, steps, memory or fold.
        unit: of the sides' numbers, s or bytes.
        settings: the command's options.
        machine: see `evenkeel.bench.machine.machine`.
        rows: in the order they were measured.
        left_out: what was not run, with the reason.
        finished: False if the run was stopped before its end.
    """

    kind: str
    unit: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    finished: bool = False

    def groups(self) -> dict[tuple[str, str], list[Row]]:
        """The rows of each layout and dtype."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found

    def to_json(self) -> str:
        """The file's text, the conclusions with the numbers they follow from."""
        data = {"schema": SCHEMA, **dataclasses.asdict(self)}
        groups = {" ".join(group): rows for group, rows in self.groups().items()}
        data["summary"] = {
            "geometric_means": {group: geometric_means(rows) for group, rows in groups.items()},
            "over_best": {group: over_best(rows) for group, rows in groups.items()},
            "totals": {group: totals(rows) for group, rows in groups.items()},
            "losses": [dataclasses.asdict(loss) for loss in losses(self.rows)],
        }
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """What `to_json` wrote.

        Raises:
            FormatError: the text is no such file.
        """
        try:
            data = json.loads(text)
            schema = data.pop("schema")
            if schema != SCHEMA:
                raise FormatError(
                    f"the result file has schema {schema}, this version reads {SCHEMA}; measure "
                    "again, or read it with the version that wrote it"
                )
            data.pop("summary")
            return cls(**data | {"rows": [_row(row) for row in data["rows"]]})
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise FormatError(
                f"this is no result file of 'evenkeel bench' ({type(error).__name__}: {error}); "
                "give one that --out wrote"
            ) from error


def row_of(
    name: str,
    layout: str,
    dtype: str,
    samples: Mapping[str, Samples],
    *,
    counts: Mapping[str, int] | None = None,
    absent: Mapping[str, str] | None = None,
    difference: float | None = None,
    left: Mapping[str, int] | None = None,
) -> Row:
    """A row from the samples of its sides, which were taken in the same rounds."""
    ours = samples.get(OURS)
    ratios = {} if ours is None else {p: ours.over(samples[p]) for p in PEERS if p in samples}
    measures = {side: taken.measure for side, taken in samples.items()}
    return Row(
        name, layout, dtype, measures, ratios,
        dict(counts or {}), dict(absent or {}), difference, dict(left or {}),
    )  # fmt: skip


def reason_of(error: Exception) -> str:
    """Why a side did not run, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {textwrap.shorten(lines[0], 300, placeholder=' ...')}"


def wrong(off: float, allowed: float) -> str:
    """Why a side that runs is not timed."""
    return f"its numbers are off by {off:.1g}; rounding explains {allowed:g} at most"


def geometric_means(rows: Iterable[Row]) -> dict[str, float]:
    """Our geometric mean over each peer, for those rows that have both."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for peer, ratio in row.ratios.items():
            found.setdefault(peer, []).append(ratio.median)
    return {peer: geometric_mean(ratios) for peer, ratios in found.items()}


def over_best(rows: Iterable[Row]) -> float | None:
    """Our geometric mean over the best peer of each row; None if no row has both."""
    ratios = [row.over_best.median for row in rows if row.over_best is not None]
    return geometric_mean(ratios) if ratios else None


def totals(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """The sum over all norms of a network, for networks and sides that are there whole."""
    rows = list(rows)
    found: dict[str, dict[str, float]] = {}
    for network in dict.fromkeys(name for row in rows for name in row.counts):
        own = [row for row in rows if network in row.counts]
        if sum(row.counts[network] for row in own) < places(network).total():
            continue
        everywhere = set.intersection(*(set(row.sides) for row in own))
        found[network] = {
            side: sum(row.counts[network] * row.sides[side].median for row in own)
            for side in own[0].sides
            if side in everywhere
        }
    return found


@dataclass(frozen=True)
class Loss:
    """A case where a peer is better than we are.

    ``is_clear`` says that we lost three rounds of four at least; else the noise may have done it.
    """

    name: str
    layout: str
    dtype: str
    peer: str
    ratio: float
    is_clear: bool


def losses(rows: Iterable[Row]) -> list[Loss]:
    """The cases where the best peer is better than we are, the worst first."""
    return sorted(_losses(rows), key=lambda loss: -loss.ratio)


def _losses(rows: Iterable[Row]) -> Iterator[Loss]:
    for row in rows:
        peer, ratio = row.best_peer, row.over_best
        if peer is not None and ratio is not None and ratio.median > 1:
            yield Loss(row.name, row.layout, row.dtype, peer, ratio.median, ratio.low > 1)


def best_of_layouts(rows: Iterable[Row]) -> list[tuple[str, str, tuple[Row, str], Row]]:
    """For each case in several layouts: name, dtype, the best peer's row and name, our best row."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if OURS in row.sides and row.best_peer is not None:
            cases.setdefault((row.name, row.dtype), []).append(row)
    found = []
    for (name, dtype), own in cases.items():
        if len(own) > 1:
            peers = [(row, row.best_peer) for row in own if row.best_peer is not None]
            best = min(peers, key=lambda pair: pair[0].sides[pair[1]].median)
            found.append((name, dtype, best, min(own, key=lambda row: row.sides[OURS].median)))
    return found


def _row(data: dict[str, Any]) -> Row:
    sides = {name: Measure(**side) for name, side in data["sides"].items()}
    ratios = {name: Ratio(**ratio) for name, ratio in data["ratios"].items()}
    return Row(**data | {"sides": sides, "ratios": ratios})
