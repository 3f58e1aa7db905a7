"""The norm by torch's own operations, one by one, on the reference verbs.

An op that is one piece hides from torch.func's transforms and forward-mode derivatives what it
computes. Where they are at work the norm goes this way; and second derivatives come from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .kernels.contract import Activation, Affine, accumulation_dtype
from .kernels.select import load
from .view import View, logical_view

__all__ = [
    "affine",
    "folded",
    "gradients",
    "has_tangents",
    "is_wanted",
    "norm",
    "owned",
    "stand_in",
]


def has_tangents() -> bool:
    """True within forward-mode derivatives, whose tangents an op would lose."""
    return forward_ad._current_level >= 0 and not torch.compiler.is_compiling()


def is_wanted() -> bool:
    """True within those, and within torch.func's transforms."""
    if torch.compiler.is_compiling():
        return False
    return has_tangents() or torch._C._functorch.peek_interpreter_stack() is not None


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    kept: Sequence[int],
    eps: float,
    act: Activation,
) -> tuple[Tensor, Tensor, Tensor]:
    """y and the mean and biased variance that it was computed with, as `evenkeel.ops.norm_op`."""
    view, verbs = logical_view(x.shape, tuple(kept)), load("reference")
    if mean is None or var is None:
        n, own, m2 = verbs.stats(x, view)
        mean, var = (view.unfold_vector(t, x.shape) for t in (own, m2 / max(n, 1)))
    known = affine(view, x, weight, bias, mean, var, eps)
    return verbs.apply(x, view, known, act, residual), mean, var


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    from_batch: bool,
    kept: Sequence[int],
    eps: float,
    act: Activation,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and residual, as `evenkeel.ops.norm_backward`."""
    view = logical_view(x.shape, tuple(kept))
    known = affine(view, x, weight, bias, mean, var, eps)
    dx, dresidual, sums = load("reference").backward(dy, x, view, known, act, residual, from_batch)
    return (
        dx,
        owned(sums.dz_xhat, view, x, weight),
        owned(sums.dz, view, x, bias),
        x.new_empty(0) if dresidual is None else dresidual,
    )


def stand_in(
    x: Tensor,
    view: View,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    through: Tensor,
) -> Tensor:
    """A residual that decides every gradient as the one did of which only bits were kept.

    It makes 1 of the value before the activation where ``through`` is 1, and -1 where it is 0.
    Where an activation is decided by one bit, nothing but the decision depends on the residual.
    It has the precision of statistics: in that of x, large values would hide the 1.
    """
    with torch.no_grad():
        wide = x.to(accumulation_dtype(x.dtype, x.device))
        known = affine(view, wide, weight, bias, mean, var, eps)
        normalized = load("reference").apply(wide, view, known, Activation(), None)
        return 2 * through - 1 - normalized


def folded(vector: Tensor | None, view: View, x: Tensor) -> Tensor | None:
    """A per-owner vector in memory order and in the accumulation dtype."""
    if vector is None:
        return None
    wide = vector.to(accumulation_dtype(x.dtype, x.device))
    return view.fold_vector(wide, x.shape)


def affine(
    view: View,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Affine:
    """The map that a norm applies, in memory order."""
    own_mean, own_var = folded(mean, view, x), folded(var, view, x)
    assert own_mean is not None  # noqa: S101 - given, so folded
    assert own_var is not None  # noqa: S101
    return Affine(own_mean, (own_var + eps).rsqrt(), folded(weight, view, x), folded(bias, view, x))


def owned(vector: Tensor, view: View, x: Tensor, parameter: Tensor | None) -> Tensor:
    """The gradient of weight or bias; empty if there is no such parameter."""
    if parameter is None:
        return x.new_empty(0)
    return view.unfold_vector(vector, x.shape).to(parameter.dtype)
