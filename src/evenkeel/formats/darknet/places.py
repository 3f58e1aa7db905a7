"""Where a layer stands: the shapes around it, and what its options name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from ...conventions import Convention
from ...errors import meant
from . import modules as own
from .cfg import Section

__all__ = ["ACTIVATIONS", "ALEXEYABS", "Place", "Shape"]

ACTIVATIONS: Final[dict[str, Callable[[], nn.Module]]] = {
    "elu": nn.ELU,
    "hardtan": nn.Hardtanh,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "lhtan": own.Lhtan,
    "linear": nn.Identity,
    "loggy": own.Loggy,
    "logistic": nn.Sigmoid,
    "mish": nn.Mish,
    "plse": own.Plse,
    "ramp": own.Ramp,
    "relie": lambda: nn.LeakyReLU(0.01),
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "selu": own.Selu,
    "stair": own.Stair,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}
"""By Darknet's names."""

ALEXEYABS: Final = ("mish", "relu6", "swish")
"""Activations for which pjreddie's program takes ReLU, behind a message."""


@dataclass(frozen=True)
class Shape:
    """Of one image between two layers; flat values are channels of one place to Darknet.

    Attributes:
        c, h, w: Darknet's numbers.
        flat: the tensor is (N, c), not (N, c, h, w).
    """

    c: int
    h: int
    w: int
    flat: bool = False

    @property
    def values(self) -> int:
        """How many there are."""
        return self.c * self.h * self.w

    def __str__(self) -> str:
        return f"{self.c}x{self.h}x{self.w}"


@dataclass(frozen=True)
class Place:
    """What the builder of a section's module may know.

    Attributes:
        section: the layer's own.
        index: its number.
        shapes: what the layers before it give.
        given: what the one before it gives, or the image.
        convention: of the norms.
    """

    section: Section
    index: int
    shapes: Sequence[Shape]
    given: Shape
    convention: Convention

    @property
    def is_alexeyabs(self) -> bool:
        """It is for AlexeyAB's program."""
        return self.convention.name.startswith("alexeyab")

    def source(self, number: int) -> int:
        """The number of a layer before this one; negative ones count back from here."""
        found = number if number >= 0 else self.index + number
        if not 0 <= found < self.index:
            raise self.section.error(f"there is no layer {number} before layer {self.index}")
        return found

    def activation(self, default: str) -> nn.Module:
        """The one that the section names."""
        name = self.section.options.get("activation", default)
        if name not in ACTIVATIONS:
            raise self.section.error(
                f"activation={name}{meant(name, ACTIVATIONS)}; known are {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[name]()

    def norm(self, channels: int, flat: bool, momentum: float | None = None) -> nn.Module:
        """A batch norm with the convention's settings."""
        kind = nn.BatchNorm1d if flat else nn.BatchNorm2d
        eps = 1e-5 if self.convention.eps_place == "outside" else self.convention.eps or 0.0
        return kind(channels, eps=eps, momentum=momentum or self.convention.momentum)

    def image(self) -> Shape:
        """What is given, as an image."""
        if self.given.values == 0:
            raise self.section.error("the layer before it gives no image")
        return self.given
