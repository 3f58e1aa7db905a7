"""``evenkeel fold``: a network without its norms, proved and written for other programs."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..errors import ConfigError
from . import options
from .console import console, device_named
from .network import note, share_cores
from .output import FORMATS, check_out, write_out
from .subject import Given

if TYPE_CHECKING:
    from ..formats.darknet import Saved
    from ..surgery.export import Exported
    from ..surgery.fold import FoldReport

__all__ = ["fold"]


def fold(
    network: options.NetworkOrFile,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help=f"The new file: {FORMATS} Without it nothing is written.",
        ),
    ] = None,
    weights: options.Weights = None,
    input_shape: options.Inputs = None,
    dtype: options.Dtypes = None,
    example: options.Example = None,
    classes: options.Classes = None,
    dynamic_batch: options.DynamicBatch = True,
    opset: options.Opset = None,
    model: options.OwnModelOfFile = None,
    convention: options.Build = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="If a norm stays, write nothing and exit with 1.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Fold a network's batch norms into its layers, prove it, and write the result.

    The folded network is compared with the original at every norm and at the end, and the file with
    the folded network. If either differs, nothing is written. What stays is named, with the reason.
    """
    share_cores()
    given = Given(
        network, weights, classes, model, convention, input_shape or [], dtype or [], example,
        dynamic_batch,
    )  # fmt: skip
    if out is not None:
        check_out(out, opset, overwrite, given.sources)
    elif opset is not None:
        raise ConfigError("--opset belongs to a file; name it, -o FILE.onnx say")
    where = device_named(device)
    if not as_json:
        _announce(given, str(where), out)
    from ..surgery.fold import fold as folded_copy

    busy = nullcontext() if as_json else console.status("Working")
    with redirect_stdout(sys.stderr), busy:
        subject = given.open(where)
        folded, report = folded_copy(subject.network, subject.example)
        file: Exported | Saved | None = None
        if out is not None and not (strict and report.left):
            about = subject.about | {"fold": report.to_dict()}
            file = write_out(
                folded, subject.example, out,
                dynamic_batch=dynamic_batch, opset=opset, about=about, convention=convention,
                source=subject.network,
            )  # fmt: skip
    if as_json:
        kept = None if file is None else file.to_dict()
        found = {"network": network, "fold": report.to_dict(), "file": kept}
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(report, file, "images" in subject.about)
    if strict and report.left:
        note(f"{_norms(len(report.left))} left, so nothing was written (--strict)")
        raise typer.Exit(1)


def _announce(given: Given, device: str, out: Path | None) -> None:
    """What will be done."""
    lines = [
        f"Folding {given.network}"
        + (f" with the weights in {given.weights}" if given.weights else ""),
        f"Proving it on {given.numbers()}, on {device}",
    ]
    if out is not None and out.suffix == ".safetensors":
        lines.append(f"Writing the weights to {out}")
    elif out is not None:
        size = "any batch size" if given.any_batch else "this batch size"
        lines.append(f"Writing {out} for {size}")
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def _show(report: FoldReport, file: Exported | Saved | None, images: bool) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("norm", overflow="fold", max_width=30)
    table.add_column("folded into, or why it stays", overflow="fold")
    table.add_column("difference", justify="right", no_wrap=True)
    for one in report.folded:
        into = ", ".join(one.into) or "nothing, it did nothing"
        way = f" (through {', '.join(one.through)})" if one.through else ""
        table.add_row(escape(one.norm), escape(into + way), f"{one.difference:.1e}")
    for norm, reason in report.left:
        table.add_row(escape(norm), escape(f"stays: {reason}"), "")
    console.print()
    if report.folded or report.left:
        console.print(table)
    left = f", {len(report.left)} left" if report.left else ""
    console.print(f"{_norms(len(report.folded))} folded{left}")
    exact = "" if report.exact is None else f"; in double precision {report.exact:.0e}"
    console.print(
        f"Largest output difference {report.difference:.1e} of {report.scale:.3g} (budget "
        f"{report.budget:.0e} relative{exact})"
    )
    for text in report.notes:
        note(text)
    if file is not None:
        console.print(f"Kept in {escape(str(file))}")
        if images:
            console.print("Its metadata has the classes, and what an image is to be made into")


def _norms(count: int) -> str:
    return f"{count} norm{'' if count == 1 else 's'}"
