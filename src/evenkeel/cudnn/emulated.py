"""The calls on the reference arithmetic: cuDNN's rules, on any device.

Everything is computed in the reference's precision (float64 on the CPU) and rounded when it is
written. All results are there before the first is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.contract import Activation, Affine, accumulation_dtype
from ..kernels.cudnn_api.calls import OVER, Blend
from ..kernels.cudnn_api.values import BatchNormMode
from ..kernels.reference import Reference, activation_gradient
from ..view import view_of
from .arguments import Backward, Forward
from .checks import Data

__all__ = ["Emulated", "Statistics", "backward", "forward", "inference"]

_REFERENCE = Reference()
_NONE = Activation()


class Statistics(NamedTuple):
    """Of the batch, in the order of the parameters."""

    mean: Tensor
    variance: Tensor
    unbiased: Tensor


class Emulated:
    """x and its view."""

    def __init__(self, data: Data) -> None:
        x = data.x
        last = 1 if data.mode != BatchNormMode.PER_ACTIVATION else x.dim() - 1
        view = view_of(x.shape, x.stride(), range(1, last + 1))
        assert view is not None  # noqa: S101 - it was examined
        self.view = view
        self.wide = x.to(accumulation_dtype(x.dtype, x.device))

    def vector(self, t: Tensor) -> Tensor:
        """A parameter in memory order and wide."""
        return self.view.fold_vector(t.reshape(-1).to(self.wide.dtype), self.wide.shape)

    def flat(self, vector: Tensor) -> Tensor:
        """The inverse of `vector`, with one dimension."""
        return self.view.unfold_vector(vector, self.wide.shape).reshape(-1)

    def statistics(self) -> Statistics:
        """The mean, the biased variance, and the unbiased one."""
        n, mean, m2 = _REFERENCE.stats(self.wide, self.view)
        return Statistics(self.flat(mean), self.flat(m2 / n), self.flat(m2 / (n - 1)))

    def normalized(
        self,
        mean: Tensor,
        inverse: Tensor,
        scale: Tensor,
        bias: Tensor,
        z: Tensor | None = None,
        act: Activation = _NONE,
    ) -> Tensor:
        """``act((x - mean) * inverse * scale + bias + z)``, wide."""
        affine = Affine(*(self.vector(t) for t in (mean, inverse, scale, bias)))
        return _REFERENCE.apply(self.wide, self.view, affine, act, z)

    def gradients(
        self, dy: Tensor, mean: Tensor, inverse: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx, d_scale and d_bias of a training call, wide."""
        affine = Affine(*(self.vector(t) for t in (mean, inverse, scale)))
        dy = dy.to(self.wide.dtype)
        dx, _, sums = _REFERENCE.backward(dy, self.wide, self.view, affine, _NONE, None, True)
        return dx, self.flat(sums.dz_xhat), self.flat(sums.dz)


def forward(given: Forward, *, is_activated: bool) -> None:
    """A training forward: y, the running statistics, the saved ones."""
    problem = Emulated(given.data)
    mean, variance, unbiased = problem.statistics()
    inverse = _inverse(variance, given.epsilon)
    act = Activation("relu") if is_activated else _NONE
    y = problem.normalized(mean, inverse, given.scale, given.bias, given.z, act)
    _write(given.y, y, given.blend)
    for running, new in zip(given.running, (mean, unbiased), strict=True):
        if running is not None:
            _remember(running, new, given.factor)
    for saved, new in zip(given.saved, (mean, inverse), strict=True):
        if saved is not None:
            _write(saved, new, OVER)


def inference(
    data: Data, y: Tensor, vectors: Mapping[str, Tensor], epsilon: float, blend: Blend
) -> None:
    """An inference forward."""
    problem = Emulated(data)
    wide = {name: vector.to(problem.wide.dtype) for name, vector in vectors.items()}
    inverse = _inverse(wide["estimated_variance"], epsilon)
    result = problem.normalized(wide["estimated_mean"], inverse, wide["scale"], wide["bias"])
    _write(y, result, blend)


def backward(given: Backward) -> None:
    """A training backward: dx, dz, d_scale, d_bias."""
    problem = Emulated(given.data)
    mean, inverse = given.saved
    if mean is None or inverse is None:
        mean, variance, _ = problem.statistics()
        inverse = _inverse(variance, given.epsilon)
    dz = given.dy
    if given.y is not None:
        dz = activation_gradient(dz, given.y, Activation("relu"))
    dx, d_scale, d_bias = problem.gradients(dz, mean, inverse, given.scale)
    _write(given.dx, dx, given.in_data)
    _write(given.d_scale, d_scale, given.in_parameters)
    _write(given.d_bias, d_bias, given.in_parameters)
    if given.dz is not None:
        given.dz.copy_(dz)


def _write(destination: Tensor, result: Tensor, blend: Blend) -> None:
    """``destination = alpha * result + beta * destination``; with beta 0 it is not read."""
    new = result.reshape(destination.shape) * blend.alpha
    if blend.beta != 0:
        new = new + destination.to(new.dtype) * blend.beta
    destination.copy_(new)


def _remember(running: Tensor, new: Tensor, factor: float) -> None:
    """``running = running * (1 - factor) + new * factor``."""
    _write(running, new, Blend(factor, 1 - factor))


def _inverse(variance: Tensor, epsilon: float) -> Tensor:
    """``1 / sqrt(variance + epsilon)``."""
    return torch.rsqrt(variance + epsilon)
