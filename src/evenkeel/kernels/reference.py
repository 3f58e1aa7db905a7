"""The reference backend: the formulas in plain torch, for any view, dtype and device.

Everything is computed in the accumulation dtype, so that on the CPU a float32 result is the float64
one, rounded once. Nothing is written in place: torch can differentiate through ``stats`` and
``apply``, which is how second derivatives are had (see `evenkeel.ops`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..view import View
from .contract import Activation, Affine, Composite, Moments, Sums, accumulation_dtype

__all__ = ["Reference", "activate", "activation_gradient"]


class Reference(Composite):
    """The oracle that every backend is compared with."""

    name = "reference"

    def refuses(self, view: View, dtype: torch.dtype, device: torch.device) -> str | None:
        return None

    def stats(self, x: Tensor, view: View) -> Moments:
        wide = _wide(x, view)
        mean = wide.mean(view.reduced_dims)
        m2 = (wide - _spread(mean, view)).square().sum(view.reduced_dims)
        return Moments(view.count, mean, m2)

    def merge(self, parts: Sequence[Moments]) -> Moments:
        return reduce(_chan, parts)

    def apply(
        self, x: Tensor, view: View, affine: Affine, act: Activation, residual: Tensor | None
    ) -> Tensor:
        z = _before_activation(_xhat(x, view, affine), view, affine, residual)
        return view.unfold(activate(z, act).to(x.dtype), x)

    def backward_reduce(
        self,
        dy: Tensor,
        x: Tensor,
        view: View,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
    ) -> Sums:
        xhat = _xhat(x, view, affine)
        dz = _dz(dy, xhat, view, affine, act, residual)
        return Sums(dz.sum(view.reduced_dims), (dz * xhat).sum(view.reduced_dims))

    def backward_dx(
        self,
        dy: Tensor,
        x: Tensor,
        view: View,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
        sums: Sums | None,
    ) -> tuple[Tensor, Tensor | None]:
        xhat = _xhat(x, view, affine)
        dz = _dz(dy, xhat, view, affine, act, residual)
        scale = affine.invstd if affine.weight is None else affine.invstd * affine.weight
        centred = dz
        if sums is not None:
            mean_dz = _spread(sums.dz / view.count, view)
            mean_dz_xhat = _spread(sums.dz_xhat / view.count, view)
            centred = dz - mean_dz - xhat * mean_dz_xhat
        dx = view.unfold((centred * _spread(scale, view)).to(x.dtype), x)
        return dx, None if residual is None else view.unfold(dz.to(residual.dtype), x)


def activate(z: Tensor, act: Activation) -> Tensor:
    """The activation of z."""
    match act.name:
        case "none":
            return z
        case "relu":
            return z.relu()
        case "leaky_relu":
            return torch.nn.functional.leaky_relu(z, act.slope)
        case "relu6":
            return torch.nn.functional.relu6(z)
        case "silu":
            return torch.nn.functional.silu(z)
    raise AssertionError(act)


def activation_gradient(dy: Tensor, z: Tensor, act: Activation) -> Tensor:
    """The gradient before the activation, with torch's choices at kinks and NaN."""
    zero = torch.zeros((), dtype=dy.dtype, device=dy.device)
    match act.name:
        case "none":
            return dy
        case "relu":
            return torch.where(z <= 0, zero, dy)
        case "leaky_relu":
            return torch.where(z > 0, dy, dy * act.slope)
        case "relu6":
            return torch.where((z <= 0) | (z >= 6), zero, dy)
        case "silu":
            s = z.sigmoid()
            return dy * s * (1 + z * (1 - s))
    raise AssertionError(act)


def _wide(x: Tensor, view: View) -> Tensor:
    return view.fold(x).to(accumulation_dtype(x.dtype, x.device))


def _spread(vector: Tensor, view: View) -> Tensor:
    """A per-owner vector with a dimension of size 1 for each reduced run."""
    shape = [s if place % 2 == 0 else 1 for place, s in enumerate(view.sizes)]
    return vector.reshape(shape)


def _xhat(x: Tensor, view: View, affine: Affine) -> Tensor:
    return (_wide(x, view) - _spread(affine.mean, view)) * _spread(affine.invstd, view)


def _before_activation(xhat: Tensor, view: View, affine: Affine, residual: Tensor | None) -> Tensor:
    z = xhat
    if affine.weight is not None:
        z = z * _spread(affine.weight, view)
    if affine.bias is not None:
        z = z + _spread(affine.bias, view)
    if residual is not None:
        z = z + _wide(residual, view)
    return z


def _dz(
    dy: Tensor, xhat: Tensor, view: View, affine: Affine, act: Activation, residual: Tensor | None
) -> Tensor:
    wide = _wide(dy, view)
    if act.name == "none":
        return wide
    return activation_gradient(wide, _before_activation(xhat, view, affine, residual), act)


def _chan(a: Moments, b: Moments) -> Moments:
    if b.n == 0 or a.n == 0:
        return a if b.n == 0 else b
    n = a.n + b.n
    delta = b.mean - a.mean
    share = b.n / n
    return Moments(n, a.mean + delta * share, a.m2 + b.m2 + delta.square() * (a.n * share))
