"""What Keras's layers do and torch has no module for. Images are (N, c, h, w) here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Affine",
    "AsKeras",
    "Average",
    "Concatenate",
    "Crop",
    "HardSigmoid",
    "Merge",
    "Pool",
    "SharedDropout",
    "WithNumber",
]

_MERGES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "Add": torch.add, "Multiply": torch.mul, "Maximum": torch.maximum, "Minimum": torch.minimum,
    "Subtract": torch.sub,
}  # fmt: skip


class Merge(nn.Module):
    """Add, Multiply, Maximum, Minimum, Subtract or Average of several values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, *values: Tensor) -> Tensor:
        if self.kind == "Average":
            return reduce(torch.add, values) / len(values)
        return reduce(_MERGES[self.kind], values)

    def extra_repr(self) -> str:
        return self.kind


class WithNumber(nn.Module):
    """A value and a number, in that order or with the number first."""

    number: Tensor

    def __init__(self, kind: str, number: float, leads: bool) -> None:
        super().__init__()
        self.kind, self.leads = kind, leads
        self.register_buffer("number", torch.tensor(number), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        values = (self.number, x) if self.leads else (x, self.number)
        return _MERGES[self.kind](*values)

    def extra_repr(self) -> str:
        return f"{self.kind}, {float(self.number):g}"


class Concatenate(nn.Module):
    """Values behind each other along an axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *values: Tensor) -> Tensor:
        return torch.cat(values, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class AsKeras(nn.Module):
    """Flatten, Reshape and Permute, which see images as (N, h, w, c) where channels are last.

    Args:
        images_in, images_out: what comes and goes is images with channels last to Keras.
        shape: of one image's values afterwards, as Keras sees it; None for the one before.
        order: of the axes behind the batch, counted from 1; None to leave them.
    """

    def __init__(
        self,
        images_in: bool,
        images_out: bool,
        shape: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.images_in, self.images_out = images_in, images_out
        self.shape = None if shape is None else tuple(shape)
        self.order = None if order is None else tuple(order)

    def forward(self, x: Tensor) -> Tensor:
        if self.images_in:
            x = x.permute(0, 2, 3, 1)
        if self.order is not None:
            x = x.permute(0, *self.order)
        if self.shape is not None:
            x = x.reshape(x.size(0), *self.shape)
        return x.permute(0, 3, 1, 2) if self.images_out else x

    def extra_repr(self) -> str:
        return f"shape={self.shape}, order={self.order}"


class Affine(nn.Module):
    """``x * scale + offset``, a number for all or one for each channel."""

    scale: Tensor
    offset: Tensor

    def __init__(self, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset


class Crop(nn.Module):
    """Images without some rows and columns: (top, bottom, left, right)."""

    def __init__(self, sides: Sequence[int]) -> None:
        super().__init__()
        self.sides = tuple(sides)

    def forward(self, x: Tensor) -> Tensor:
        top, bottom, left, right = self.sides
        return x[:, :, top : x.size(2) - bottom, left : x.size(3) - right]

    def extra_repr(self) -> str:
        return f"{self.sides}"


class Average(nn.Module):
    """Average pooling with other padding before than behind, whose places do not count."""

    def __init__(self, size: Sequence[int], stride: Sequence[int], sides: Sequence[int]) -> None:
        super().__init__()
        self.size, self.stride, self.sides = list(size), list(stride), list(sides)

    def forward(self, x: Tensor) -> Tensor:
        def sums(t: Tensor) -> Tensor:
            return F.avg_pool2d(F.pad(t, self.sides), self.size, self.stride, divisor_override=1)

        return sums(x) / sums(torch.ones_like(x[:1, :1]))


class Pool(nn.Module):
    """The mean or the maximum of each channel of an image."""

    def __init__(self, largest: bool, keep: bool) -> None:
        super().__init__()
        self.largest, self.keep = largest, keep

    def forward(self, x: Tensor) -> Tensor:
        if self.largest:
            return x.amax((2, 3), keepdim=self.keep)
        return x.mean((2, 3), keepdim=self.keep)

    def extra_repr(self) -> str:
        return f"{'maximum' if self.largest else 'mean'}, keep={self.keep}"


class SharedDropout(nn.Module):
    """Dropout that is one for all along some axes: along all but the batch it drops samples."""

    def __init__(self, rate: float, shared: Iterable[int]) -> None:
        super().__init__()
        self.rate, self.shared = rate, frozenset(shared)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        sizes = [1 if d in self.shared else x.size(d) for d in range(x.dim())]
        return x * F.dropout(x.new_ones(sizes), self.rate)

    def extra_repr(self) -> str:
        return f"{self.rate}, shared={sorted(self.shared)}"


class HardSigmoid(nn.Module):
    """``clamp(slope * x + 1/2, 0, 1)``: Keras 3 has slope 1/6, Keras 2 has 1/5."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return (self.slope * x + 0.5).clamp(0, 1)
