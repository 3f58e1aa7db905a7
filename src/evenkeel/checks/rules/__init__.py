"""What is looked for: `table` has every rule, the other files the functions behind them."""

from __future__ import annotations

from typing import Final

from .base import Blind as Blind
from .base import Found as Found
from .base import Rule as Rule
from .table import RULES as RULES

__all__ = ["CODES", "RULES", "Blind", "Found", "Rule", "as_table"]

CODES: Final = {rule.code: rule for rule in RULES}


def as_table() -> str:
    """The table of all codes in Markdown; docs/check.md has it word for word."""
    rows = ["| code | name | severity | evidence | needs | `--fix` |", "|---|---|---|---|---|---|"]
    for rule in RULES:
        needs = {_NEEDS.get(need, need) for need in rule.needs}
        rows.append(
            f"| {rule.code} | {rule.name} | {', '.join(rule.severities)} | {rule.unit} | "
            f"{', '.join(sorted(needs)) or 'the network'} | {'yes' if rule.fixable else ''} |"
        )
    return "\n".join(rows)


_NEEDS: Final = {
    "training": "a trace or an example",
    "inference": "a trace or an example",
    "run": "an example",
    "run or attempt": "an example",
    "measure": "data",
    "optimizer": "the optimizer",
    "checkpoint": "a checkpoint",
}
