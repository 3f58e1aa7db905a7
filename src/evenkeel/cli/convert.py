"""``evenkeel convert``: a network from one program's files to another's, norms and all."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from . import options
from .console import console, device_named
from .network import share_cores
from .output import FORMATS, check_out, write_out
from .subject import Given

__all__ = ["convert"]


def convert(
    network: options.NetworkOrFile,
    out: Annotated[Path, typer.Option("--out", "-o", help=f"The new file: {FORMATS}")],
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Convert a network of Darknet, Keras or torch to Darknet, ONNX or torch, norms as they are.

    The new file is read again and compared with the network; if it differs, nothing is written. To
    have the norms folded into the layers on the way, use 'evenkeel fold'.
    """
    share_cores()
    given = Given(
        network, weights, classes, model, convention, input_shape or [], dtype or [], example,
        dynamic_batch,
    )  # fmt: skip
    check_out(out, opset, overwrite, given.sources)
    where = device_named(device)
    if not as_json:
        behind = f" with the weights in {weights}" if weights else ""
        lines = f"Converting {network}{behind} to {out}\nComparing on {given.numbers()}, on {where}"
        console.print(lines, markup=False, soft_wrap=True)
    busy = nullcontext() if as_json else console.status("Working")
    with redirect_stdout(sys.stderr), busy:
        subject = given.open(where)
        written = write_out(
            subject.network, subject.example, out,
            dynamic_batch=dynamic_batch, opset=opset, about=subject.about, convention=convention,
            source=subject.network,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps({"network": network, "file": written.to_dict()}, indent=1))
    else:
        console.print(f"Kept in {escape(str(written))}")
