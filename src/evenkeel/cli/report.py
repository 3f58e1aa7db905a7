"""``evenkeel report``: what a run says, in the terminal, as a page, or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from .console import check_place, console, write_atomically
from .options import AsJson

if TYPE_CHECKING:
    from ..report.build import Report
    from ..report.numbers import ArmSummary

__all__ = ["finish", "report"]

PAGE = "report.html"


def report(
    run: Annotated[Path, typer.Argument(help="The run's folder, such as runs/quick-digits.")],
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the page goes; report.html in the run by default.")
    ] = None,
) -> None:
    """Show what a study says: a summary here, and a page with every answer and figure."""
    if as_json:
        typer.echo(json.dumps(_numbers(run).to_dict(), indent=1))
        return
    finish(run, out)


def finish(folder: Path, out: Path | None = None) -> None:
    """Prints the summary and writes the page."""
    from ..report.page import render

    if out is not None:
        check_place(out)
    numbers = _numbers(folder)
    target = out or folder / PAGE
    write_atomically(target, render(numbers))
    _summary(numbers)
    console.print(f"\nReport: [bold]{escape(str(target))}[/]", soft_wrap=True)


def _numbers(folder: Path) -> Report:
    from ..report.build import build
    from ..study.store import Store

    with Store(folder) as store:
        plan = store.plan()
        return build(plan, store.trials(plan))


def _summary(numbers: Report) -> None:
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column("arm", overflow="fold")
    table.add_column("accuracy %", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column(f"steps to {numbers.target:.0%}", justify="right", no_wrap=True)
    table.add_column("against baseline", justify="right", no_wrap=True)
    for arm in numbers.arms:
        table.add_row(*_cells(arm))
    console.print(table)
    console.print(
        "[dim]* differs from the baseline on matched seeds, p < 0.05 corrected over all arms[/]"
    )
    if numbers.finished < numbers.planned:
        console.print(f"[yellow]{numbers.finished} of {numbers.planned} trials are done.[/]")
    if numbers.lead is not None:
        console.print(f"\n{escape(numbers.lead.sentence)}")
    for answer in numbers.answers:
        console.print(f"\n[bold]{answer.number}. {escape(answer.question)}[/]")
        console.print(Padding(escape(answer.sentence), (0, 0, 0, 3)))
        if answer.next_step:
            console.print(Padding(f"[dim]{escape(answer.next_step)}[/]", (0, 0, 0, 3)))


def _cells(arm: ArmSummary) -> tuple[str, ...]:
    accuracy = span = steps = against = "-"
    if arm.accuracy is not None:
        accuracy = f"{100 * arm.accuracy.mean:.2f}"
        if arm.accuracy.low is not None and arm.accuracy.high is not None:
            span = f"{100 * arm.accuracy.low:.2f} .. {100 * arm.accuracy.high:.2f}"
    if arm.steps is not None and arm.reached:
        part = "" if arm.reached == arm.trials else f" ({arm.reached}/{arm.trials})"
        star = " *" if arm.against is not None and arm.against.differs_in_speed else "  "
        steps = f"{arm.steps.mean:.0f}{part}{star}"
    if arm.against is not None:
        star = " *" if arm.against.differs else "  "
        against = f"{100 * arm.against.accuracy.mean:+.2f}{star}"
    trouble = ", ".join(
        f"{count} {what}" for count, what in ((arm.diverged, "diverged"), (arm.failed, "failed"))
        if count
    )  # fmt: skip
    name = escape(arm.name) + (f" [yellow]({trouble})[/]" if trouble else "")
    return name, accuracy, span, steps, against
