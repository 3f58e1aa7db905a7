"""Batch norm by the shortest way there, past the op.

An op of torch.library can be compiled, exported and traced; but calling one costs more than three
times what torch's own batch norm costs on a small tensor. So plain tensors in eager mode go past
it, on the CPU to the native kernels and on a GPU to Triton's. What these ways do not take goes to
the op of `evenkeel.ops`, which computes the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.contract import Activation
from ..pattern import NormSpec
from . import cpu
from .cpu import kernels as kernels
from .cpu import kind_of as kind_of
from .plain import PLAIN as PLAIN
from .plain import is_plain as is_plain

__all__ = ["PLAIN", "batch_norm", "is_plain", "kernels", "kind_of"]


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
    backend: str = "auto",
) -> Tensor | None:
    """What `evenkeel.functional.normalize` computes, or None if this is not the way.

    Nothing is checked but that this way is open; of anything wrong the other way tells.
    """
    if torch.compiler.is_compiling():
        return None
    running = (running_mean, running_var, from_batch, momentum)
    if backend in ("auto", "native"):
        return cpu.batch_norm(x, spec, weight, bias, *running, eps, act, residual, inplace)
    if backend == "triton" and not inplace:
        from . import gpu  # where it is asked for, for it loads Triton

        return gpu.batch_norm(x, spec, weight, bias, *running, eps, act, residual)
    return None
