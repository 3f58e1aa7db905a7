"""What a rule is: a pure function from an observation to findings, with the words around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..observe import Observation

__all__ = ["Blind", "Found", "Look", "Rule"]


class Found(NamedTuple):
    """One finding of a rule.

    Attributes:
        path: of the module, empty for the network.
        evidence: the number.
        message: what is wrong here, with the number.
        severity: if it is not the rule's worst.
        fixable: whether `evenkeel.checks.fix` can do it here.
    """

    path: str
    evidence: float
    message: str
    severity: str | None = None
    fixable: bool = False


class Blind(NamedTuple):
    """A rule that has found that it cannot tell, and why."""

    reason: str


Look = Callable[[Observation], Iterator[Found | Blind]]


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        code: stable; never used again for something else.
        name: in words.
        severities: what its findings may be, the worst first.
        needs: keys of `Observation.lacks` without which it cannot look.
        unit: what the evidence is.
        why: why it matters, in one or two sentences.
        fix: what to do.
        look: the function.
        fixable: whether some of its findings can be fixed automatically.
    """

    code: str
    name: str
    severities: tuple[str, ...]
    needs: tuple[str, ...]
    unit: str
    why: str
    fix: str
    look: Look
    fixable: bool = False
