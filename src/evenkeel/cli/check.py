"""``evenkeel check``: the mistakes with batch norm in a network, for people and for machines."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, meant
from .console import check_place, device_named
from .network import (
    is_foreign,
    is_state_dict,
    note,
    open_foreign,
    open_network,
    random_inputs,
    shape_of,
    share_cores,
    test_data,
)  # fmt: skip
from .options import Build, DataDir, Device, ImageSize, NetworkOrFile, OwnModelOfFile, Weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..checks import Findings
    from ..checks.fix import Fixed
    from ..study.checkpoint import Card
    from ..study.data import Dataset

__all__ = ["check"]

_READINGS = ("normalized", "unit", "raw")
_BATCHES = 16
_SHAPE = (3, 224, 224)


@dataclass(frozen=True)
class _Subject:
    """A network to check, and what to check it with."""

    network: nn.Module
    origin: Any
    example: Tensor | None
    data: list[Tensor] | None
    card: Card | None = None


def check(
    network: NetworkOrFile,
    weights: Weights = None,
    input_shape: Annotated[
        str | None,
        typer.Option("--input", help="The shape of an input, 1,3,224,224 say, for a trial run."),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(help="For a factory that asks for it; 10, or the data's.", min=1)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, mnist, fashion-mnist, cifar10, idx or folder: for the measures."
        ),
    ] = None,
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    reading: Annotated[
        str | None,
        typer.Option(
            help="What the network gets of the data. normalized (the default): mean 0 and "
            "deviation 1 for each channel. unit (for a .cfg or .keras): 0 to 1. raw: the bytes."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples in a batch of training; 64 by default.", min=1)
    ] = None,
    output: Annotated[
        str, typer.Option("--format", help="text, json, sarif (2.1.0) or github (annotations).")
    ] = "text",
    fix: Annotated[
        bool, typer.Option("--fix", help="Do what changes no output, and write the weights.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="For --fix: the new file; by default '-fixed' in its name.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A code that is not to be told; may be repeated.")
    ] = None,
    model: OwnModelOfFile = None,
    convention: Build = None,
    device: Device = "auto",
) -> None:
    """Find the mistakes people make with batch norm, each with a number and its remedy.

    The exit code is 1 if there is an error among the findings. Nothing of the network's own output
    mixes with the findings: what it prints goes to standard error.
    """
    share_cores()
    from ..checks import check as checked
    from ..checks.fix import fix as fixed_copy
    from ..checks.formats import FORMATS

    reading = reading or ("unit" if is_foreign(network) else "normalized")
    for what, chosen, choices in (
        ("--format", output, tuple(FORMATS)),
        ("--reading", reading, _READINGS),
    ):
        if chosen not in choices:
            raise ConfigError(
                f"unknown {what} '{chosen}'{meant(chosen, choices)}; choose {', '.join(choices)}"
            )
    codes = [code for each in ignore or () for code in each.split(",")]
    sizes = None if input_shape is None else shape_of(input_shape)
    if out is not None:
        check_place(out)
    where = device_named(device)
    with redirect_stdout(sys.stderr):
        if Path(network).is_file() and not is_foreign(network):
            if sizes is not None or weights is not None or classes is not None:
                raise ConfigError(
                    f"{network} says all of it; leave out --input, --weights and --classes"
                )
            subject = _trained(Path(network), model, data, data_dir, image_size, batch_size, where)
        else:
            dataset = _dataset(data, data_dir, image_size)
            built = None
            if is_foreign(network):
                built, shape = open_foreign(Path(network), weights, convention)
                built, sizes = built.to(where), sizes or (batch_size or 8, *shape)
                weights = weights if is_state_dict(weights) else None
            size = batch_size or 64
            subject = _made(network, built, sizes, classes, dataset, reading, size, where)
        given = {"origin": subject.origin, "ignore": codes}
        found = checked(subject.network, subject.example, subject.data, None, weights, **given)
        done = None
        if fix:
            whole = _whole(subject, weights)
            repaired, done = fixed_copy(whole, _needed(subject.example), **given)
            target = out or _beside(weights or (Path(network) if subject.card else None))
            if done.biases or done.flushed:
                _write(target, repaired, subject.card)
                found = checked(repaired, subject.example, subject.data, **given)
    _tell(found, done, output)
    if done is not None:
        wrote = done.biases or done.flushed
        note(f"{done}\n{target} has the new weights" if wrote else "there is nothing to fix")
    if found.errors:
        raise typer.Exit(1)


def _dataset(name: str | None, folder: Path | None, image_size: int | None) -> Dataset | None:
    if name is None:
        if folder is not None or image_size is not None:
            raise ConfigError("--data-dir and --image-size belong to --data; name the data set")
        return None
    from ..study.data import load

    dataset = load(name, folder, image_size=image_size)
    for text in dataset.notes:
        note(text)
    return dataset


def _made(
    name: str,
    built: nn.Module | None,
    sizes: tuple[int, ...] | None,
    classes: int | None,
    dataset: Dataset | None,
    reading: str,
    batch_size: int,
    device: torch.device,
) -> _Subject:
    """A network with an example and data; without one built, that of a factory."""

    from ..study.models import build

    shape: Any = _SHAPE if sizes is None else sizes[1:]
    if dataset is not None:
        shape = dataset.shape
        if sizes is not None and sizes[1:] != shape:
            raise ConfigError(f"--input has samples of {sizes[1:]}, but {dataset.name} of {shape}")
    count = classes or (10 if dataset is None else len(dataset.classes))
    network = built or build(name, shape, count, "relu", 0).to(device)
    batches = None if dataset is None else _batches(dataset, reading, batch_size, device)
    example = None if batches is None else batches[0]
    if example is None and sizes is not None:
        example = random_inputs([sizes]).to(device)
    return _Subject(network, _origin(name), example, batches)


def _origin(name: str) -> Any:
    """The factory of a network that was just built."""
    module, _, attribute = name.partition(":")
    return getattr(sys.modules.get(module), attribute, None) if attribute else None


def _batches(dataset: Dataset, reading: str, size: int, device: torch.device) -> list[Tensor]:
    """The first training images in a fixed random order, in full batches."""
    import torch

    from ..study.data.base import shuffled
    from ..study.inputs import Inputs

    inputs, white = Inputs(), float(dataset.white)
    if reading == "normalized":
        inputs = Inputs.measured(dataset.train.images, white)
    images = shuffled(dataset.train).images[: size * _BATCHES]
    parts = torch.split(images, size)
    parts = parts[:-1] if len(parts) > 1 and len(parts[-1]) < size else parts
    return [inputs(part, 1.0 if reading == "raw" else white).to(device) for part in parts]


def _trained(
    path: Path,
    model: str | None,
    data: str | None,
    data_dir: Path | None,
    image_size: int | None,
    batch_size: int | None,
    device: torch.device,
) -> _Subject:
    """A network of 'evenkeel train', with the data it was trained on."""
    import torch

    from ..study.data.base import shuffled

    network, card = open_network(path, device, model)
    dataset = test_data(card, data, data_dir, image_size)
    size = batch_size or card.training.arm.batch_size
    images = shuffled(dataset.train).images[: size * _BATCHES]
    inputs, white = card.inputs, float(dataset.white)
    parts = [p for p in torch.split(images, size) if len(p) == size] or [images]
    batches = [inputs(part, white).to(device) for part in parts]
    return _Subject(network, None, batches[0], batches, card)


def _whole(subject: _Subject, weights: Path | None) -> nn.Module:
    """The network with the weights in it."""
    from ..checks.weights import as_checkpoint, load_into

    if weights is not None:
        load_into(subject.network, as_checkpoint(weights))
    return subject.network


def _needed(example: Tensor | None) -> Tensor:
    if example is None:
        raise ConfigError("--fix proves what it does on an input; give --input or --data")
    return example


def _beside(path: Path | None) -> Path:
    if path is None:
        return Path("fixed.safetensors")
    return path.with_name(f"{path.stem}-fixed.safetensors")


def _write(path: Path, network: nn.Module, card: Card | None) -> None:
    from ..checks.weights import save
    from ..study import checkpoint

    if card is None:
        save(path, network)
    else:
        checkpoint.save(path, network, card)


def _tell(found: Findings, done: Fixed | None, output: str) -> None:
    from ..checks.formats import FORMATS

    if output == "json":
        more = {} if done is None else {"fixed": done.to_dict()}
        typer.echo(json.dumps(found.to_dict() | more, indent=1))
    else:
        text = FORMATS[output](found)
        if text:
            typer.echo(text)
