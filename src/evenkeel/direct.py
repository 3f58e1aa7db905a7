"""The op of `evenkeel.ops` by the shortest way there.

An op of torch.library can be compiled, exported and traced; but calling one costs more than three
times what torch's own batch norm costs on a small tensor. So plain tensors in eager mode go past
it, to the same two functions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .kernels.contract import Activation
from .ops import backward, dense, forward, gradients, keep, norm_op

__all__ = ["norm"]


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    kept: tuple[int, ...],
    eps: float,
    activation: str,
    slope: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `evenkeel.ops.norm_op` computes."""
    given = (x, weight, bias, residual, mean, var, kept, eps, activation, slope, backend)
    call: Any = norm_op if torch.compiler.is_compiling() or not _is_plain(x) else _Direct.apply
    return cast(tuple[Tensor, Tensor, Tensor], call(*given))


def _is_plain(x: Tensor) -> bool:
    """True for a tensor of values: no subclass, fake, transform or mode that wants to see ops."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._get_tracing_state()
    )


class _Direct(torch.autograd.Function):
    """The op's two calls without torch.library around them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var, ctx.affine = forward(*inputs)
        keep(ctx, inputs, (y, mean, var))
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a second derivative is wanted, which the op has
            return backward(ctx, *given)
        dy = given[0]
        x, weight, bias, residual, _, _ = ctx.saved_tensors
        kept, _, name, slope, backend = ctx.rest
        x, view = dense(x, kept)
        act = Activation(name, slope)
        dx, dweight, dbias, dresidual = gradients(
            dy, x, view, weight, bias, residual, ctx.affine, ctx.from_batch, act, backend
        )
        if ctx.residual_dtype is not None and ctx.is_linear:
            dresidual = dy.to(ctx.residual_dtype)
        return (
            dx,
            None if weight is None else dweight,
            None if bias is None else dbias,
            None if ctx.residual_dtype is None else dresidual,
            *[None] * (2 + len(ctx.rest)),
        )
