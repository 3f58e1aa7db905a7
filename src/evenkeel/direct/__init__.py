"""Batch norm by the shortest way there, past the op.

An op of torch.library can be compiled, exported and traced; but calling one costs more than three
times what torch's own batch norm costs on a small tensor. So plain tensors in eager mode go past
it, on the CPU to the native kernels and on a GPU to Triton's. What these ways do not take goes to
the op of `evenkeel.ops`, which computes the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import cpu
from .cpu import kernels as kernels
from .cpu import kind_of as kind_of
from .plain import PLAIN as PLAIN
from .plain import is_plain as is_plain

__all__ = ["PLAIN", "is_plain", "kernels", "kind_of", "way"]


def way(backend: str) -> Callable[..., Tensor | None] | None:
    """What takes a call to that backend, as `cpu.batch_norm`, or None if there is no short way."""
    if torch.compiler.is_compiling():
        return None
    if backend in ("auto", "native"):
        return cpu.batch_norm
    if backend == "triton":
        from . import gpu  # where it is asked for, for it loads Triton

        return gpu.batch_norm
    return None
