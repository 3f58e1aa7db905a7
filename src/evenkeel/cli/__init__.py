"""The command line: one file for each command, and `main` that runs them.

Commands import what they need when they run, so that ``evenkeel --help`` answers at once.
"""

from __future__ import annotations

import sys

import typer

from ..errors import EvenkeelError
from .bench import bench
from .check import check
from .console import complain
from .convert import convert
from .doctor import doctor
from .evaluate import evaluate
from .fold import fold
from .predict import predict
from .recalibrate import recalibrate
from .report import report
from .study import study
from .train import train

__all__ = ["app", "main"]

app = typer.Typer(
    name="evenkeel",
    help="Batch normalization for CNNs: study where it belongs, train with it, fold it away.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(study)
app.command()(report)
app.command()(train)
app.command()(evaluate)
app.command()(predict)
app.command()(recalibrate)
app.command()(check)
app.command()(fold)
app.command()(convert)
app.add_typer(bench, name="bench")
app.command()(doctor)


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    if version:
        from .. import __version__

        typer.echo(f"evenkeel {__version__}")
        raise typer.Exit


def main() -> None:
    """Runs the command line: 0 for success, 1 for a finding, 2 for a mistake, 130 for Ctrl-C."""
    try:
        app()
    except EvenkeelError as error:
        complain(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        complain("stopped")
        sys.exit(130)
