"""The verbs, as launches of kernels. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError, first_line
from ...view import View
from ..contract import Activation, Affine, Composite, Moments, Sums, accumulation_dtype
from ..reference import Reference
from . import planning
from .planning import Plan

__all__ = ["Triton"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)


class Triton(Composite):
    """Fused kernels for every view of four numbers, in float32 arithmetic."""

    name = "triton"

    def __init__(self) -> None:
        try:
            self._kernels: Any = import_module(".kernels", __package__)
        except ImportError as error:
            raise BackendError(
                f"Triton cannot be imported ({first_line(error)}); pip install evenkeel[gpu]"
            ) from error
        self._interpreted = type(self._kernels.apply).__name__ == "InterpretedFunction"
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
        p, mean, m2 = _walk(x, view), *_vectors(x, view, 2)
        with _on(x):
            self._merge_moments(x, p, self._moments(x, p), mean, m2)
        return Moments(view.count, mean, m2)

    def merge(self, parts: Sequence[Moments]) -> Moments:
        return self._plain.merge(parts)

    def apply(
        self, x: Tensor, view: View, affine: Affine, act: Activation, residual: Tensor | None
    ) -> Tensor:
        y = self._like(x)
        if x.numel():
            with _on(x):
                self._apply(x, _walk(x, view), act, residual, y, *_flat(affine))
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
        p, sums = _walk(x, view), Sums(*_vectors(x, view, 2))
        with _on(x):
            parts = self._reduce(dy, x, p, _flat(affine), act, residual)
            self._merge_sums(p, parts, sums)
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
        dx, dresidual = self._like(x), self._dresidual(residual, act)
        if x.numel():
            given = None if sums is None else Sums(sums.dz.contiguous(), sums.dz_xhat.contiguous())
            with _on(x):
                p = _walk(x, view)
                self._dx(dy, x, p, _flat(affine), act, residual, dx, dresidual, given)
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        if x.numel() == 0:
            return super().forward_training(x, view, weight, bias, eps, act, residual)
        p, y = planning.plan(view, x.itemsize, True, planning.LIMITS), self._like(x)
        mean, var = _vectors(x, view, 2)
        weight, bias = _whole(weight), _whole(bias)
        with _on(x):
            if p.resident:
                kernel = self._kernels.forward_resident
                tensors = (x, residual, y, mean, weight, bias, var, eps, act.slope)
                self._launch(kernel, p, 1, *tensors, *p.sizes, ACT=act.name)
                return y.to(x.dtype), mean, var
            parts = self._moments(x, p)
            if p.fused:
                self._apply(x, p, act, residual, y, mean, None, weight, bias, parts, var, eps)
                return y.to(x.dtype), mean, var
            (invstd,) = _vectors(x, view, 1)
            self._merge_moments(x, p, parts, mean, None, var, invstd, eps)
            self._apply(x, p, act, residual, y, mean, invstd, weight, bias)
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
    ) -> tuple[Tensor, Tensor | None, Sums]:
        if x.numel() == 0:
            return super().backward(dy, x, view, affine, act, residual, from_batch)
        p, known = planning.plan(view, x.itemsize, True, planning.LIMITS), _flat(affine)
        dx, dresidual = self._like(x), self._dresidual(residual, act)
        sums = Sums(*_vectors(x, view, 2))
        with _on(x):
            if p.resident:
                kernel = self._kernels.backward_resident
                tensors = (dy, x, _used(residual, act), dx, dresidual, *known, *sums, act.slope)
                options = {"ACT": act.name, "FROM_BATCH": from_batch}
                self._launch(kernel, p, 1, *tensors, *p.sizes, **options)
            elif not from_batch:  # dx does not wait for the sums
                parts = self._reduce(dy, x, p, known, act, residual, dx, dresidual)
                self._merge_sums(p, parts, sums)
            else:
                parts = self._reduce(dy, x, p, known, act, residual)
                if not p.fused:
                    self._merge_sums(p, parts, sums)
                own = parts if p.fused else None
                self._dx(dy, x, p, known, act, residual, dx, dresidual, sums, own)
        return dx.to(x.dtype), _passed_on(residual, dresidual, dy), sums

    def _moments(self, x: Tensor, p: Plan) -> Tensor:
        parts = x.new_empty(2, p.splits, p.owners, dtype=torch.float32)
        self._launch(self._kernels.moments, p, p.splits, x, parts, p.owners, *p.sizes)
        return parts

    def _merge_moments(
        self,
        x: Tensor,
        p: Plan,
        parts: Tensor,
        mean: Tensor,
        m2: Tensor | None,
        var: Tensor | None = None,
        invstd: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        m = p.merging()
        outputs = (mean, m2, var, invstd, eps, p.owners, p.splits)
        self._launch(self._kernels.merge_moments, m, 1, x, parts, *outputs, *m.sizes, PARTS=p.parts)

    def _apply(
        self,
        x: Tensor,
        p: Plan,
        act: Activation,
        residual: Tensor | None,
        y: Tensor,
        mean: Tensor,
        invstd: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        parts: Tensor | None = None,
        var: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        vectors = (parts, mean, invstd, weight, bias, var, eps, act.slope, p.owners, p.splits)
        options = {"PARTS": 1 if parts is None else p.parts, "ACT": act.name}
        kernel = self._kernels.apply
        self._launch(kernel, p, p.splits, x, residual, y, *vectors, *p.sizes, **options)

    def _reduce(
        self,
        dy: Tensor,
        x: Tensor,
        p: Plan,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
        dx: Tensor | None = None,
        dresidual: Tensor | None = None,
    ) -> Tensor:
        parts = x.new_empty(2, p.splits, p.owners, dtype=torch.float32)
        tensors = (dy, x, _used(residual, act), parts, *affine, dx, dresidual, act.slope, p.owners)
        kernel = self._kernels.backward_reduce
        self._launch(kernel, p, p.splits, *tensors, *p.sizes, ACT=act.name)
        return parts

    def _merge_sums(self, p: Plan, parts: Tensor, sums: Sums) -> None:
        m = p.merging()
        self._kernels.merge_sums[(m.groups,)](
            *(parts, *sums, p.owners, p.splits, *m.sizes[:2]),
            COLUMNS=p.columns,
            B=m.b,
            UNIT=m.unit,
            num_warps=m.warps,
            enable_fp_fusion=True,
            PARTS=p.parts,
        )

    def _dx(
        self,
        dy: Tensor,
        x: Tensor,
        p: Plan,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
        dx: Tensor,
        dresidual: Tensor | None,
        sums: Sums | None,
        parts: Tensor | None = None,
    ) -> None:
        one, two = (None, None) if sums is None else sums
        tensors = (dy, x, _used(residual, act), dx, dresidual, parts, *affine, one, two)
        options = {"PARTS": 1 if parts is None else p.parts, "ACT": act.name}
        numbers = (act.slope, p.owners, p.splits, *p.sizes)
        self._launch(self._kernels.backward_dx, p, p.splits, *tensors, *numbers, **options)

    def _like(self, t: Tensor) -> Tensor:
        """Memory for a result. The interpreter rounds to bfloat16 towards zero, so torch must."""
        return torch.empty_like(t, dtype=torch.float32 if self._interpreted else None)

    def _dresidual(self, residual: Tensor | None, act: Activation) -> Tensor | None:
        """Where the residual's gradient goes, unless it is dy."""
        return None if residual is None or act.name == "none" else self._like(residual)

    def _launch(self, kernel: Any, p: Plan, splits: int, *given: Any, **options: Any) -> None:
        kernel[(p.groups, splits)](
            *given,
            COLUMNS=p.columns,
            A=p.a,
            B=p.b,
            UNIT=p.unit,
            WIDE=p.wide,
            num_warps=p.warps,
            enable_fp_fusion=True,
            **options,
        )


@cache
def _unfit(device: torch.device) -> str | None:
    """Why a CUDA device does not run the kernels, or None if it does."""
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    found = torch.cuda.get_device_capability(device)
    if found < _OLDEST:
        return f"it needs compute capability 8.0, this device has {found[0]}.{found[1]}"
    return None


def _walk(x: Tensor, view: View) -> Plan:
    return planning.plan(view, x.itemsize, False, planning.LIMITS)


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be x's."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _vectors(x: Tensor, view: View, count: int) -> list[Tensor]:
    """Vectors to be filled."""
    dtype = accumulation_dtype(x.dtype, x.device)
    return [x.new_empty(view.kept_sizes, dtype=dtype) for _ in range(count)]


def _whole(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _flat(affine: Affine) -> Affine:
    mean, invstd, weight, bias = affine
    return Affine(mean.contiguous(), invstd.contiguous(), _whole(weight), _whole(bias))


def _used(residual: Tensor | None, act: Activation) -> Tensor | None:
    """The residual, where backward depends on it."""
    return None if act.name == "none" else residual


def _passed_on(residual: Tensor | None, dresidual: Tensor | None, dy: Tensor) -> Tensor | None:
    """The residual's gradient, which without an activation is dy."""
    if residual is None:
        return None
    return (dy if dresidual is None else dresidual).to(residual.dtype)
