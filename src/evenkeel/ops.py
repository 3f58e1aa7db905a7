"""The differentiable op ``evenkeel::norm``, registered with torch.library.

One op serves every pattern: it is told which dimensions own a statistic, finds the memory's view
when it runs, and asks the chosen backend for the verbs. Fake kernels and autograd formulas are
registered, so torch.compile keeps it in its graph. The backward is an op of its own, whose
derivative comes from differentiating the reference backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import plainly
from .kernels.contract import Activation, Backend, accumulation_dtype
from .kernels.select import choose, load
from .kernels.triton import Triton
from .layouts import aligned, as_saved, dense, like_empty
from .view import View, logical_view

__all__ = ["gradients", "norm", "norm_op"]


@torch.library.custom_op("evenkeel::norm", mutates_args=())
def norm_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    kept: Sequence[int],
    eps: float,
    activation: str,
    slope: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalizes x; returns y and, where ``mean`` is None, the batch's mean and biased variance.

    ``kept`` are the dimensions of x that own a statistic, ascending; weight, bias, mean and var
    have one value per owner in that order. With ``mean`` and ``var`` given those are used instead,
    as constants, and the two returned statistics are empty. The fourth result is what backward
    takes in place of the residual, or empty.
    """
    x, view = dense(x, kept)
    verbs = _verbs(backend, view, x)
    act = Activation(activation, slope)
    added = None if residual is None else aligned(residual, x, view)
    if mean is not None and var is not None:
        known = plainly.affine(view, x, weight, bias, mean, var, eps)
        y = verbs.apply(x, view, known, act, added)
        nothing = y.new_empty(0, dtype=known.mean.dtype)
        return like_empty(y, x), nothing, nothing.clone(), x.new_empty(0, dtype=torch.uint8)
    parameters = (plainly.folded(weight, view, x), plainly.folded(bias, view, x))
    size = _bits(x, residual, mean, kept, act, backend)
    is_exact = 8 * size == x.numel()  # else some are left over, and results must be determined
    bits = (x.new_empty if is_exact else x.new_zeros)(size, dtype=torch.uint8)
    given = (x, view, *parameters, eps, act, added)
    if bits.numel() == 0:
        y, mean, var = verbs.forward_training(*given)
    else:
        y, mean, var = _triton(verbs).forward_training(*given, bits)
    mean, var = view.unfold_vector(mean, x.shape), view.unfold_vector(var, x.shape)
    return like_empty(y, x), mean, var, bits


@norm_op.register_fake
def _norm_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    kept: Sequence[int],
    eps: float,
    activation: str,
    slope: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = [x.shape[d] for d in kept] if mean is None else [0]
    dtype = accumulation_dtype(x.dtype, x.device)
    bits = _bits(x, residual, mean, kept, Activation(activation, slope), backend)
    return (
        torch.empty_like(x),
        x.new_empty(shape, dtype=dtype),
        x.new_empty(shape, dtype=dtype),
        x.new_empty(bits, dtype=torch.uint8),
    )


def _bits(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    kept: Sequence[int],
    act: Activation,
    backend: str,
) -> int:
    """How many bytes for bits that are kept in place of the residual; 0 where that is kept itself.

    It must be known of a fake tensor, whose sizes may be symbols and whose layout is not asked:
    enough for rows and for columns, which with one dimension that owns is not much more than one
    of them takes.
    """
    if residual is None or mean is not None or not act.has_bit or backend != "triton":
        return 0
    if len(kept) != 1:
        return 0
    owners, count = x.shape[kept[0]], prod(s for d, s in enumerate(x.shape) if d != kept[0])
    size: int = torch.sym_max(  # type: ignore[no-untyped-call]
        owners * ((count + 7) // 8), count * ((owners + 7) // 8)
    )
    return size


@torch.library.custom_op("evenkeel::norm_backward", mutates_args=())
def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    mean: Tensor,
    var: Tensor,
    from_batch: bool,
    kept: Sequence[int],
    eps: float,
    activation: str,
    slope: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and residual; empty for what is None. Updates nothing.

    ``bits`` are what the forward returned in place of the residual, if anything. ``from_batch``
    says that mean and var were computed from x, and so depend on it.
    """
    x, view = dense(x, kept)
    known = plainly.affine(view, x, weight, bias, mean, var, eps)
    act = Activation(activation, slope)
    verbs = _verbs(backend, view, x)
    dy = aligned(dy, x, view)
    added = None if residual is None else aligned(residual, x, view)
    given = (dy, x, view, known, act, added, from_batch)
    if bits is None:
        dx, dresidual, sums = verbs.backward(*given)
    else:
        dx, dresidual, sums = _triton(verbs).backward(*given, bits)
    if dresidual is not None and act.name == "none":
        dresidual = dresidual.clone()  # it may be dy itself, and an op must not return its input
    return (
        like_empty(dx, x),
        plainly.owned(sums.dz_xhat, view, x, weight),
        plainly.owned(sums.dz, view, x, bias),
        x.new_empty(0) if dresidual is None else like_empty(dresidual, x),
    )


@norm_backward.register_fake
def _norm_backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: Tensor | None,
    mean: Tensor,
    var: Tensor,
    from_batch: bool,
    kept: Sequence[int],
    eps: float,
    activation: str,
    slope: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = [x.shape[d] for d in kept]
    return (
        torch.empty_like(x),
        x.new_empty(0) if weight is None else weight.new_empty(shape),
        x.new_empty(0) if bias is None else bias.new_empty(shape),
        x.new_empty(0)
        if residual is bits is None
        else torch.empty_like(x, dtype=None if residual is None else residual.dtype),
    )


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Saves for the backward what it needs of the inputs and outputs."""
    x, weight, bias, residual, mean, var, *ctx.rest = inputs
    ctx.from_batch = mean is None
    if mean is None:
        mean, var = output[1:3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.residual_dtype = None if residual is None else residual.dtype
    # Without an activation the residual's gradient is dy itself, and its value is not needed.
    ctx.is_linear = ctx.rest[2] == "none"
    needed: tuple[Tensor | None, Tensor | None] = (None if ctx.is_linear else residual, None)
    if _bits(x, residual, inputs[4], ctx.rest[0], Activation(*ctx.rest[2:4]), ctx.rest[4]):
        needed = (None, output[3])
        ctx.strides = x.stride()
    ctx.save_for_backward(x, weight, bias, *needed, mean, var)


def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of each input of `norm_op`, None for what has none."""
    x, weight, bias, residual, bits, mean, var = ctx.saved_tensors
    if bits is not None:  # which lie in the order that x had; hooks may have given it another
        x = as_saved(x, ctx.strides)
    dx, dweight, dbias, dresidual = gradients(
        dy, x, weight, bias, residual, bits, mean, var, ctx.from_batch, *ctx.rest
    )
    added = None
    if ctx.residual_dtype is not None:
        added = (dy if ctx.is_linear else dresidual).to(ctx.residual_dtype)
    return (
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias,
        added,
        *[None] * (2 + len(ctx.rest)),
    )


torch.library.register_autograd("evenkeel::norm", backward, setup_context=keep)


def _keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.from_batch, ctx.kept, ctx.eps, activation, slope, _ = inputs
    ctx.act, ctx.strides = Activation(activation, slope), tensors[1].stride()
    ctx.save_for_backward(*tensors)


def _second_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The derivative of the backward: differentiate the reference forward twice."""
    *given, bits, mean, var = ctx.saved_tensors
    if bits is not None:
        _, x, weight, bias, _ = given
        x, view = dense(as_saved(x, ctx.strides), ctx.kept)
        through = _triton(load("triton")).through(x, view, bits)
        given[4] = plainly.stand_in(x, view, weight, bias, mean, var, ctx.eps, through)
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [None if t is None else _fresh(t, create) for t in given]
        dy, x, weight, bias, residual = given
        verbs, view = load("reference"), logical_view(x.shape, ctx.kept)
        if ctx.from_batch:
            n, mean, m2 = verbs.stats(x, view)
            var = m2 / max(n, 1)
        y = verbs.apply(
            x, view, plainly.affine(view, x, weight, bias, mean, var, ctx.eps), ctx.act, residual
        )
        sources = [t for t in given if t is not None]
        first = iter(torch.autograd.grad(y, sources[1:], dy, create_graph=True))
        outputs = [None if t is None else next(first) for t in given[1:]]
        used = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if output is not None and gradient is not None
        ]
        second = iter(
            torch.autograd.grad(
                [output for output, _ in used],
                sources,
                [gradient for _, gradient in used],
                create_graph=create,
                allow_unused=True,
            )
        )
    found = [None if t is None else next(second) for t in given]
    return (*found[:4], found[4] if bits is None else None, *[None] * 9)


def _fresh(t: Tensor, create: bool) -> Tensor:
    """``t`` to differentiate by, apart from its own past: dy comes from x, but not here."""
    return t.view_as(t) if create and t.requires_grad else t.detach().requires_grad_()


torch.library.register_autograd(
    "evenkeel::norm_backward", _second_backward, setup_context=_keep_for_second
)


def _triton(verbs: Backend) -> Triton:
    """The one backend that keeps bits for the op."""
    assert isinstance(verbs, Triton)  # noqa: S101 - asked for by name
    return verbs


def _verbs(wish: str, view: View, x: Tensor) -> Backend:
    return load(choose(wish, view, x.dtype, x.device).name)


def norm(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y and statistics of `norm_op`; by torch's operations one by one where that is wanted.

    ``given`` is what the op takes, with the activation as one value.
    """
    if plainly.is_wanted():
        return plainly.norm(*given[:-1])
    *known, act, backend = given
    y, mean, var, _ = norm_op(*known, act.name, act.slope, backend)
    return y, mean, var


def gradients(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `norm_backward` gives for the same; by torch's operations one by one for tangents."""
    if not plainly.has_tangents():
        found: tuple[Tensor, Tensor, Tensor, Tensor] = norm_backward(*given)
        return found
    dy, x, weight, bias, residual, bits, mean, var, from_batch, kept, eps, name, slope, _ = given
    if bits is not None:
        x, view = dense(x, kept)
        through = _triton(load("triton")).through(x, view, bits)
        residual = plainly.stand_in(x, view, weight, bias, mean, var, eps, through)
    act = Activation(name, slope)
    return plainly.gradients(dy, x, weight, bias, residual, mean, var, from_batch, kept, eps, act)
