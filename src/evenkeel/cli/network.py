"""What the commands for one network share: its file, its data, and the processor's cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.markup import escape

from ..errors import ConfigError, first_line

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

    from ..study.checkpoint import Card
    from ..study.data import Dataset

__all__ = [
    "is_cfg",
    "is_foreign",
    "is_state_dict",
    "note",
    "open_foreign",
    "open_network",
    "random_inputs",
    "shape_of",
    "share_cores",
    "size_of",
    "test_data",
]


_TENSORS: Final = (".safetensors", ".pt", ".pth")


def note(text: str) -> None:
    """Prints a remark on standard error, so that what a program reads stays clean."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[yellow]Note:[/] {escape(text)}")


def share_cores() -> None:
    """Makes threads that wait for each other sleep soon; call it before torch is imported.

    By default they spin for a while. Where other programs keep a core busy, a thread spins through
    the very time that the one it waits for needs: training was four to seven times slower.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def open_network(
    path: Path, device: torch.device, model: str | None
) -> tuple[fx.GraphModule, Card]:
    """The network in a file and its card; tells if the user's own code has changed since."""
    from ..study.checkpoint import load
    from ..study.models import source_fingerprint

    network, card = load(path, device, model=model)
    if card.source and card.source != source_fingerprint(card.training.arm.model):
        note(
            f"the code of {card.training.arm.model} has changed since {path} was trained; the "
            "weights fit, but the network may compute something else"
        )
    return network, card


def is_cfg(name: str) -> bool:
    """Whether a network's name is a Darknet file's."""
    return Path(name).suffix.lower() == ".cfg"


def is_foreign(name: str) -> bool:
    """Whether a network's name is a file's of another program: Darknet's or Keras's."""
    return Path(name).suffix.lower() in (".cfg", ".keras", ".h5")


def is_state_dict(weights: Path | None) -> bool:
    """Whether weights are tensors by name, whichever network they belong to."""
    return weights is not None and weights.suffix in _TENSORS


def open_foreign(
    path: Path, weights: Path | None, convention: str | None
) -> tuple[nn.Module, tuple[int, ...]]:
    """The network in another program's file, and the shape of a sample.

    A .cfg comes with its .weights, if that is what the weights are; tells if it has none, for then
    its weights are random ones.
    """
    from ..formats import darknet, keras

    if not is_cfg(str(path)):
        if convention is not None or not (weights is None or is_state_dict(weights)):
            raise ConfigError(f"{path} has all in it; leave out --convention and --weights")
        model = keras.load(path)
        return model, model.shape

    if weights is None:
        note(f"no --weights, so {path} has the random weights that training begins with")
    own = None if is_state_dict(weights) else weights
    network = darknet.load(path, own, convention=convention or "darknet-gpu")
    return network, network.image


def test_data(card: Card, name: str | None, folder: Path | None, image_size: int | None) -> Dataset:
    """The data to test a network on: the one that it was trained on, unless another is named.

    Raises:
        ConfigError: its images or its classes are not those of the network.
    """
    from ..study.data import load

    own = card.training.data
    if folder is None and name in (None, own.name):
        folder = own.path
    if image_size is None and (name or own.name) == "folder" and card.shape[1] == card.shape[2]:
        image_size = card.shape[1]
    dataset = load(name or own.name, folder, image_size=image_size)
    for text in dataset.notes:
        note(text)
    if dataset.shape != card.shape:
        raise ConfigError(
            f"{dataset.name} has images of {size_of(dataset.shape)}, but the network was trained "
            f"on {size_of(card.shape)}"
        )
    if dataset.classes != card.classes:
        raise ConfigError(
            f"{dataset.name} has other classes ({_few(dataset.classes)}) than the network "
            f"({_few(card.classes)})"
        )
    return dataset


def shape_of(text: str) -> tuple[int, ...]:
    """The shape that --input gives: '1,3,224,224' or '1x3x224x224'.

    Raises:
        ConfigError: it is none, or has no batch.
    """
    try:
        sizes = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if len(sizes) < 2 or min(sizes, default=0) < 1:
        raise ConfigError(f"--input {text} is no shape; write batch first, such as 1,3,224,224")
    return sizes


def random_inputs(shapes: Sequence[tuple[int, ...]], kinds: Sequence[str] = ("float32",)) -> Any:
    """Random inputs, the same every time: normal ones, or zeros and ones for whole numbers.

    Raises:
        ConfigError: they are too large for the memory.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    made = []
    for shape, kind in zip(shapes, kinds, strict=True):
        dtype: torch.dtype = getattr(torch, kind)
        try:
            if dtype.is_floating_point:
                made.append(torch.randn(shape, generator=generator).to(dtype))
            else:
                made.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
        except RuntimeError as error:
            raise ConfigError(
                f"--input {','.join(map(str, shape))} is too large for the memory here "
                f"({first_line(error)}); give a smaller one"
            ) from error
    return made[0] if len(made) == 1 else tuple(made)


def size_of(shape: tuple[int, int, int]) -> str:
    """A shape for people: '1x28x28'."""
    return "x".join(str(size) for size in shape)


def _few(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
