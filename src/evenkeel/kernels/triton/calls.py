"""The calls of a norm, as launches into memory that is given. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..contract import Activation, Affine, Sums
from .launching import Launcher
from .planning import Plan

__all__ = ["Calls"]

_NONE = Activation()


class Calls:
    """Forward and backward, each one launch or a few.

    Tensors have one layout, that of the plan, and are not empty. Vectors are without gaps and in
    memory order.
    """

    def __init__(self, launch: Launcher) -> None:
        self._launch = launch

    def train(
        self,
        x: Tensor,
        p: Plan,
        residual: Tensor | None,
        y: Tensor,
        statistics: Sequence[Tensor | None],
        own: Sequence[Tensor | None],
        eps: float,
        momentum: float,
        act: Activation,
        bits: Tensor | None = None,
    ) -> None:
        """The forward of training.

        ``statistics`` are mean, biased variance (or None) and invstd, which are written, and the
        running mean and variance or None, which move in the same kernels::

            running = (1 - momentum) * running + momentum * batch

        with the unbiased variance. ``own`` are weight and bias or None. ``bits``, if given, are
        `Plan.bits` bytes for a bit of each value, which says whether the gradient passes the
        activation.
        """
        with _on(x):
            if p.resident:
                tensors = (x, residual, y, bits, *statistics, *own)
                floats = (eps, momentum, act.slope)
                self._launch("forward_resident", p, 1, tensors, *floats, ACT=act.name)
                return
            parts = self._moments(x, p)
            if p.fused:
                self._apply(x, p, act, residual, y, bits, parts, statistics, own, eps, momentum)
                return
            outputs = (statistics[0], None, *statistics[1:])
            self._merge_moments(x, p, parts, outputs, eps, momentum)
            mean, _, invstd = statistics[:3]
            self.map(x, p, residual, y, mean, None, invstd, own, eps, act, bits)

    def map(
        self,
        x: Tensor,
        p: Plan,
        residual: Tensor | None,
        y: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        invstd: Tensor | None,
        own: Sequence[Tensor | None],
        eps: float,
        act: Activation,
        bits: Tensor | None = None,
    ) -> None:
        """The forward of inference, by invstd, or by var and eps if it is None."""
        with _on(x):
            known = (mean, var, invstd, None, None)
            self._apply(x, p, act, residual, y, bits, None, known, own, eps)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        p: Plan,
        residual: Tensor | None,
        dx: Tensor,
        dresidual: Tensor | None,
        known: Affine,
        sums: Sums,
        act: Activation,
        from_batch: bool,
        bits: Tensor | None = None,
    ) -> None:
        """The backward; dx and dresidual are as `Triton.like` and `Triton.dresidual` make them.

        With ``bits``, those of the forward, the residual is not read and may be None.
        """
        with _on(x):
            if p.resident:
                tensors = (dy, x, _used(residual, act, bits), bits, dx, dresidual, *known, *sums)
                options = {"ACT": act.name, "FROM_BATCH": from_batch}
                self._launch("backward_resident", p, 1, tensors, act.slope, **options)
                return
            if not from_batch:  # dx does not wait for the sums
                parts = self._reduce(dy, x, p, known, act, residual, bits, dx, dresidual)
                self._merge_sums(p, parts, sums)
                return
            early = dresidual if _is_exact(act, x) else None
            parts = self._reduce(dy, x, p, known, act, residual, bits, None, early)
            if not p.fused:
                self._merge_sums(p, parts, sums)
            own = parts if p.fused else None
            if early is None:
                self.dx(dy, x, p, known, act, residual, dx, dresidual, sums, own, bits)
            else:  # it is there, and stands for dy and what decides the activation
                self.dx(early, x, p, known, _NONE, None, dx, None, sums, own)

    def stats(self, x: Tensor, p: Plan, mean: Tensor, m2: Tensor) -> None:
        """Each owner's mean and sum of squared deviations."""
        with _on(x):
            self._merge_moments(x, p, self._moments(x, p), (mean, m2, *[None] * 4))

    def reduce(
        self,
        dy: Tensor,
        x: Tensor,
        p: Plan,
        known: Affine,
        act: Activation,
        residual: Tensor | None,
        sums: Sums,
    ) -> None:
        """The two sums alone."""
        with _on(x):
            self._merge_sums(p, self._reduce(dy, x, p, known, act, residual, None), sums)

    def dx(
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
        bits: Tensor | None = None,
    ) -> None:
        """dx and the residual's gradient, with the two sums, or their parts too, or without."""
        added = _used(residual, act, bits)
        tensors = (dy, x, added, bits, dx, dresidual, parts, *affine)
        options = {"PARTS": 1 if parts is None else p.parts, "ACT": act.name}
        both = (None, None) if sums is None else sums
        with _on(x):
            self._launch("backward_dx", p, p.splits, (*tensors, *both), act.slope, **options)

    def _moments(self, x: Tensor, p: Plan) -> Tensor:
        parts = x.new_empty(2, p.splits, p.owners, dtype=torch.float32)
        self._launch("moments", p, p.splits, (x, parts))
        return parts

    def _merge_moments(
        self,
        x: Tensor,
        p: Plan,
        parts: Tensor,
        outputs: Sequence[Tensor | None],
        eps: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        """``outputs`` are mean and m2, or mean, None and the others of the statistics."""
        tensors = (x, parts, *outputs)
        self._launch("merge_moments", p.merging, 1, tensors, eps, momentum, PARTS=p.parts)

    def _apply(
        self,
        x: Tensor,
        p: Plan,
        act: Activation,
        residual: Tensor | None,
        y: Tensor,
        bits: Tensor | None,
        parts: Tensor | None,
        statistics: Sequence[Tensor | None],
        own: Sequence[Tensor | None],
        eps: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        tensors = (x, residual, y, bits, parts, *statistics, *own)
        options = {"PARTS": 1 if parts is None else p.parts, "ACT": act.name}
        self._launch("apply", p, p.splits, tensors, eps, momentum, act.slope, **options)

    def _reduce(
        self,
        dy: Tensor,
        x: Tensor,
        p: Plan,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
        bits: Tensor | None,
        dx: Tensor | None = None,
        dresidual: Tensor | None = None,
    ) -> Tensor:
        parts = x.new_empty(2, p.splits, p.owners, dtype=torch.float32)
        added = _used(residual, act, bits)
        tensors = (dy, x, added, bits, dx, dresidual, parts, *affine)
        self._launch("backward_reduce", p, p.splits, tensors, act.slope, ACT=act.name)
        return parts

    def _merge_sums(self, p: Plan, parts: Tensor, sums: Sums) -> None:
        self._launch("merge_sums", p.merging, 1, (parts, *sums), PARTS=p.parts)


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be x's."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _used(residual: Tensor | None, act: Activation, bits: Tensor | None) -> Tensor | None:
    """The residual, where backward depends on it."""
    return residual if act.name != "none" and bits is None else None


def _is_exact(act: Activation, x: Tensor) -> bool:
    """True if the residual's gradient, as it is stored, is dy or 0, or rounded no more than dx is.

    Then the second pass of backward reads it in place of dy and the residual: one tensor less.
    """
    return act.name in ("relu", "relu6") or x.dtype == torch.float32
