"""What a check found: each mistake with its place, a number, why it matters and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

__all__ = ["SEVERITIES", "Finding", "Findings", "LayerGap", "Unchecked", "relative"]

SEVERITIES: Final = ("error", "warning", "note")
"""Worst first. An error gives wrong numbers or ends training; a warning costs accuracy, often; a
note is worth knowing and may be what was wanted."""

_SHOWN: Final = 4
"""How many places of one rule are told in text."""


@dataclass(frozen=True)
class Finding:
    """One mistake at one place.

    Attributes:
        code: stable, such as 'EK101'; what silences it.
        name: the rule in words, such as 'bias-before-norm'.
        severity: one of `SEVERITIES`.
        path: the module's path in the network; empty for the network as a whole.
        evidence: the number that the finding rests on.
        unit: what the number counts or measures.
        message: what is wrong here, with the number.
        why, fix: the same for all findings of a rule.
        fixable: whether `fix` can do it, without a change of what the network computes.
        file, line: where the module is made, if its class is the user's own and can be read.
    """

    code: str
    name: str
    severity: str
    path: str
    evidence: float
    unit: str
    message: str
    why: str
    fix: str
    fixable: bool = False
    file: str | None = None
    line: int | None = None

    @property
    def place(self) -> str:
        """The module's path, or 'the network'."""
        return self.path or "the network"


@dataclass(frozen=True)
class Unchecked:
    """Rules that could not look, and what they would need."""

    codes: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class LayerGap:
    """How far one norm's running statistics are from what it sees in the data.

    Both numbers are the difference between what the norm gives with its running statistics and with
    the data's own, in deviations of the latter (0: none; see `evenkeel.checks.measure.gap`).

    Attributes:
        path: of the norm.
        own: with the norms before it on the data's statistics, so the fault is this norm's own.
        at_inference: with all norms on running statistics, faults from before included.
    """

    path: str
    own: float
    at_inference: float


@dataclass(frozen=True)
class Findings(Sequence[Finding]):
    """All findings, the worst first, in the order of the network.

    Attributes:
        found: the findings.
        unchecked: what could not be checked, and why.
        silenced: how many findings each code had that were told to be ignored.
        layers: the gap between training and inference of each norm, if data was given.
        remarks: what else somebody who reads the findings should know.
    """

    found: tuple[Finding, ...] = ()
    unchecked: tuple[Unchecked, ...] = ()
    silenced: tuple[tuple[str, int], ...] = ()
    layers: tuple[LayerGap, ...] = ()
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, place: Any) -> Any:
        return self.found[place]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.found)

    def of(self, code: str) -> tuple[Finding, ...]:
        """The findings of one rule, by code or name."""
        return tuple(f for f in self.found if code in (f.code, f.name))

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that make the check fail."""
        return self._graded("error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that are likely to cost accuracy."""
        return self._graded("warning")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """Findings that are worth knowing."""
        return self._graded("note")

    def _graded(self, severity: str) -> tuple[Finding, ...]:
        return tuple(f for f in self.found if f.severity == severity)

    @property
    def summary(self) -> str:
        """One line: '1 error, 0 warnings, 3 notes'."""
        counts = ((len(self._graded(s)), s) for s in SEVERITIES)
        return ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for n, word in counts)

    def __str__(self) -> str:
        lines = [self.summary]
        for _, group in groupby(self.found, key=lambda f: (f.severity, f.code)):
            lines += ["", *_told(list(group))]
        tail = [f"{n} of {code} silenced" for code, n in self.silenced]
        tail += [f"not checked: {', '.join(u.codes)}: {u.reason}" for u in self.unchecked]
        tail += self.remarks
        return "\n".join([*lines, *([""] if tail else []), *tail])

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain values."""
        counts = {f"{severity}s": len(self._graded(severity)) for severity in SEVERITIES}
        return {
            **counts,
            "findings": [asdict(f) for f in self.found],
            "unchecked": [{"codes": list(u.codes), "reason": u.reason} for u in self.unchecked],
            "silenced": dict(self.silenced),
            "layers": [asdict(layer) for layer in self.layers],
            "remarks": list(self.remarks),
        }


def relative(file: str) -> str:
    """The path from the folder at hand, as GitHub wants it; the whole one if it is elsewhere."""
    path = Path(file)
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.as_posix()


def _told(group: list[Finding]) -> list[str]:
    """The findings of one rule and severity as lines."""
    first = group[0]
    where = "" if len(group) == 1 else f", {len(group)} places"
    can = f" (--fix does {sum(f.fixable for f in group)})" if any(f.fixable for f in group) else ""
    lines = [f"{first.severity} {first.code} {first.name}{where}{can}"]
    for each in group[:_SHOWN]:
        source = "" if each.file is None else f" ({relative(each.file)}:{each.line})"
        lines.append(f"  {each.place}{source}: {each.message}")
    if len(group) > _SHOWN:
        lines.append(f"  and {len(group) - _SHOWN} more")
    return [*lines, f"  why: {first.why}", f"  fix: {first.fix}"]
