"""The verbs, made of the calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from ...errors import BackendError, first_line
from ...view import View
from ..contract import Activation, Affine, Composite, Moments, Sums, accumulation_dtype
from ..reference import Reference
from . import planning
from .calls import Calls
from .launching import Launcher
from .planning import Plan

__all__ = ["Triton", "plan_of"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)


class Triton(Composite):
    """Fused kernels for every view of four numbers, in float32 arithmetic."""

    name = "triton"

    def __init__(self) -> None:
        try:
            kernels = import_module(".kernels", __package__)
        except ImportError as error:
            raise BackendError(
                f"Triton cannot be imported ({first_line(error)}); pip install evenkeel[gpu]"
            ) from error
        self._interpreted = type(kernels.apply).__name__ == "InterpretedFunction"
        self.calls = Calls(Launcher(kernels, self._interpreted))
        self._plain = Reference()

    def describe(self) -> str:
        """Where the kernels run."""
        return (
            "in Triton's interpreter, on the CPU" if self._interpreted else "compiled for the GPU"
        )

    def refuses(self, view: View, dtype: torch.dtype, device: torch.device) -> str | None:
        reason = self._refuses_device(device)
        if reason is not None:
            return reason
        if dtype not in _DTYPES:
            return f"it has no kernels for {dtype}"
        if not view.is_four:
            return f"the memory has {len(view.sizes)} runs of axes, not four"
        if view.count >= planning.MOST:
            return f"one owner has {view.count} values, 2^30 or more"
        if view.sizes[0] * view.sizes[2] >= planning.MOST:
            return f"there are {view.sizes[0] * view.sizes[2]} owners, 2^30 or more"
        return None

    def _refuses_device(self, device: torch.device) -> str | None:
        if self._interpreted:
            return (
                None if device.type == "cpu" else "TRITON_INTERPRET is set, so it runs on the CPU"
            )
        if device.type != "cuda":
            return f"it runs on CUDA, not on {device.type}, unless TRITON_INTERPRET=1 is set"
        return _unfit(device)

    def stats(self, x: Tensor, view: View) -> Moments:
        if x.numel() == 0:
            return self._plain.stats(x, view)
        p, (mean, m2) = plan_of(view, x.itemsize, keeps=False), _vectors(x, view, 2)
        self.calls.stats(x, p, mean, m2)
        return Moments(view.count, mean, m2)

    def merge(self, parts: Sequence[Moments]) -> Moments:
        return self._plain.merge(parts)

    def apply(
        self, x: Tensor, view: View, affine: Affine, act: Activation, residual: Tensor | None
    ) -> Tensor:
        y = self.like(x)
        mean, invstd, *own = _flat(affine)
        if x.numel():
            p = plan_of(view, x.itemsize, keeps=False)
            self.calls.map(x, p, residual, y, mean, None, invstd, own, 0.0, act)
        return y.to(x.dtype)

    def backward_reduce(
        self,
        dy: Tensor,
        x: Tensor,
        view: View,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
    ) -> Sums:
        if x.numel() == 0:
            return self._plain.backward_reduce(dy, x, view, affine, act, residual)
        p, sums = plan_of(view, x.itemsize, keeps=False), Sums(*_vectors(x, view, 2))
        self.calls.reduce(dy, x, p, _flat(affine), act, residual, sums)
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
        dx, dresidual = self.like(x), self.dresidual(residual, act)
        if x.numel():
            given = None if sums is None else Sums(sums.dz.contiguous(), sums.dz_xhat.contiguous())
            known, p = _flat(affine), plan_of(view, x.itemsize, keeps=False)
            self.calls.dx(dy, x, p, known, act, residual, dx, dresidual, given)
        return dx.to(x.dtype), _passed_on(residual, dresidual, dy)

    def forward_training(
        self,
        x: Tensor,
        view: View,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        act: Activation,
        residual: Tensor | None,
        bits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the contract has it; and a bit for each value into ``bits``, see `Calls.train`.

        Those may be more bytes than are needed.
        """
        if x.numel() == 0:
            return super().forward_training(x, view, weight, bias, eps, act, residual)
        p, y = plan_of(view, x.itemsize), self.like(x)
        mean, var, invstd = _vectors(x, view, 3)
        statistics, own = (mean, var, invstd, None, None), (_whole(weight), _whole(bias))
        self.calls.train(x, p, residual, y, statistics, own, eps, 0.0, act, bits)
        return y.to(x.dtype), mean, var

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        view: View,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
        from_batch: bool,
        bits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Sums]:
        """As the contract has it; or with the ``bits`` of the forward in the residual's place."""
        if x.numel() == 0:
            return super().backward(dy, x, view, affine, act, residual, from_batch)
        added = residual if bits is None else x
        p = plan_of(view, x.itemsize)
        dx, dresidual = self.like(x), self.dresidual(added, act)
        sums = Sums(*_vectors(x, view, 2))
        known = _flat(affine)
        self.calls.backward(dy, x, p, residual, dx, dresidual, known, sums, act, from_batch, bits)
        return dx.to(x.dtype), _passed_on(added, dresidual, dy), sums

    def through(self, x: Tensor, view: View, bits: Tensor) -> Tensor:
        """1 where a bit is set, else 0: what a gradient of ones is behind them."""
        (zero,) = _vectors(x, view, 1)
        zero.zero_()
        given = (torch.ones_like(x), x, view, Affine(zero, zero), Activation("relu"), None)
        through = self.backward(*given, False, bits)[1]
        assert through is not None  # noqa: S101 - there are bits
        return through

    def like(self, t: Tensor) -> Tensor:
        """Memory for a result. The interpreter rounds to bfloat16 towards zero, so torch must."""
        return torch.empty_like(t, dtype=torch.float32 if self._interpreted else None)

    def dresidual(self, residual: Tensor | None, act: Activation) -> Tensor | None:
        """Where the residual's gradient goes, unless it is dy."""
        return None if residual is None or act.name == "none" else self.like(residual)


@cache
def _unfit(device: torch.device) -> str | None:
    """Why a CUDA device does not run the kernels, or None if it does."""
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    found = torch.cuda.get_device_capability(device)
    if found < _OLDEST:
        return f"it needs compute capability 8.0, this device has {found[0]}.{found[1]}"
    return None


def plan_of(view: View, itemsize: int, keeps: bool = True) -> Plan:
    """How the calls are divided; ``keeps`` for `Calls.train` and `Calls.backward`."""
    return planning.plan(view, itemsize, keeps, planning.LIMITS)


def _vectors(x: Tensor, view: View, count: int) -> list[Tensor]:
    """Vectors to be filled."""
    dtype = accumulation_dtype(x.dtype, x.device)
    return [x.new_empty(view.kept_sizes, dtype=dtype) for _ in range(count)]


def _whole(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _flat(affine: Affine) -> Affine:
    mean, invstd, weight, bias = affine
    return Affine(mean.contiguous(), invstd.contiguous(), _whole(weight), _whole(bias))


def _passed_on(residual: Tensor | None, dresidual: Tensor | None, dy: Tensor) -> Tensor | None:
    """The residual's gradient, which without an activation is dy."""
    if residual is None:
        return None
    return (dy if dresidual is None else dresidual).to(residual.dtype)
