"""Where batch norm stands in four well-known networks, for images of 224x224.

As torchvision builds them: ResNet-50 with its stride in the 3x3 convolution, VGG-16 with batch
norm, MobileNetV2, DenseNet-121.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..errors import ConfigError, meant

__all__ = ["NETWORKS", "QUICK", "TAILS", "Place", "Tail", "distinct", "places"]


class Tail(NamedTuple):
    """What follows the norm: an activation, and before it perhaps the sum with a shortcut."""

    activation: str | None
    residual: bool


TAILS = {
    "bn": Tail(None, False),
    "bn+relu": Tail("relu", False),
    "bn+relu6": Tail("relu6", False),
    "bn+add": Tail(None, True),
    "bn+add+relu": Tail("relu", True),
}
SIMPLE_TAILS = ("bn", "bn+relu", "bn+add+relu")


class Place(NamedTuple):
    """One batch norm: the channels, height and width of its input, and a name from `TAILS`."""

    channels: int
    height: int
    width: int
    tail: str


def _resnet50() -> Iterator[Place]:
    yield _square(64, 112, "bn+relu")
    before = 56
    for planes, blocks, size in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)):
        for block in range(blocks):
            yield _square(planes, before, "bn+relu")
            yield _square(planes, size, "bn+relu")
            if block == 0:
                yield _square(4 * planes, size, "bn")  # the shortcut's
            yield _square(4 * planes, size, "bn+add+relu")
            before = size


def _vgg16() -> Iterator[Place]:
    for channels, layers, size in ((64, 2, 224), (128, 2, 112), (256, 3, 56), (512, 3, 28)):
        for _ in range(layers):
            yield _square(channels, size, "bn+relu")
    for _ in range(3):
        yield _square(512, 14, "bn+relu")


def _mobilenetv2() -> Iterator[Place]:
    yield _square(32, 112, "bn+relu6")
    inputs, before = 32, 112
    for expand, outputs, blocks, size in (
        (1, 16, 1, 112), (6, 24, 2, 56), (6, 32, 3, 28), (6, 64, 4, 14), (6, 96, 3, 14),
        (6, 160, 3, 7), (6, 320, 1, 7),
    ):  # fmt: skip
        for _ in range(blocks):
            hidden = inputs * expand
            if expand != 1:
                yield _square(hidden, before, "bn+relu6")
            yield _square(hidden, size, "bn+relu6")
            same = before == size and inputs == outputs
            yield _square(outputs, size, "bn+add" if same else "bn")
            inputs, before = outputs, size
    yield _square(1280, 7, "bn+relu6")


def _densenet121() -> Iterator[Place]:
    yield _square(64, 112, "bn+relu")
    channels = 64
    for layers, size in ((6, 56), (12, 28), (24, 14), (16, 7)):
        for _ in range(layers):
            yield _square(channels, size, "bn+relu")
            yield _square(128, size, "bn+relu")
            channels += 32
        yield _square(channels, size, "bn+relu")  # the transition's, or the last one
        if size > 7:
            channels //= 2


def _square(channels: int, size: int, tail: str) -> Place:
    return Place(channels, size, size, tail)


NETWORKS: dict[str, Callable[[], Iterator[Place]]] = {
    "resnet50": _resnet50,
    "vgg16": _vgg16,
    "mobilenetv2": _mobilenetv2,
    "densenet121": _densenet121,
}

QUICK = (
    _square(64, 112, "bn+relu"),
    _square(64, 56, "bn+relu"),
    _square(256, 56, "bn"),
    _square(256, 56, "bn+add+relu"),
    _square(24, 56, "bn+add"),
    _square(480, 28, "bn+relu"),
    _square(128, 28, "bn+relu"),
    _square(512, 28, "bn+add+relu"),
    _square(576, 14, "bn+relu6"),
    _square(256, 14, "bn+relu"),
    _square(1024, 14, "bn+add+relu"),
    _square(2048, 7, "bn+add+relu"),
)
"""A dozen of all places: every tail, every size of image, few channels and many."""


def places(network: str) -> Counter[Place]:
    """The batch norms of a network, and how often each occurs.

    Raises:
        ConfigError: no such network.
    """
    if network not in NETWORKS:
        raise ConfigError(
            f"unknown network '{network}'{meant(network, NETWORKS)}; choose one of "
            f"{', '.join(NETWORKS)}, or all"
        )
    return Counter(NETWORKS[network]())


def distinct(network: str = "all", *, quick: bool = False) -> dict[Place, dict[str, int]]:
    """Every place once, with how often each network has it; the largest images first.

    Args:
        network: one of `NETWORKS`, or all.
        quick: only those in `QUICK`.

    Raises:
        ConfigError: no such network.
    """
    found: dict[Place, dict[str, int]] = {}
    for name in NETWORKS if network == "all" else (network,):
        for place, count in places(name).items():
            found.setdefault(place, {})[name] = count
    ordered = sorted(found, key=lambda place: (-place.height, place.channels, place.tail))
    return {place: found[place] for place in ordered if not quick or place in QUICK}
