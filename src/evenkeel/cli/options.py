"""The arguments and options that several commands have, each with its one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AsJson", "DataDir", "DataSource", "Device", "ImageSize", "NetworkOrFile", "Overwrite",
    "OwnModel", "OwnModelOfFile", "TestData", "Trained", "Weights",
]  # fmt: skip

Trained = Annotated[Path, typer.Argument(help="What 'evenkeel train' wrote.")]
NetworkOrFile = Annotated[
    str, typer.Argument(help="package.module:factory, or what 'evenkeel train' wrote.")
]
Weights = Annotated[
    Path | None,
    typer.Option(help="A state dict: .safetensors, or .pt, read without running code."),
]
OwnModel = Annotated[
    str | None,
    typer.Option(help="package.module:factory, if the network is of your own making."),
]
OwnModelOfFile = Annotated[
    str | None,
    typer.Option(help="For a file of 'evenkeel train' whose network is of your own making."),
]
TestData = Annotated[
    str | None, typer.Option(help="The data set; by default the one it was trained on.")
]
DataDir = Annotated[Path | None, typer.Option(help="Where the data's files are.")]
DataSource = Annotated[
    Path | None, typer.Option(help="Where the data's files are; without it, downloaded.")
]
ImageSize = Annotated[
    int | None, typer.Option(help="For a folder: height and width of every image.", min=1)
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")]
