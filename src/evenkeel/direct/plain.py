"""Which tensors may go past torch's dispatcher, to the kernels themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["PLAIN", "is_like", "is_plain", "wants_gradients"]

PLAIN = (Tensor, torch.nn.Parameter)
"""Classes whose operations are torch's own; a subclass may want to see them."""

_is_left_over: Any = torch._C._functorch.is_dead_tensor_wrapper  # type: ignore[attr-defined]
"""True for what outlived its transform of torch.func: torch hides where its values are."""


def is_plain(x: Any) -> bool:
    """True for values in memory: no subclass, fake, transform or mode that wants to see ops."""
    return (
        type(x) in PLAIN
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
