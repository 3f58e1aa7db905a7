"""A module for each section of a .cfg, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from ...conventions import Convention
from ...errors import first_line
from .builders import BUILDERS, Built
from .cfg import Section
from .places import Place, Shape

__all__ = ["HEADS", "Layer", "layers_of"]

HEADS: Final = ("region", "yolo")
"""Sections whose outputs are outputs of the network, wherever they stand."""

_OTHERWISE: Final = {
    "": ("dontload", "dontloadscales", "dontsave", "numload"),
    "convolutional": (
        "antialiasing", "assisted_excitation", "bin_output", "binary", "coordconv", "deform",
        "rotate", "share_index", "stretch", "stretch_sway", "sway", "xnor",
    ),
    "maxpool": ("antialiasing", "maxpool_depth", "stride_x", "stride_y"),
    "region": ("background", "tree"),
    "reorg": ("extra", "flatten"),
    "shortcut": ("weights_type",),
    "softmax": ("tree",),
}  # fmt: skip
"""Options that make a layer compute something else than is done here; '' is every section."""
_ON_IMAGES: Final = ("crop", "region", "reorg", "upsample", "yolo")
"""What is given images of one place where it stands behind a dense layer."""
_MOST: Final = 2**31
"""Values of an image between two layers: Darknet counts with int."""


@dataclass(frozen=True)
class Layer:
    """A section with its module.

    Attributes:
        section: where it comes from.
        module: takes the previous layer's output (not a [route]) and those of ``sources``.
        sources: numbers of the other layers that it takes.
        shape: of what it gives.
    """

    section: Section
    module: nn.Module
    sources: tuple[int, ...]
    shape: Shape


def layers_of(sections: Sequence[Section], convention: Convention) -> tuple[Shape, list[Layer]]:
    """The shape of an image and the layers of a .cfg, [net] first among its sections.

    Raises:
        FormatError: an unknown section, activation or option, or sizes that do not fit.
    """
    net, *rest = sections
    for section in rest:
        if section.name not in BUILDERS:
            raise section.error(
                f"this kind of layer is not supported; known are {', '.join(sorted(BUILDERS))}"
            )
    c, h, w = (net.at_least(key, 0, 1) for key in ("channels", "height", "width"))
    image = Shape(c, h, w)
    layers: list[Layer] = []
    shapes: list[Shape] = []
    for index, section in enumerate(rest):
        for key in (*_OTHERWISE[""], *_OTHERWISE.get(section.name, ())):
            if section.options.get(key, "0") not in ("0", "none") and not _is_usual(section, key):
                raise section.error(f"{key}={section.options[key]} is not supported")
        place = Place(section, index, shapes, shapes[-1] if shapes else image, convention)
        module, shape, *sources = _built(place)
        if min(shape.c, shape.h, shape.w) < 1:
            raise section.error(f"it makes {shape} of {place.given}; the image is too small")
        if shape.values >= _MOST:
            raise section.error(f"it makes {shape}, more values than Darknet can count")
        layers.append(Layer(section, module, sources[0] if sources else (), shape))
        shapes.append(shape)
    if not layers:
        raise net.error("there is no layer behind it")
    return image, layers


def _built(place: Place) -> Built:
    """What a section's builder makes, on an image where it knows nothing else."""
    section = place.section
    try:
        built = BUILDERS[section.name](place)
    except (RuntimeError, TypeError, OverflowError) as error:  # of torch's, for sizes beyond reason
        raise section.error(f"torch cannot make it ({first_line(error)})") from error
    if place.given.flat and section.name in _ON_IMAGES:
        return nn.Sequential(nn.Unflatten(1, (place.given.c, 1, 1)), built[0]), built[1]
    return built


def _is_usual(section: Section, key: str) -> bool:
    """AlexeyAB's strides for each axis may say what stride says."""
    return key.startswith("stride_") and section.options[key] == section.options.get("stride", "1")
