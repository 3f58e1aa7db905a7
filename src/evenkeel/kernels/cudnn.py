"""The cuDNN backend: NVIDIA's own kernels, on the view that all backends are given.

A view has four numbers ``(k1, r1, k2, r2)``, and cuDNN is told of a tensor that lies so:

====================  ==============  ===========================================
view                  mode            sizes N, C, H, W
====================  ==============  ===========================================
r2 > 1                SPATIAL         r1, k2, r2, 1 packed as NCHW
r2 = 1, k2 >= r1      PER_ACTIVATION  r1, k2, 1, 1: dense layers, per activation
r2 = 1, k2 < r1       SPATIAL         1, k2, r1, 1 packed as NHWC
====================  ==============  ===========================================

A view with k1 > 1 has no counterpart. With one place the first two modes are the same function, so
the choice between the last two rows is one of speed alone. SPATIAL_PERSISTENT is never chosen here.

What cuDNN's calls lack is done by the reference backend: ``stats``, ``merge``, ``backward_reduce``
and ``backward_dx`` on their own, the backward of inference, and in half precision leaky ReLU and
SiLU, which would be rounded twice. A residual is added by cuDNN, as the prior value of a
destination with beta = 1, so it is rounded once; ReLU and ReLU6 change no rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..view import View
from .contract import Activation, Affine, Sums, accumulation_dtype
from .cudnn_api import calls
from .cudnn_api.descriptors import TYPES, Layout, channels_last, derived_dtype, packed
from .cudnn_api.library import library
from .cudnn_api.values import MAX_SPAN, BatchNormMode
from .reference import Reference, activate, activation_gradient

__all__ = ["MOST_SAMPLES", "Arrangement", "Cudnn", "arrangement"]

MOST_SAMPLES = 65535
"""As many samples as cuDNN 7.6.5 took in inference (pytorch PR 32763); newer ones may take more."""

_NONE = Activation()


class Arrangement(NamedTuple):
    """What cuDNN is told of a view."""

    mode: BatchNormMode
    layout: Layout


def arrangement(view: View) -> Arrangement | str:
    """The mode and layout of a view, or why there is none."""
    if not view.is_four:
        return f"the memory has {len(view.sizes)} runs of axes, not four"
    k1, r1, k2, r2 = view.sizes
    if k1 > 1:
        return f"the view {view.sizes} has k1 > 1, for which cuDNN has no mode"
    if r1 * k2 * r2 > MAX_SPAN:
        return "cuDNN takes no tensor of 2^31 elements or more"
    if r2 == 1 and k2 < r1:
        return Arrangement(BatchNormMode.SPATIAL, channels_last((1, k2, r1, 1)))
    if r1 > MOST_SAMPLES:
        return f"{r1} samples are more than the {MOST_SAMPLES} that cuDNN is known to take"
    if r2 == 1:
        return Arrangement(BatchNormMode.PER_ACTIVATION, packed((r1, k2)))
    return Arrangement(BatchNormMode.SPATIAL, packed((r1, k2, r2)))


class Cudnn(Reference):
    """cuDNN's training forward and backward and its inference forward; the rest is inherited."""

    name = "cudnn"

    def __init__(self) -> None:
        self.library = library()
        self._plain = Reference()

    def describe(self) -> str:
        """Which version, and from where."""
        return f"{self.library} in {self.library.path}"

    def refuses(self, view: View, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it runs on CUDA devices, not on {device.type}"
        if dtype not in TYPES:
            return f"cuDNN has no batch norm for {dtype}"
        found = arrangement(view)
        return found if isinstance(found, str) else None

    def apply(
        self, x: Tensor, view: View, affine: Affine, act: Activation, residual: Tensor | None
    ) -> Tensor:
        if x.numel() == 0 or not _rounds_once(x, act, residual):
            return self._plain.apply(x, view, affine, act, residual)
        call = _call(x, view)
        mean, invstd, weight, bias = affine
        # invstd goes into the scale, so that no variance has to be had of it.
        scale = _parameter(invstd if weight is None else invstd * weight, x)
        one, zero = torch.ones_like(scale), torch.zeros_like(scale)
        y, blend = _destination(x, residual)
        calls.forward_inference(
            *(call, x, y, scale, zero if bias is None else _parameter(bias, x)),
            *(_parameter(mean, x), one),
            epsilon=0.0,
            blend=blend,
        )
        return activate(y, act)

    def forward_training(
        self,
        x: Tensor,
        view: View,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        act: Activation,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = view.count
        if x.numel() == 0 or n == 1 or not _rounds_once(x, act, residual):
            return self._plain.forward_training(x, view, weight, bias, eps, act, residual)
        call = _call(x, view)
        zero = torch.zeros(view.kept_sizes, dtype=derived_dtype(x.dtype), device=x.device)
        scale = torch.ones_like(zero) if weight is None else _parameter(weight, x)
        # With a factor of 1 the running variance is the batch's own, unbiased; 1 / saved^2 - eps
        # would be nothing but rounding where the variance is small beside eps.
        mean, unbiased = torch.zeros_like(zero), torch.zeros_like(zero)
        y, blend = _destination(x, residual)
        calls.forward_training(
            *(call, x, y, scale, zero if bias is None else _parameter(bias, x)),
            epsilon=eps,
            blend=blend,
            factor=1.0,
            running=calls.Pair(mean, unbiased),
        )
        wide = accumulation_dtype(x.dtype, x.device)
        return activate(y, act), mean.to(wide), (unbiased.to(wide) * ((n - 1) / n))

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        view: View,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
        from_batch: bool,
    ) -> tuple[Tensor, Tensor | None, Sums]:
        mixed = dy.dtype != x.dtype
        if not from_batch or mixed or x.numel() == 0 or not _rounds_once(x, act, residual):
            return self._plain.backward(dy, x, view, affine, act, residual, from_batch)
        dz = dy if act.name == "none" else self._before(dy, x, view, affine, act, residual)
        call = _call(x, view)
        mean, invstd, weight, _ = affine
        saved = calls.Pair(_parameter(mean, x), _parameter(invstd, x))
        scale = torch.ones_like(_parameter(invstd, x)) if weight is None else _parameter(weight, x)
        dx, d_scale, d_bias = (torch.empty_like(t) for t in (x, scale, scale))
        # The epsilon is in the saved inverse standard deviation.
        calls.backward(call, x, dz, dx, scale, d_scale, d_bias, epsilon=0.0, saved=saved)
        wide = accumulation_dtype(x.dtype, x.device)
        return dx, None if residual is None else dz, Sums(d_bias.to(wide), d_scale.to(wide))

    def _before(
        self,
        dy: Tensor,
        x: Tensor,
        view: View,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
    ) -> Tensor:
        """The gradient before the activation, whose sign is seen before anything is rounded."""
        wide = x.to(accumulation_dtype(x.dtype, x.device))
        z = self._plain.apply(wide, view, affine, _NONE, residual)
        return torch.empty_like(x).copy_(activation_gradient(dy, z, act))


def _call(x: Tensor, view: View) -> calls.Call:
    found = arrangement(view)
    assert not isinstance(found, str)  # noqa: S101 - refused before
    return calls.Call(found.mode, x, found.layout)


def _parameter(vector: Tensor, x: Tensor) -> Tensor:
    """A vector as cuDNN takes it: without gaps, in float32, or float64 for float64."""
    return vector.to(derived_dtype(x.dtype)).contiguous()


def _destination(x: Tensor, residual: Tensor | None) -> tuple[Tensor, calls.Blend]:
    """Where y goes, and how: over a copy of the residual it is added to it."""
    if residual is None:
        return torch.empty_like(x), calls.OVER
    return residual.clone(), calls.Blend(1.0, 1.0)


def _rounds_once(x: Tensor, act: Activation, residual: Tensor | None) -> bool:
    """True if nothing is lost by an activation that works on what cuDNN has rounded.

    ReLU and ReLU6 give what they are given or a bound that every dtype has. In float32 and wider
    one rounding more is within the tolerance.
    """
    if residual is not None and residual.dtype != x.dtype:
        return False
    return x.element_size() >= 4 or act.name in ("none", "relu", "relu6")
