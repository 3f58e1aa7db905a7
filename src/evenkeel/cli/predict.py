"""``evenkeel predict``: what a trained network sees in pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..allocator import keep_blocks
from ..errors import FormatError
from .console import complain, console, device_named
from .network import note, open_network, share_cores
from .options import Device, OwnModel, Trained

if TYPE_CHECKING:
    import torch
    from torch import Tensor, fx

    from ..study.checkpoint import Card

__all__ = ["predict"]

_TOGETHER = 100
_WHITE_ON_BLACK = ("digits", "mnist", "fashion-mnist")


def predict(
    network: Trained,
    images: Annotated[list[Path], typer.Argument(help="PNG, JPEG and other pictures.")],
    invert: Annotated[
        bool, typer.Option("--invert", help="Swap dark and light before anything else.")
    ] = False,
    top: Annotated[int, typer.Option(help="How many classes to show, best first.", min=1)] = 1,
    model: OwnModel = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the predictions as JSON.")] = False,
) -> None:
    """Tell the class of each picture, with its probability.

    A picture is turned upright as its camera says, laid on white where it is transparent, made
    gray or RGB and stretched to the size of the network's images; then it is scaled as the
    training images were. MNIST has light digits on black: give --invert for ink on paper. A
    picture that cannot be read is named, the others are still told, and the exit code is 2.
    """
    share_cores()
    keep_blocks()
    where = device_named(device)
    trained, card = open_network(network, where, model)
    found: list[dict[str, Any]] = []
    light = 0
    for start in range(0, len(images), _TOGETHER):
        read = [_read(path, card, invert) for path in images[start : start + _TOGETHER]]
        good = [picture for picture in read if not isinstance(picture, FormatError)]
        light += sum(_is_light_at_the_edges(picture) for picture in good)
        told = iter(_best(trained, card, good, top, where) if good else [])
        for path, picture in zip(images[start:], read, strict=False):
            entry: dict[str, Any] = {"image": str(path)}
            if isinstance(picture, FormatError):
                complain(str(picture))
                entry["error"] = str(picture)
            else:
                entry["classes"] = next(told)
                if not as_json:
                    _show(entry)
            found.append(entry)
    if light and not invert and card.training.data.name in _WHITE_ON_BLACK:
        note(
            f"{light} of {len(images)} pictures are light at the edges, but the network was "
            "trained on light figures on black; try --invert"
        )
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    if any("error" in entry for entry in found):
        raise typer.Exit(2)


def _read(path: Path, card: Card, invert: bool) -> Tensor | FormatError:
    """The picture's bytes, or why there are none."""
    from ..study.data.folder import read_picture

    try:
        picture = read_picture(path, card.shape)
    except FormatError as error:
        return error
    return 255 - picture if invert else picture


def _best(
    network: fx.GraphModule, card: Card, pictures: list[Tensor], top: int, device: torch.device
) -> list[list[dict[str, Any]]]:
    """The likeliest classes of each picture, best first."""
    import torch

    with torch.no_grad():
        images = card.inputs(torch.stack(pictures), 255.0).to(device)
        shares = network(images).double().softmax(1).cpu()
    values, places = shares.topk(min(top, len(card.classes)))
    return [
        [{"class": card.classes[i], "probability": p} for i, p in zip(at, ps, strict=True)]
        for at, ps in zip(places.tolist(), values.tolist(), strict=True)
    ]


def _show(entry: dict[str, Any]) -> None:
    told = ", ".join(f"{e['class']} ({100 * e['probability']:.1f} %)" for e in entry["classes"])
    console.print(f"{escape(entry['image'])}: {escape(told)}", soft_wrap=True)


def _is_light_at_the_edges(picture: Tensor) -> bool:
    edge = [picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]]
    return sum(float(side.float().mean()) for side in edge) / len(edge) > 127
