"""What Darknet computes and torch has no module for.

Every module can be traced by torch.fx and takes images of any size that its layer allows. Formulas
are those of src/activations.h, src/blas.c and the layers' own files in pjreddie/darknet and, where
said, AlexeyAB/darknet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Add",
    "Behind",
    "Crop",
    "Formed",
    "Lhtan",
    "Loggy",
    "Multiply",
    "Plse",
    "Ramp",
    "Region",
    "Reorg",
    "Route",
    "Selu",
    "Softmax",
    "Stair",
    "Times",
    "Yolo",
]  # fmt: skip


class Loggy(nn.Module):
    """``2 / (1 + exp(-x)) - 1``."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(x) - 1


class Lhtan(nn.Module):
    """x between 0 and 1, with slope 0.001 below and above."""

    def forward(self, x: Tensor) -> Tensor:
        inside = x.clamp(0, 1)
        return inside + 0.001 * (x - inside)


class Plse(nn.Module):
    """``x / 8 + 1 / 2`` between -4 and 4, with slope 0.01 below and above."""

    def forward(self, x: Tensor) -> Tensor:
        inside = x.clamp(-4, 4)
        return 0.125 * inside + 0.5 + 0.01 * (x - inside)


class Ramp(nn.Module):
    """``max(x, 0) + 0.1 x``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + 0.1 * x


class Selu(nn.Module):
    """The scaled ELU with Darknet's constants of five digits, 1.0507 and 1.6732."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.0507 * (torch.relu(x) + 1.6732 * torch.expm1(-torch.relu(-x)))


class Stair(nn.Module):
    """A stair that climbs by 1 while x does by 2: flat from an even number, steep from an odd."""

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.floor(x)
        odd = torch.remainder(whole, 2)
        return torch.floor(x / 2) + odd * (x - whole)


class Times(nn.Module):
    """``factor * x``."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def extra_repr(self) -> str:
        return f"{self.factor}"


class Crop(nn.Module):
    """The middle of each image, and ``2 x - 1`` unless the layer says noadjust."""

    def __init__(self, height: int, width: int, adjust: bool) -> None:
        super().__init__()
        self.height, self.width, self.adjust = height, width, adjust

    def forward(self, x: Tensor) -> Tensor:
        top = (x.size(2) - self.height) // 2
        left = (x.size(3) - self.width) // 2
        middle = x[:, :, top : top + self.height, left : left + self.width]
        return 2 * middle - 1 if self.adjust else middle

    def extra_repr(self) -> str:
        return f"{self.height}x{self.width}, adjust={self.adjust}"


class Add(nn.Module):
    """[shortcut]: ``alpha * x + beta * other`` on the channels and places that both have.

    A larger ``other`` gives every stride-th of its places, a smaller one goes to every
    ``spread``-th place of x; channels of x that it does not have stay as they are.
    """

    def __init__(
        self, alpha: float, beta: float, channels: int | None, stride: int, spread: int
    ) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.channels, self.stride, self.spread = channels, stride, spread

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        total = x if self.alpha == 1 else self.alpha * x
        for other in others:
            part = self._fitted(x, other)
            total = total + (part if self.beta == 1 else self.beta * part)
        return total

    def _fitted(self, x: Tensor, other: Tensor) -> Tensor:
        if self.stride > 1:
            other = other[:, :, :: self.stride, :: self.stride]
        if self.spread > 1:
            gap = self.spread - 1
            height, width = other.size(2) * self.spread, other.size(3) * self.spread
            other = F.pad(other.unsqueeze(4).unsqueeze(3), (0, gap, 0, 0, 0, gap))
            other = other.reshape(x.size(0), -1, height, width)
        if self.channels is not None:
            other = other[:, : self.channels]
            other = F.pad(other, (0, 0, 0, 0, 0, x.size(1) - self.channels))
        return other

    def extra_repr(self) -> str:
        return f"{self.alpha} x + {self.beta} other"


class Multiply(nn.Module):
    """AlexeyAB's [scale_channels] and [sam]: ``x * other``, x of one place being each place's."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x * other


class Formed(nn.Module):
    """A module of several inputs that are given to it flat, (N, c), or as images of one place."""

    def __init__(self, module: nn.Module, flat: bool, which: Sequence[bool]) -> None:
        super().__init__()
        self.module, self.flat, self.which = module, flat, tuple(which)

    def forward(self, *values: Tensor) -> Tensor:
        pairs = zip(self.which, values, strict=True)
        out: Tensor = self.module(*(self._formed(x) if turns else x for turns, x in pairs))
        return out

    def _formed(self, x: Tensor) -> Tensor:
        return x.flatten(1) if self.flat else x[:, :, None, None]


class Behind(nn.Module):
    """A module of several inputs, with an activation behind it."""

    def __init__(self, module: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.module, self.activation = module, activation

    def forward(self, *values: Tensor) -> Tensor:
        out: Tensor = self.activation(self.module(*values))
        return out


class Route(nn.Module):
    """[route]: other layers' channels behind each other, or AlexeyAB's n-th group of them."""

    def __init__(self, groups: int, group: int) -> None:
        super().__init__()
        self.groups, self.group = groups, group

    def forward(self, *values: Tensor) -> Tensor:
        parts = [v if self.groups == 1 else v.chunk(self.groups, 1)[self.group] for v in values]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def extra_repr(self) -> str:
        return f"group {self.group} of {self.groups}" if self.groups > 1 else ""


class Reorg(nn.Module):
    """[reorg]: stride^2 as many channels of images that are stride times smaller, or back.

    The order is Darknet's own, which reads its input as if it already had the output's channels: it
    is no space-to-depth.
    """

    def __init__(self, stride: int, reverse: bool) -> None:
        super().__init__()
        self.stride, self.reverse = stride, reverse

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w, s = x.size(0), x.size(1), x.size(2), x.size(3), self.stride
        if self.reverse:
            split = x.reshape(n, s, s, c // (s * s), h, w).permute(0, 3, 4, 1, 5, 2)
            return split.reshape(n, c // (s * s), h * s, w * s)
        split = x.reshape(n, c // (s * s), h, s, w, s).permute(0, 3, 5, 1, 2, 4)
        return split.reshape(n, c * s * s, h // s, w // s)

    def extra_repr(self) -> str:
        return f"{self.stride}, reverse={self.reverse}"


class Softmax(nn.Module):
    """[softmax] over each of the groups of an image's values, or over the channels of each place.

    Darknet forgets the image's shape there: the result has one axis behind the batch.
    """

    def __init__(self, groups: int, temperature: float, spatial: bool) -> None:
        super().__init__()
        self.groups, self.temperature, self.spatial = groups, temperature, spatial

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.temperature == 1 else x / self.temperature
        if self.spatial:
            return torch.softmax(x, 1).flatten(1)
        if self.groups == 1:
            return torch.softmax(x.flatten(1), 1)
        return torch.softmax(x.reshape(x.size(0), self.groups, -1), 2).flatten(1)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, temperature={self.temperature}, spatial={self.spatial}"


class Yolo(nn.Module):
    """[yolo] as the layer leaves it, (N, anchors * (5 + classes), H, W): no boxes yet.

    Of each anchor x, y, the objectness and the classes are logistic, w and h are raw. AlexeyAB's
    scale_x_y s makes ``s * x - (s - 1) / 2`` of x and y; with new_coords nothing is logistic.
    """

    def __init__(self, count: int, classes: int, scale: float, raw: bool) -> None:
        super().__init__()
        self.count, self.classes, self.scale, self.raw = count, classes, scale, raw

    def forward(self, x: Tensor) -> Tensor:
        values = _by_anchor(x, self.count)
        places, sizes, rest = values[:, :, :2], values[:, :, 2:4], values[:, :, 4:]
        if not self.raw:
            places, rest = torch.sigmoid(places), torch.sigmoid(rest)
        if self.scale != 1:
            places = self.scale * places - (self.scale - 1) / 2
        return torch.cat((places, sizes, rest), 2).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{self.count} anchors, {self.classes} classes, scale_x_y={self.scale}"


class Region(nn.Module):
    """[region] of pjreddie's as the layer leaves it, (N, anchors * (coords + 1 + classes), H, W).

    Of each anchor the first two values and the objectness are logistic, and the classes too, unless
    ``softmax`` is set.
    """

    def __init__(self, count: int, coords: int, classes: int, softmax: bool) -> None:
        super().__init__()
        self.count, self.coords, self.classes, self.softmax = count, coords, classes, softmax

    def forward(self, x: Tensor) -> Tensor:
        values = _by_anchor(x, self.count)
        classes = values[:, :, self.coords + 1 :]
        parts: Sequence[Tensor] = (
            torch.sigmoid(values[:, :, :2]),
            values[:, :, 2 : self.coords],
            torch.sigmoid(values[:, :, self.coords : self.coords + 1]),
            torch.softmax(classes, 2) if self.softmax else torch.sigmoid(classes),
        )
        return torch.cat(list(parts), 2).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{self.count} anchors, {self.classes} classes, softmax={self.softmax}"


def _by_anchor(x: Tensor, count: int) -> Tensor:
    """(N, anchors * values, H, W) as (N, anchors, values, H, W)."""
    return x.reshape(x.size(0), count, -1, x.size(2), x.size(3))
