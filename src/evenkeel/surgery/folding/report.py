"""What a fold did, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["FoldReport", "Folded"]


class Folded(NamedTuple):
    """One norm that is gone.

    Args:
        norm: its path, or the node's name if it was a function.
        into: the layers (or norms that stay) that do its work now; none if it did nothing.
        through: what its map passed on the way there.
        direction: 'backward' into what was before it, or 'forward'.
        difference: the largest where the networks meet behind it, relative to the largest value
            there, in double precision where the network can run in it.
    """

    norm: str
    into: tuple[str, ...]
    through: tuple[str, ...]
    direction: str
    difference: float

    def __str__(self) -> str:
        way = f" through {', '.join(self.through)}" if self.through else ""
        where = f"into {', '.join(self.into)}" if self.into else "did nothing"
        return f"{self.norm} {where}{way}"


@dataclass(frozen=True)
class FoldReport:
    """What was folded, what was left and why, and the proof.

    ``difference`` is the largest difference between the two networks' outputs on the example and on
    random inputs like it, ``scale`` the largest output, ``budget`` the relative difference that was
    allowed. ``exact`` is the relative difference with both networks in double precision, which is
    that of the algebra alone; None if the network cannot run in it. ``notes`` are things to know
    about the numbers.
    """

    folded: tuple[Folded, ...]
    left: tuple[tuple[str, str], ...]
    difference: float
    scale: float
    budget: float
    exact: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} norms folded, {len(self.left)} left"]
        lines += [f"  {one}" for one in self.folded]
        lines += [f"  {norm} stays: {reason}" for norm, reason in self.left]
        lines += [f"  note: {note}" for note in self.notes]
        lines.append(
            f"  largest output difference {self.difference:.2e} of {self.scale:.3g} "
            f"(budget {self.budget:.0e} relative)"
        )
        if self.exact is not None:
            lines.append(f"  in double precision {self.exact:.1e} relative")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        own = vars(self)
        return own | {
            "folded": [one._asdict() for one in self.folded],
            "left": [list(pair) for pair in self.left],
            "notes": list(self.notes),
        }
