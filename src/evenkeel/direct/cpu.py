"""On the CPU: one C++ call forward and one backward.

The native kernels also convert parameters and move running statistics. Behind a residual add they
keep one bit for each value in place of the residual.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import recompute
from ..kernels.contract import Activation
from ..kernels.native import ACTS, BOTH, FEW, MAP, REDUCE, TYPES, Native
from ..kernels.select import choose, load
from ..layouts import aligned, as_saved
from ..ops import gradients
from ..pattern import NormSpec, parse
from ..plainly import stand_in
from ..view import View
from .plain import PLAIN, is_like, is_plain, seen, wants_gradients

__all__ = ["batch_norm", "kernels", "kind_of"]

_WIDE = (torch.float32, torch.float64)


class _Plan(NamedTuple):
    """What is known of all calls with one layout."""

    view: View
    strides: tuple[int, ...]
    kept: tuple[int, ...]
    kind: tuple[int, ...]
    """The view's four numbers and the type's, as the kernels take them."""
    owners: torch.Size
    """The shape of a statistic, which is also its order in memory."""
    memory: Tensor
    """What `_Call.memory` is like; it takes no room. To be like a tensor is cheaper than to be of
    a shape and a dtype."""

    @property
    def row(self) -> int:
        """Bytes from one row of that memory to the next."""
        return 8 * self.owners.numel()


class _Call(NamedTuple):
    """What a call is given besides the tensors that have gradients."""

    plan: _Plan
    act: Activation
    eps: float
    from_batch: bool
    memory: Tensor
    """Three rows: mean, 1 / sqrt(var + eps) and var."""


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
    """What `evenkeel.functional.normalize` computes, or None if this is not the way.

    Nothing is checked but that this way is open; of anything wrong the other way tells.
    """
    if not (x.is_cpu and is_plain(x)):
        return None
    plan = _plan(spec, x.shape, x.stride(), x.dtype)
    if plan is None or not (
        _fits(weight, bias, plan.owners)
        and _fits(running_mean, running_var, plan.owners)
        and (running_mean is None) == (running_var is None)
        and (from_batch or running_mean is not None)
        and (weight is bias is None or spec.affine is not None)
        and (residual is None or is_like(residual, x))
    ):
        return None
    call = _Call(plan, act, eps, from_batch, torch.empty_like(plan.memory))
    given = (x, weight, bias, residual)
    running = (running_mean, running_var, float(momentum))
    if not wants_gradients(*given):
        if inplace:
            torch.autograd.graph.increment_version(x)
        return _forward(*given, call, None, *running, y=x if inplace else None)
    if x.is_inference():
        return None  # which autograd will refuse to keep: before statistics have moved
    y: Tensor = _Fused.apply(*given, call, running)  # type: ignore[no-untyped-call]
    if recompute.active():
        again = partial(_again, call=call)
        recompute.offer(y, again, *given)
    return y


def kind_of(x: Tensor) -> tuple[int, ...] | None:
    """What the kernels know a tensor with channels by: four numbers and a type; else None."""
    plan = _plan(parse("n c ... -> c"), x.shape, x.stride(), x.dtype)
    return None if plan is None else plan.kind


def _fits(one: Tensor | None, other: Tensor | None, shape: torch.Size) -> bool:
    """True for two vectors of that shape and of one type that the kernels read, or for none."""
    if one is None:
        return other is None or _fits(other, None, shape)
    return (
        type(one) in PLAIN
        and one.shape == shape
        and one.dtype in _WIDE
        and one.is_cpu
        and one.is_contiguous()
        and (other is None or (other.dtype == one.dtype and _fits(other, None, shape)))
    )


@lru_cache(maxsize=4096)
def _plan(
    spec: NormSpec, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype
) -> _Plan | None:
    found = seen(spec, shape, strides, FEW)
    if found is None or dtype not in TYPES:
        return None
    bound, view = found
    if choose("auto", view, dtype, torch.device("cpu")).name != "native":
        return None
    kind = (*view.sizes, TYPES[dtype])
    owners = torch.Size(bound.stat_shape)
    memory = torch.empty(1, dtype=torch.float64, device="cpu").expand(3, *owners)
    return _Plan(view, strides, bound.kept, kind, owners, memory)


@lru_cache(maxsize=1)
def kernels() -> Any:
    """The module of our kernels."""
    native = load("native")
    assert isinstance(native, Native)  # noqa: S101 - it is chosen before
    return native.module


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _is_single(one: Tensor | None, other: Tensor | None = None) -> bool:
    given = other if one is None else one
    return given is not None and given.dtype == torch.float32


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    call: _Call,
    mask: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.0,
    phases: int | None = None,
    y: Tensor | None = None,
) -> Tensor:
    plan, act, eps, from_batch, memory = call
    if y is None:
        y = torch.empty_like(x)
    if phases is None:
        phases = BOTH if from_batch else MAP
    kernels().forward(
        *plan.kind,
        *(ACTS[act.name], act.slope, phases, torch.get_num_threads(), eps),
        *(x.data_ptr(), _address(residual), y.data_ptr(), _address(mask)),
        *(_address(weight), _address(bias), _is_single(weight, bias), memory.data_ptr()),
        *(_address(running_mean), _address(running_var), _is_single(running_mean), momentum),
    )
    return y


def _again(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: _Call
) -> Tensor:
    """y once more, by the statistics that there are."""
    x, strides = as_saved(x, call.plan.strides), call.plan.strides
    residual = None if residual is None else as_saved(residual, strides)
    return _forward(x, weight, bias, residual, call, None, phases=MAP)


class _Fused(torch.autograd.Function):
    """The two calls, and what the first keeps for the second."""

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
        ctx.call = call
        ctx.adds = residual is not None
        kept = None if call.act.name == "none" else residual
        mask = None
        if kept is not None and call.act.has_bit:
            size = kernels().mask_bytes(*call.plan.kind)
            mask = kept = torch.empty(size, dtype=torch.uint8, device="cpu")
        y = _forward(x, weight, bias, residual, call, mask, *running)
        ctx.save_for_backward(x, weight, bias, kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # A second derivative is what the op has; and it knows dy that is no plain tensor.
        if torch.is_grad_enabled() or not is_plain(dy):
            return _by_op(ctx, dy)
        x, weight, bias, kept = _saved(ctx)
        plan, act, _, from_batch, memory = ctx.call
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        if dy.dtype != x.dtype:
            dy = dy.to(x.dtype)
        dy = aligned(dy, x, plan.view)
        mask = kept if ctx.adds and act.has_bit else None
        maps = wants_x or (wants_residual and kept is not None)
        dx = torch.empty_like(x) if maps else None
        dweight = torch.empty_like(weight) if wants_weight else None
        dbias = torch.empty_like(bias) if wants_bias else None
        dresidual = dy if wants_residual else None
        if wants_residual and kept is not None:
            dresidual = torch.empty_like(x)
        reduces = wants_weight or wants_bias or from_batch
        mean = memory.data_ptr()
        kernels().backward(
            *plan.kind,
            *(ACTS[act.name], act.slope, (REDUCE if reduces else 0) | (MAP if maps else 0)),
            *(torch.get_num_threads(), from_batch, dy.data_ptr(), x.data_ptr()),
            *(_address(kept if mask is None else None), _address(mask), _address(dx)),
            *(_address(dresidual if kept is not None else None), _address(weight), _address(bias)),
            *(_is_single(weight, bias), mean, mean + plan.row, 0),
            *(_address(dweight), _address(dbias)),
        )
        return dx if wants_x else None, dweight, dbias, dresidual, None, None


def _saved(ctx: Any) -> tuple[Any, ...]:
    """x, weight, bias and what was kept of the residual, in the layout that they had."""
    x, weight, bias, kept = ctx.saved_tensors
    plan, act = ctx.call[:2]
    if kept is not None and not act.has_bit:
        kept = as_saved(kept, plan.strides)
    return as_saved(x, plan.strides), weight, bias, kept


def _by_op(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients, by an op that can be differentiated."""
    x, weight, bias, kept = _saved(ctx)
    plan, act, eps, from_batch, (mean, _, var) = ctx.call
    residual = kept
    if ctx.adds and act.has_bit:
        through = _through(x, ctx.call, kept)
        residual = stand_in(x, plan.view, weight, bias, mean, var, eps, through)
    dx, dweight, dbias, dresidual = gradients(
        *(dy, x, weight, bias, residual, None, mean, var, from_batch),
        *(plan.kept, eps, act.name, act.slope, "auto"),
    )
    return (
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias,
        (dy if kept is None else dresidual.to(x.dtype)) if ctx.adds else None,
        None,
        None,
    )


def _through(x: Tensor, call: _Call, mask: Tensor) -> Tensor:
    """What a gradient of ones is behind the mask: 1 where a bit is set, else 0."""
    given, dx, through = torch.ones_like(x), torch.empty_like(x), torch.empty_like(x)
    mean = call.memory.data_ptr()
    kernels().backward(
        *call.plan.kind,
        *(ACTS["relu"], 0.0, MAP, torch.get_num_threads(), False),
        *(given.data_ptr(), x.data_ptr(), 0, mask.data_ptr(), dx.data_ptr()),
        *(through.data_ptr(), 0, 0, False, mean, mean + call.plan.row, 0, 0, 0),
    )
    return through
