"""A scale and a shift for every value of a tensor, those of one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...nn import Norm

__all__ = ["Map", "map_of_norm", "per_channel", "squeezed"]

Given = Sequence[Tensor | None]
"""Running mean and variance, gamma and beta."""


@dataclass(frozen=True, eq=False)
class Map:
    """``x -> scale * x + shift``, in float64.

    Both tensors have x's rank; an axis has size 1 where all along it is equal, the batch axis
    always.
    """

    scale: Tensor
    shift: Tensor

    @property
    def is_identity(self) -> bool:
        """True if it changes nothing."""
        return bool((self.scale == 1).all()) and not self.shifts

    @property
    def shifts(self) -> bool:
        """True if it has a shift anywhere."""
        return bool((self.shift != 0).any())

    def after(self, first: Map) -> Map:
        """The map that does ``first`` and then this one."""
        return Map(
            squeezed(self.scale * first.scale), squeezed(self.scale * first.shift + self.shift)
        )

    def axes(self) -> set[int]:
        """The axes along which it varies."""
        shapes = (self.scale.shape, self.shift.shape)
        return {axis for shape in shapes for axis, size in enumerate(shape) if size > 1}

    def vectors(self, axis: int, size: int) -> tuple[Tensor, Tensor]:
        """Scale and shift along the one axis along which they vary."""
        shape = [1] * self.scale.dim()
        shape[axis] = size
        scale, shift = (t.expand(shape).reshape(size) for t in (self.scale, self.shift))
        return scale, shift


def squeezed(t: Tensor) -> Tensor:
    """The tensor with size 1 on each axis along which all is equal."""
    for axis, size in enumerate(t.shape):
        if size > 1 and bool((t == t.narrow(axis, 0, 1)).all()):
            t = t.narrow(axis, 0, 1)
    return t


def map_of_norm(norm: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The inference map of a batch norm on an input of that shape: center, scale and shift::

        y = (x - center) * scale + shift        scale = weight / sqrt(running_var + eps)

    All three have the input's rank, size 1 where they do not vary, in float64.
    """
    given = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if not isinstance(norm, Norm):
        return per_channel(given, norm.eps, len(shape))
    bound = norm.spec.bind(shape, norm.sizes)
    owners = [size if axis in bound.kept else 1 for axis, size in enumerate(bound.shape)]
    gammas = [size if axis in bound.affine else 1 for axis, size in enumerate(bound.shape)]
    whole = [1, *bound.shape[1:]]
    parts = _affine(given, norm.eps, owners, gammas)
    center, scale, shift = (squeezed(t.expand(whole).reshape(1, *shape[1:])) for t in parts)
    return center, scale, shift


def per_channel(given: Given, eps: float, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Center, scale and shift where all four have one value for each channel of the second axis."""
    channels = [1, -1] + [1] * (rank - 2)
    return _affine(given, eps, channels, channels)


def _affine(
    given: Given, eps: float, owners: list[int], gammas: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var, weight, bias = (None if t is None else t.detach().cpu().double() for t in given)
    if mean is None or var is None:
        raise ValueError("a norm without running statistics is no map")
    center = mean.reshape(owners)
    scale = (var + eps).rsqrt().reshape(owners)
    if weight is not None:
        scale = scale * weight.reshape(gammas)
    shift = torch.zeros_like(center) if bias is None else bias.reshape(gammas)
    return center, scale, shift
