"""The arguments and options that several commands have, each with its one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

__all__ = [
    "DTYPES", "AsJson", "Build", "Classes", "DataDir", "DataSource", "Device", "Dtypes",
    "DynamicBatch", "Example", "ImageSize", "Inputs", "NetworkOrFile", "Opset", "Overwrite",
    "OwnModel", "OwnModelOfFile", "TestData", "Trained", "Weights",
]  # fmt: skip

Trained = Annotated[Path, typer.Argument(help="What 'evenkeel train' wrote.")]
NetworkOrFile = Annotated[
    str,
    typer.Argument(
        help="package.module:factory, what 'evenkeel train' wrote, Darknet's .cfg, Keras's .keras "
        "or .h5."
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="A state dict: .safetensors, or .pt, read without running code; Darknet's .weights "
        "for a .cfg."
    ),
]
Build = Annotated[
    str | None,
    typer.Option(
        "--convention",
        help="For a .cfg: darknet-gpu (the default; the same as darknet-cudnn and alexeyab-gpu "
        "at inference), darknet-cpu, which has its epsilon elsewhere, ...",
    ),
]
OwnModel = Annotated[
    str | None,
    typer.Option(help="package.module:factory, if the network is of your own making."),
]
OwnModelOfFile = Annotated[
    str | None,
    typer.Option(help="For a file of 'evenkeel train' whose network is of your own making."),
]
DTYPES: Final = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", help="The shape of an input, 1,3,224,224 say; once for each."),
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option("--dtype", help=f"Of the inputs, once or for each: {', '.join(DTYPES)}."),
]
Example = Annotated[
    Path | None,
    typer.Option(help="Real inputs, .npy or .safetensors (several by name), in place of --input."),
]
Classes = Annotated[
    int | None, typer.Option(help="For a factory that asks for it; 10 by default.", min=1)
]
DynamicBatch = Annotated[
    bool, typer.Option("--dynamic-batch/--fixed-batch", help="Any batch size, or the example's.")
]
Opset = Annotated[
    int | None, typer.Option(help="Of the ONNX file; by default torch's choice.", min=1)
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
