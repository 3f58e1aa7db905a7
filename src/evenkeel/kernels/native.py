"""The native backend: C++ on the CPU, built with the package (see ``native/``).

Its loops compute in float32 (float64 for float64 tensors) on the exact difference x - mean, and add
up in float64. A channel of NCHW stays in cache between statistics and normalizing. Threads are
torch's, as many as ``torch.get_num_threads()`` says.
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

__all__ = ["ACTS", "BOTH", "FEW", "MAP", "REDUCE", "TYPES", "Native"]

TYPES: Final = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACTS: Final = {"none": 0, "relu": 1, "leaky_relu": 2, "relu6": 3, "silu": 4}
REDUCE, MAP, BOTH = 1, 2, 3
FEW: Final = 8
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
        self.module = _module()
        self._plain = Reference()

    def describe(self) -> str:
        """Which instructions and which threads."""
        return f"{self.module.instructions()} instructions, threads of {self.module.pool()}"

    def refuses(self, view: View, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        if dtype not in TYPES:
            return f"it has no kernels for {dtype}"
        if not view.is_four:
            return f"the memory has {len(view.sizes)} runs of axes, not four"
        return None

    def stats(self, x: Tensor, view: View) -> Moments:
        memory = torch.zeros(3, *view.kept_sizes, dtype=torch.float64, device="cpu")
        if x.numel():
            self._forward(x, view, Activation(), REDUCE, None, None, None, None, memory)
        elif view.count == 0:
            memory[0] = torch.nan
        return Moments(view.count, memory[0], memory[2] * view.count)

    def merge(self, parts: Sequence[Moments]) -> Moments:
        return self._plain.merge(parts)

    def apply(
        self, x: Tensor, view: View, affine: Affine, act: Activation, residual: Tensor | None
    ) -> Tensor:
        if residual is not None and residual.dtype != x.dtype:
            return self._plain.apply(x, view, affine, act, residual)
        y = torch.empty_like(x)
        mean, invstd, weight, bias = affine
        memory = torch.stack((mean, invstd, invstd))
        self._forward(x, view, act, MAP, residual, y, _flat(weight), _flat(bias), memory)
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
        sums = torch.zeros(2, *view.kept_sizes, dtype=torch.float64, device="cpu")
        self._backward(dy, x, view, affine, act, residual, REDUCE, True, None, None, sums)
        return Sums(*sums)

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
        given = None if sums is None else torch.stack(sums)
        self._backward(
            *(dy, x, view, affine, act, residual, MAP, sums is not None, dx, dresidual, given)
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
        memory = torch.empty(3, *view.kept_sizes, dtype=torch.float64, device="cpu")
        self._forward(x, view, act, BOTH, residual, y, _flat(weight), _flat(bias), memory, eps)
        return y, memory[0].clone(), memory[2].clone()  # outputs must not share memory

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
        if _mixed(x, dy, residual) or view.count < FEW:
            return self._plain.backward(dy, x, view, affine, act, residual, from_batch)
        dx = torch.empty_like(x)
        dresidual = _dresidual(residual, dy, act)
        sums = torch.zeros(2, *view.kept_sizes, dtype=torch.float64, device="cpu")
        self._backward(dy, x, view, affine, act, residual, BOTH, from_batch, dx, dresidual, sums)
        return dx, dresidual, Sums(*(s.clone() for s in sums))  # outputs must not share memory

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
        memory: Tensor,
        eps: float = 0.0,
    ) -> None:
        self.module.forward(
            *view.sizes,
            *(TYPES[x.dtype], ACTS[act.name], act.slope, phases, torch.get_num_threads(), eps),
            *(x.data_ptr(), _address(residual), _address(y), 0),
            *(_address(weight), _address(bias), False, memory.data_ptr(), 0, 0, False, 0.0),
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
        sums: Tensor | None,
    ) -> None:
        mean, invstd, weight, bias = (_flat(vector) for vector in affine)
        if act.name == "none":
            residual = dresidual = None  # its gradient is dy, and its value changes nothing
        self.module.backward(
            *view.sizes,
            *(TYPES[x.dtype], ACTS[act.name], act.slope, phases, torch.get_num_threads()),
            *(from_batch, dy.data_ptr(), x.data_ptr(), _address(residual), 0),
            *(_address(dx), _address(dresidual), _address(weight), _address(bias), False),
            *(_address(mean), _address(invstd), _address(sums), 0, 0),
        )


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _flat(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _dresidual(residual: Tensor | None, dy: Tensor, act: Activation) -> Tensor | None:
    """Where the residual's gradient goes, or dy where it is that."""
    if residual is None or act.name == "none":
        return None if residual is None else dy
    return torch.empty_like(dy)


def _mixed(x: Tensor, dy: Tensor, residual: Tensor | None) -> bool:
    return dy.dtype != x.dtype or (residual is not None and residual.dtype != x.dtype)
