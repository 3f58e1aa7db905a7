"""A linter for batch norm: what is wrong with a network's norms, and what to do about it.

`observe` runs a copy of the network and keeps what rules need, `rules` has one table of small
pure functions, `findings` is what comes out, `formats` writes it for machines, and `fix` does what
can be done without changing what the network computes.
"""

from .findings import Finding as Finding
from .findings import Findings as Findings
from .rules import RULES as RULES
from .verb import check as check

__all__ = ["RULES", "Finding", "Findings", "check"]
