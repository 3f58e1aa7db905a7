"""What a layer of Keras's is given: its config, the shapes before it, its arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from ...errors import FormatError
from .container import Arrays
from .modules import HardSigmoid

__all__ = ["Place", "Shape", "activation_of", "pair"]

Shape = tuple[int, ...]
"""Of one image or vector as Keras sees it: (h, w, c) or, with channels_first, (c, h, w)."""

_ACTIVATIONS: Final[dict[str, Callable[[], nn.Module]]] = {
    "elu": nn.ELU, "gelu": nn.GELU, "hard_sigmoid": lambda: HardSigmoid(1 / 6),
    "hard_silu": nn.Hardswish, "hard_swish": nn.Hardswish, "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "linear": nn.Identity, "mish": nn.Mish, "relu": nn.ReLU, "relu6": nn.ReLU6, "selu": nn.SELU,
    "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "softplus": nn.Softplus, "softsign": nn.Softsign,
    "swish": nn.SiLU, "tanh": nn.Tanh,
}  # fmt: skip


@dataclass
class Place:
    """One layer, where it stands in its network.

    Attributes:
        name, kind, config: of the layer.
        given: shapes of what it is given, as Keras sees them.
        first: the network's images have their channels first.
        arrays: its numbers, which `take` hands out in their order.
        old: Keras 2 wrote the file.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    given: Sequence[Shape]
    first: bool
    arrays: Arrays
    old: bool = False

    @property
    def shape(self) -> Shape:
        """Of the one value that it is given."""
        return self.given[0]

    @property
    def image(self) -> tuple[int, int, int]:
        """(c, h, w) of the image that it is given.

        Raises:
            FormatError: it is given something else.
        """
        if len(self.shape) != 3:
            raise self.error(f"it is given {self.shape}, not images")
        a, b, c = self.shape
        return (a, b, c) if self.first else (c, a, b)

    def images(self, c: int, h: int, w: int) -> Shape:
        """The shape of images, as Keras sees it."""
        if min(c, h, w) < 1:
            raise self.error(f"it makes images of {h}x{w} with {c} channels")
        return (c, h, w) if self.first else (h, w, c)

    def axis(self, wanted: int) -> int:
        """Where an axis of Keras's, counted with the batch, is in torch's tensor."""
        rank = len(self.shape) + 1
        found = wanted + rank if wanted < 0 else wanted
        if not 0 <= found < rank:
            raise self.error(f"axis {wanted} of {rank}")
        return found if self.first or rank != 4 else (0, 2, 3, 1)[found]

    def take(self, what: str, *shape: int) -> Tensor:
        """The next of its arrays.

        Raises:
            FormatError: there is none, or it has another shape.
        """
        if not self.arrays:
            raise self.error(f"its {what} is missing among the weights")
        array = self.arrays.pop(0)
        if array.shape != shape:
            raise self.error(f"its {what} is {array.shape}, but the config asks for {shape}")
        return torch.from_numpy(array.astype("float32", copy=True))

    def flag(self, key: str, default: bool) -> bool:
        """An option that is true or false."""
        return bool(self.config.get(key, default))

    def error(self, text: str) -> FormatError:
        """An error that says which layer."""
        return FormatError(f"layer '{self.name}' ({self.kind}): {text}")


def pair(place: Place, key: str, default: Any = 1) -> tuple[int, int]:
    """An option for height and width: a number for both, or two."""
    value = place.config.get(key, default)
    value = default if value is None else value
    numbers = [value, value] if isinstance(value, int) else list(value)
    if len(numbers) != 2 or not all(isinstance(n, int) and n >= 1 for n in numbers):
        raise place.error(f"{key}={value} is no size")
    return numbers[0], numbers[1]


def activation_of(place: Place, given: Any) -> nn.Module:
    """The activation of a name, or of a function's or layer's config.

    Raises:
        FormatError: it is another one.
    """
    if isinstance(given, Mapping):
        inner = given.get("config")
        if isinstance(inner, Mapping) and "class_name" in given:
            return layer_activation(place, str(given["class_name"]), inner)
        raise place.error(f"its activation '{inner}' is a function of somebody's own")
    name = "linear" if given is None else str(given)
    if name == "softmax":
        return nn.Softmax(place.axis(-1))
    if name == "hard_sigmoid" and place.old:
        return HardSigmoid(1 / 5)
    if name not in _ACTIVATIONS:
        raise place.error(f"the activation '{name}' is not supported")
    return _ACTIVATIONS[name]()


def layer_activation(place: Place, kind: str, config: Mapping[str, Any]) -> nn.Module:
    """An activation that is a layer of its own.

    Raises:
        FormatError: it is another one.
    """
    if kind == "ReLU":
        slope, top = config.get("negative_slope") or 0.0, config.get("max_value")
        if config.get("threshold") or (slope and top is not None):
            raise place.error("a threshold, or a slope with a maximum, is not supported")
        if top is not None:
            if not top > 0:
                raise place.error(f"max_value={top} is not supported")
            return nn.ReLU6() if top == 6 else nn.Hardtanh(0.0, float(top))
        return nn.LeakyReLU(float(slope)) if slope else nn.ReLU()
    if kind == "LeakyReLU":
        return nn.LeakyReLU(float(config.get("negative_slope", config.get("alpha", 0.3))))
    if kind == "ELU":
        return nn.ELU(float(config.get("alpha", 1.0)))
    if kind == "Softmax":
        axis = config.get("axis", -1)
        if not isinstance(axis, int):
            raise place.error("softmax over several axes is not supported")
        return nn.Softmax(place.axis(axis))
    raise place.error(f"the activation {kind} is not supported")
