"""The native backend: C++ on the CPU, built with the package (see ``native/``).

Its loops compute in float32 (float64 for float64 tensors) on the exact difference x - mean, and add
up in float64. A channel of NCHW, or a slab of channels of NHWC, stays in cache between statistics
and normalizing. Threads are torch's, as many as ``torch.get_num_threads()`` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import BackendError
from ..view import View
from .contract import Activation, Affine, Composite, Moments, Sums
from .reference import Reference

__all__ = ["Native"]

_TYPES: Final = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ACTS: Final = {"none": 0, "relu": 1, "leaky_relu": 2, "relu6": 3, "silu": 4}
_REDUCE, _MAP, _BOTH = 1, 2, 3
_FEW: Final = 8
"""Of fewer values than this nearly all of dx cancels, so it is computed in float64."""


def _module() -> Any:
    try:
        from .. import _native
    except ImportError as error:
        raise BackendError(
            f"the native kernels are not built ({error}); install evenkeel where a C++ compiler is "
            "on the path"
        ) from error
    return _native


class Native(Composite):
    """Fused kernels for every view of four numbers."""

    name = "native"

    def __init__(self) -> None:
        self._c = _module()
        self._plain = Reference()

    def describe(self) -> str:
        """Which instructions and which threads."""
        return f"{self._c.instructions()} instructions, threads of {self._c.pool()}"

    def refuses(self, view: View, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        if dtype not in _TYPES:
            return f"it has no kernels for {dtype}"
        if not view.is_four:
            return f"the memory has {len(view.sizes)} runs of axes, not four"
        return None

    def stats(self, x: Tensor, view: View) -> Moments:
        mean, m2, invstd = torch.zeros(3, *view.kept_sizes, dtype=torch.float64)
        if x.numel():
            self._forward(x, view, Activation(), _REDUCE, None, None, None, None, mean, m2, invstd)
        elif view.count == 0:
            mean.fill_(torch.nan)
        return Moments(view.count, mean, m2)

    def merge(self, parts: Sequence[Moments]) -> Moments:
        return self._plain.merge(parts)

    def apply(
        self, x: Tensor, view: View, affine: Affine, act: Activation, residual: Tensor | None
    ) -> Tensor:
        if residual is not None and residual.dtype != x.dtype:
            return self._plain.apply(x, view, affine, act, residual)
        y = torch.empty_like(x)
        mean, invstd, weight, bias = _ready(affine)
        self._forward(x, view, act, _MAP, residual, y, weight, bias, mean, None, invstd)
        return y

    def backward_reduce(
        self,
        dy: Tensor,
        x: Tensor,
        view: View,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
    ) -> Sums:
        if _mixed(x, dy, residual):
            return self._plain.backward_reduce(dy, x, view, affine, act, residual)
        sums = _zeros(view)
        self._backward(dy, x, view, affine, act, residual, _REDUCE, True, None, None, *sums)
        return sums

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
        if _mixed(x, dy, residual):
            return self._plain.backward_dx(dy, x, view, affine, act, residual, sums)
        dx = torch.empty_like(x)
        dresidual = _dresidual(residual, dy, act)
        given = sums or Sums(affine.mean, affine.mean)  # not read where there are none
        self._backward(
            *(dy, x, view, affine, act, residual, _MAP, sums is not None, dx, dresidual),
            *(vector.contiguous() for vector in given),
        )
        return dx, dresidual

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
        if x.numel() == 0 or (residual is not None and residual.dtype != x.dtype):
            return super().forward_training(x, view, weight, bias, eps, act, residual)
        y = torch.empty_like(x)
        mean, m2, invstd = torch.empty(3, *view.kept_sizes, dtype=torch.float64)
        self._forward(
            *(x, view, act, _BOTH, residual, y, _flat(weight), _flat(bias), mean, m2, invstd), eps
        )
        return y, mean, m2 / view.count

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
        if _mixed(x, dy, residual) or view.count < _FEW:
            return self._plain.backward(dy, x, view, affine, act, residual, from_batch)
        dx = torch.empty_like(x)
        dresidual = _dresidual(residual, dy, act)
        sums = _zeros(view)
        self._backward(dy, x, view, affine, act, residual, _BOTH, from_batch, dx, dresidual, *sums)
        return dx, dresidual, sums

    def _forward(
        self,
        x: Tensor,
        view: View,
        act: Activation,
        phases: int,
        residual: Tensor | None,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        m2: Tensor | None,
        invstd: Tensor,
        eps: float = 0.0,
    ) -> None:
        self._c.forward(
            *view.sizes,
            *(_TYPES[x.dtype], _ACTS[act.name], act.slope, eps, phases, torch.get_num_threads()),
            *map(_address, (x, residual, y, weight, bias, mean, m2, invstd)),
        )

    def _backward(
        self,
        dy: Tensor,
        x: Tensor,
        view: View,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
        phases: int,
        from_batch: bool,
        dx: Tensor | None,
        dresidual: Tensor | None,
        sum_dz: Tensor,
        sum_dz_xhat: Tensor,
    ) -> None:
        mean, invstd, weight, bias = _ready(affine)
        if act.name == "none":
            residual = dresidual = None  # its gradient is dy, and its value changes nothing
        tensors = (dy, x, residual, dx, dresidual, weight, bias, mean, invstd, sum_dz, sum_dz_xhat)
        self._c.backward(
            *view.sizes,
            *(_TYPES[x.dtype], _ACTS[act.name], act.slope, from_batch),
            *(phases, torch.get_num_threads()),
            *map(_address, tensors),
        )


def _zeros(view: View) -> Sums:
    """Two tensors, for the outputs of an op must not share memory."""
    return Sums(*(torch.zeros(view.kept_sizes, dtype=torch.float64) for _ in range(2)))


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _flat(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _ready(affine: Affine) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    mean, invstd, weight, bias = affine
    return mean.contiguous(), invstd.contiguous(), _flat(weight), _flat(bias)


def _dresidual(residual: Tensor | None, dy: Tensor, act: Activation) -> Tensor | None:
    """Where the residual's gradient goes, or dy where it is that."""
    if residual is None or act.name == "none":
        return None if residual is None else dy
    return torch.empty_like(dy)


def _mixed(x: Tensor, dy: Tensor, residual: Tensor | None) -> bool:
    return dy.dtype != x.dtype or (residual is not None and residual.dtype != x.dtype)
