"""Which tensors may go past torch's dispatcher, to the kernels themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..pattern import Bound, NormSpec
from ..view import View, view_of

__all__ = ["PLAIN", "is_like", "is_plain", "seen", "wants_gradients"]

PLAIN = (Tensor, torch.nn.Parameter)
"""Classes whose operations are torch's own; a subclass may want to see them."""

_is_left_over: Any = torch._C._functorch.is_dead_tensor_wrapper  # type: ignore[attr-defined]
"""True for what outlived its transform of torch.func: torch hides where its values are."""


def is_plain(x: Any) -> bool:
    """True for values in memory: no subclass, fake, transform or mode that wants to see ops."""
    return (
        type(x) in PLAIN
        and torch._C._has_storage(x)  # which what is_grads_batched hands around has not
        and not (x._is_zerotensor() or x.is_neg())
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not _is_left_over(x)
        and not torch._C._get_tracing_state()
    )


def is_like(t: Tensor, x: Tensor) -> bool:
    """True for a tensor of x's class of tensors, device, dtype, shape and strides."""
    return (
        type(t) in PLAIN
        and t.dtype == x.dtype
        and t.device == x.device
        and t.shape == x.shape
        and t.stride() == x.stride()
        and not (t._is_zerotensor() or t.is_neg())
    )


def wants_gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> bool:
    """True if grad is on and any of the tensors requires it."""
    return torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def seen(
    spec: NormSpec, shape: torch.Size, strides: tuple[int, ...], least: int
) -> tuple[Bound, View] | None:
    """The pattern on that layout, if a vector of its owners lies as they do in memory; else None.

    Args:
        spec: a batch norm's, whose weight has the owners' shape.
        shape, strides: of the tensor, which is not empty.
        least: how many values an owner must have.
    """
    with_owners = spec.affine is None or spec.affine_is_owners
    if not (spec.averages_batch and with_owners) or 0 in shape:
        return None
    bound = spec.bind(tuple(shape), {})
    view = view_of(shape, strides, bound.kept)
    if view is None or bound.shape != tuple(shape) or bound.count < least:
        return None
    return (bound, view) if view.kept == tuple(sorted(view.kept)) else None
