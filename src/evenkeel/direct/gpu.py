"""On a GPU: Triton's kernels, launched from one autograd function.

They move the running statistics too, so that a norm in training is one or two launches forward and
one or two backward, three where an owner is divided among very many programs. Behind a residual
add they keep one bit for each value in place of the residual. In Triton's interpreter the same way
leads to the CPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.contract import Activation, Affine, Sums, accumulation_dtype
from ..kernels.select import load
from ..kernels.triton import Plan, Triton, plan_of
from ..layouts import aligned, as_saved
from ..ops import gradients
from ..pattern import NormSpec
from ..view import View
from .plain import PLAIN, is_like, is_plain, seen, wants_gradients

__all__ = ["batch_norm"]


class _Plan(NamedTuple):
    """What is known of all calls with one layout."""

    view: View
    strides: tuple[int, ...]
    kept: tuple[int, ...]
    owners: torch.Size
    """The shape of a statistic, which is also its order in memory."""
    vector: Tensor
    """What statistics are like; it takes no room. To be like a tensor is cheaper than to be of a
    shape and a dtype."""
    division: Plan
    walk: Plan
    """Inference's division, which need not keep what it has read."""
    verbs: Triton


class _Call(NamedTuple):
    """What a call is given besides the tensors that have gradients."""

    plan: _Plan
    act: Activation
    eps: float
    from_batch: bool


def batch_norm(
    x: Tensor,
    spec: NormSpec,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    from_batch: bool,
    momentum: float | Tensor,
    eps: float,
    act: Activation,
    residual: Tensor | None,
    inplace: bool,
) -> Tensor | None:
    """As `evenkeel.direct.cpu.batch_norm`."""
    if inplace or not is_plain(x) or isinstance(momentum, Tensor):
        return None
    plan = _plan(spec, x.shape, x.stride(), x.dtype, x.device)
    running, device = (running_mean, running_var, momentum), x.get_device()
    if plan is None or not (
        (weight is None or _fits(weight, plan.owners, device))
        and (bias is None or _fits(bias, plan.owners, device))
        and (running_mean is None or _fits(running_mean, plan.owners, device))
        and (running_var is None or _fits(running_var, plan.owners, device))
        and (running_mean is None) == (running_var is None)
        and (from_batch or running_mean is not None)
        and (weight is bias is None or spec.affine is not None)
        and (residual is None or is_like(residual, x))
    ):
        return None
    call = _Call(plan, act, eps, from_batch)
    given = (x, weight, bias, residual)
    if wants_gradients(*given):
        if x.is_inference():
            return None  # which autograd will refuse to keep: before statistics have moved
        y: Tensor = _Fused.apply(*given, call, running)  # type: ignore[no-untyped-call]
        return y
    return _forward(*given, call, None, *running)[0]


def _fits(t: Tensor, shape: torch.Size, device: int) -> bool:
    return (
        type(t) in PLAIN
        and t.dtype == torch.float32
        and t.get_device() == device
        and t.shape == shape
        and t.is_contiguous()
    )


@lru_cache(maxsize=4096)
def _plan(
    spec: NormSpec,
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> _Plan | None:
    found = seen(spec, shape, strides, 2)
    if found is None:
        return None
    bound, view = found
    verbs = load("triton")
    assert isinstance(verbs, Triton)  # noqa: S101 - it is called so
    if verbs.refuses(view, dtype, device) is not None:
        return None
    owners = torch.Size(bound.stat_shape)
    vector = torch.empty(1, dtype=accumulation_dtype(dtype, device), device=device).expand(owners)
    divisions = plan_of(view, dtype.itemsize), plan_of(view, dtype.itemsize, keeps=False)
    return _Plan(view, strides, bound.kept, owners, vector, *divisions, verbs)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    call: _Call,
    bits: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y; and mean and 1 / sqrt(var + eps) if they are the batch's."""
    plan, act, eps, from_batch = call
    verbs, own = plan.verbs, (weight, bias)
    y = verbs.like(x)
    if from_batch:
        mean, invstd = torch.empty_like(plan.vector), torch.empty_like(plan.vector)
        statistics = (mean, None, invstd, running_mean, running_var)
        verbs.calls.train(x, plan.division, residual, y, statistics, own, eps, momentum, act, bits)
        return _as(x, y), mean, invstd
    known = (running_mean, running_var, None)
    verbs.calls.map(x, plan.walk, residual, y, *known, own, eps, act, bits)
    return _as(x, y), None, None


def _as(x: Tensor, t: Tensor) -> Tensor:
    """``t`` in the dtype of x, which it has but for Triton's interpreter."""
    return t if t.dtype == x.dtype else t.to(x.dtype)


class _Fused(torch.autograd.Function):
    """The launches, and what the first keep for the second."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: _Call,
        running: tuple[Tensor | None, Tensor | None, float],
    ) -> Tensor:
        kept = None if call.act.name == "none" else residual
        bits = None
        if kept is not None and call.act.has_bit:
            bits = kept = x.new_empty(call.plan.division.bits, dtype=torch.uint8)
        y, mean, invstd = _forward(x, weight, bias, residual, call, bits, *running)
        if mean is None:  # running statistics, which may have moved before backward
            mean, var = (_copy(t, call.plan.vector) for t in running[:2])
            invstd = (var + call.eps).rsqrt()
        ctx.call, ctx.statistics = call, (mean, invstd)
        ctx.adds, ctx.has_bits = residual is not None, bits is not None
        ctx.save_for_backward(x, weight, bias, kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, kept = ctx.saved_tensors
        plan, act, eps, from_batch = ctx.call
        x = as_saved(x, plan.strides)
        if kept is not None and not ctx.has_bits:
            kept = as_saved(kept, plan.strides)
        mean, invstd = ctx.statistics
        residual, bits = (None, kept) if ctx.has_bits else (kept, None)
        dresidual: Tensor | None
        # A second derivative is what the op has; and it knows dy that is no plain tensor.
        if torch.is_grad_enabled() or not is_plain(dy):
            var = invstd.square().reciprocal() - eps  # to which eps will be added again
            dx, dweight, dbias, dresidual = gradients(
                *(dy, x, weight, bias, residual, bits, mean, var, from_batch),
                *(plan.kept, eps, act.name, act.slope, "triton"),
            )
        else:
            verbs = plan.verbs
            dy = aligned(_as(x, dy), x, plan.view)
            dx, dresidual = verbs.like(x), None if kept is None else verbs.like(x)
            sums = Sums(torch.empty_like(plan.vector), torch.empty_like(plan.vector))
            known = Affine(mean, invstd, weight, bias)
            verbs.calls.backward(
                dy, x, plan.division, residual, dx, dresidual, known, sums, act, from_batch, bits
            )
            dx, dresidual = _as(x, dx), None if dresidual is None else _as(x, dresidual)
            dbias, dweight = sums
        return (
            dx,
            None if weight is None else _as(weight, dweight),
            None if bias is None else _as(bias, dbias),
            (dy if kept is None else dresidual) if ctx.adds else None,
            *(None, None),
        )


def _copy(t: Tensor | None, like: Tensor) -> Tensor:
    assert t is not None  # noqa: S101 - inference has them
    return torch.empty_like(like).copy_(t)
