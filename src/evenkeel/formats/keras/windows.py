"""What reads images through a window: convolutions and poolings, and how they pad."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from . import modules as own
from .places import Place, Shape, activation_of, pair

__all__ = ["WINDOWS", "Built", "behind", "bias_of", "chain", "set_numbers"]

Built = tuple[nn.Module, Shape]


def chain(**parts: nn.Module) -> nn.Module:
    """The parts behind each other, without those that do nothing."""
    kept = {k: m for k, m in parts.items() if not isinstance(m, nn.Identity)}
    if not kept:
        return nn.Identity()
    return next(iter(kept.values())) if len(kept) == 1 else nn.Sequential(OrderedDict(kept))


@torch.no_grad()
def set_numbers(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Gives a layer its weight and, if it has one, its bias."""
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)


def behind(place: Place, module: nn.Module, shape: Shape) -> Built:
    """A layer with the activation that its config names."""
    after = replace(place, given=[shape], arrays=[])
    activation = activation_of(after, place.config.get("activation"))
    return chain(layer=module, activation=activation), shape


def bias_of(place: Place, count: int) -> Tensor | None:
    """The bias, if the layer has one."""
    return place.take("bias", count) if place.flag("use_bias", True) else None


class _Window:
    """A kernel or pooling window over images: how it pads, and what sizes come out."""

    def __init__(self, place: Place, size: tuple[int, int], stride: tuple[int, int]) -> None:
        dilation = pair(place, "dilation_rate")
        spans = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
        self.size, self.stride, self.dilation = size, stride, dilation
        self.sides = [0, 0, 0, 0]
        """Of the padding: left, right, top, bottom, as torch has it."""
        padding = place.config.get("padding", "valid")
        if padding not in ("same", "valid"):
            raise place.error(f"padding='{padding}' is not supported")
        _, *lengths = place.image
        out = []
        for at, (length, span, step) in enumerate(zip(lengths, spans, stride, strict=True)):
            total = 0
            if padding == "same":
                total = max((-(-length // step) - 1) * step + span - length, 0)
            self.sides[2 * (1 - at)], self.sides[2 * (1 - at) + 1] = total // 2, total - total // 2
            out.append((length + total - span) // step + 1)
        self.out: tuple[int, int] = (out[0], out[1])

    @property
    def padding(self) -> tuple[int, int] | None:
        """Before and behind alike, for height and width; None where they differ."""
        left, right, top, bottom = self.sides
        return (top, left) if left == right and top == bottom else None


def _convolution(
    place: Place, weight: Tensor, bias: Tensor | None, groups: int, window: _Window
) -> nn.Module:
    conv = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], window.size, window.stride,
        window.padding or 0, window.dilation, groups, bias=bias is not None,
    )  # fmt: skip
    set_numbers(conv, weight, bias)
    pad = nn.Identity() if window.padding is not None else nn.ZeroPad2d(tuple(window.sides))  # type: ignore[arg-type]
    return chain(pad=pad, conv=conv)


def _conv(place: Place) -> Built:
    channels, *_ = place.image
    filters, groups = int(place.config["filters"]), int(place.config.get("groups", 1))
    window = _Window(place, pair(place, "kernel_size"), pair(place, "strides"))
    if channels % groups or filters % groups:
        raise place.error(f"groups={groups} do not divide {channels} and {filters} channels")
    kernel = place.take("kernel", *window.size, channels // groups, filters)
    conv = _convolution(place, kernel.permute(3, 2, 0, 1), bias_of(place, filters), groups, window)
    return behind(place, conv, place.images(filters, *window.out))


def _depthwise(place: Place) -> Built:
    channels, *_ = place.image
    times = int(place.config.get("depth_multiplier", 1))
    window = _Window(place, pair(place, "kernel_size"), pair(place, "strides"))
    kernel = place.take("kernel", *window.size, channels, times)
    weight = kernel.permute(2, 3, 0, 1).reshape(channels * times, 1, *window.size)
    conv = _convolution(place, weight, bias_of(place, channels * times), channels, window)
    return behind(place, conv, place.images(channels * times, *window.out))


def _separable(place: Place) -> Built:
    channels, *_ = place.image
    times, filters = int(place.config.get("depth_multiplier", 1)), int(place.config["filters"])
    window = _Window(place, pair(place, "kernel_size"), pair(place, "strides"))
    kernel = place.take("depthwise kernel", *window.size, channels, times)
    point = place.take("pointwise kernel", 1, 1, channels * times, filters)
    weight = kernel.permute(2, 3, 0, 1).reshape(channels * times, 1, *window.size)
    bias = bias_of(place, filters)
    last = nn.Conv2d(channels * times, filters, 1, bias=bias is not None)
    set_numbers(last, point.permute(3, 2, 0, 1), bias)
    depthwise = _convolution(place, weight, None, channels, window)
    both = nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=last))
    return behind(place, both, place.images(filters, *window.out))


def _transposed(place: Place) -> Built:
    channels, *lengths = place.image
    filters, size, stride = (
        int(place.config["filters"]),
        pair(place, "kernel_size"),
        pair(place, "strides"),
    )
    if place.config.get("output_padding") or pair(place, "dilation_rate") != (1, 1):
        raise place.error("output_padding and dilation are not supported")
    kernel = place.take("kernel", *size, filters, channels)
    bias = bias_of(place, filters)
    conv = nn.ConvTranspose2d(channels, filters, size, stride, bias=bias is not None)
    set_numbers(conv, kernel.permute(3, 2, 0, 1), bias)
    out, sides = [], []
    for length, k, s in zip(lengths, size, stride, strict=True):
        if k < s:
            raise place.error("a stride larger than the kernel is not supported")
        spare = k - s if place.config.get("padding", "valid") == "same" else 0
        sides += [spare // 2, spare - spare // 2]
        out.append(length * s + k - s - spare)
    crop = own.Crop(sides) if any(sides) else nn.Identity()
    return behind(place, chain(conv=conv, crop=crop), place.images(filters, out[0], out[1]))


def _pooling(place: Place) -> Built:
    channels, *_ = place.image
    size = pair(place, "pool_size", 2)
    window = _Window(place, size, pair(place, "strides", list(size)))
    shape = place.images(channels, *window.out)
    if place.kind == "AveragePooling2D":
        if window.padding is None:
            return own.Average(size, window.stride, window.sides), shape
        return nn.AvgPool2d(size, window.stride, window.padding, count_include_pad=False), shape
    fits = window.padding is not None and all(
        2 * p <= k for p, k in zip(window.padding, size, strict=True)
    )
    if fits:
        return nn.MaxPool2d(size, window.stride, window.padding or 0), shape
    pad = nn.ConstantPad2d(tuple(window.sides), float("-inf"))  # type: ignore[arg-type]
    return nn.Sequential(pad, nn.MaxPool2d(size, window.stride)), shape


WINDOWS: Final[dict[str, Callable[[Place], Built]]] = {
    "AveragePooling2D": _pooling, "Conv2D": _conv, "Conv2DTranspose": _transposed,
    "DepthwiseConv2D": _depthwise, "MaxPooling2D": _pooling, "SeparableConv2D": _separable,
}  # fmt: skip
