"""``evenkeel doctor``: what works here, and the remedy for what does not."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from .console import console

__all__ = ["doctor"]

_MARKS = {True: "[green]ok[/]", False: "[yellow]![/]", None: ""}


def doctor() -> None:
    """Show versions, backends, threads, allocator and compiler, with remedies."""
    from ..bench.checkup import findings

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings():
        text = escape(finding.text)
        if finding.remedy:
            text += f"\n[dim]remedy:[/] {escape(finding.remedy)}"
        table.add_row(_MARKS[finding.is_good], finding.topic, text)
    console.print(table)
