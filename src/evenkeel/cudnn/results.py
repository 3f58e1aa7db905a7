"""What the calls return. ``ran_on`` names what computed it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BackwardExResult",
    "BackwardResult",
    "ForwardExResult",
    "ForwardResult",
    "InferenceResult",
    "Size",
    "TensorDescriptor",
]


class TensorDescriptor(NamedTuple):
    """Sizes in the order N, C, places; strides in elements; dtype."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class ForwardResult(NamedTuple):
    """``saved_inv_variance`` is ``1 / sqrt(biased variance + epsilon)``; both None if not saved."""

    y: Tensor
    saved_mean: Tensor | None
    saved_inv_variance: Tensor | None
    ran_on: str


class InferenceResult(NamedTuple):
    """y, like x."""

    y: Tensor
    ran_on: str


class BackwardResult(NamedTuple):
    """Gradients. Nobody has applied them: that is for an optimizer."""

    dx: Tensor
    d_scale: Tensor
    d_bias: Tensor
    ran_on: str


class ForwardExResult(NamedTuple):
    """As `ForwardResult`; ``reserve`` goes to the backward call, unchanged."""

    y: Tensor
    saved_mean: Tensor | None
    saved_inv_variance: Tensor | None
    reserve: Tensor
    ran_on: str


class BackwardExResult(NamedTuple):
    """As `BackwardResult`; ``dz`` is the gradient of z, None where there is no z."""

    dx: Tensor
    dz: Tensor | None
    d_scale: Tensor
    d_bias: Tensor
    ran_on: str


class Size(NamedTuple):
    """A number of bytes."""

    bytes: int
    ran_on: str
