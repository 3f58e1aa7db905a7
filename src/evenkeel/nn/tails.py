"""What comes behind a packed convolution: bias, sum and activation, written over its output.

With our kernels it is one reading and writing of the output, for that is what is left of a batch
norm whose mean is 0 and variance 1; without them torch's operations one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.contract import Activation
from ..kernels.native import ACTS, MAP, TYPES, Native
from ..kernels.select import choose, load
from ..view import view_of

__all__ = ["Tail", "by_torch", "tail"]

Tail = Callable[[Tensor, Tensor | None], Tensor]
"""An output and what is added to it, or None, to the output written over."""


def tail(act: Activation, bias: Tensor | None, shape: Sequence[int]) -> Tail:
    """What is done behind a convolution: ``act(y + bias + residual)``.

    Args:
        act: the activation.
        bias: one value per channel, or None.
        shape: of the outputs (n, c, h, w), which are dense and channels last in memory.
    """
    module = _kernels(tuple(shape))
    if module is None or (bias is not None and not bias.is_contiguous()):
        return by_torch(act, bias)
    return _by_kernel(module, act, bias, shape)


def by_torch(act: Activation, bias: Tensor | None = None) -> Tail:
    """The same by torch's operations, for outputs in any order in memory."""
    finish = _IN_PLACE[act.name]
    if act.name == "leaky_relu":
        finish = partial(F.leaky_relu_, negative_slope=act.slope)

    def run(y: Tensor, residual: Tensor | None) -> Tensor:
        if bias is not None:
            y.add_(bias[:, None, None])
        if residual is not None:
            y = y.add_(residual) if residual.shape == y.shape else y + residual
        return y if finish is None else finish(y)

    return run


def _by_kernel(module: Any, act: Activation, bias: Tensor | None, shape: Sequence[int]) -> Tail:
    plain = by_torch(act, bias)
    images, channels, height, width = shape
    identity = torch.ones(3, channels, dtype=torch.float64)
    identity[0] = 0.0  # a mean of 0, and 1 / deviation
    view = (1, images * height * width, channels, 1, TYPES[torch.float32])
    what = (*view, ACTS[act.name], act.slope, MAP)

    def run(y: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None and residual.stride() != y.stride():
            if residual.shape != y.shape:
                return plain(y, residual)
            residual = torch.empty_like(y).copy_(residual)
        if residual is bias is None:
            return plain(y, None)
        here = y.data_ptr()
        added = 0 if residual is None else residual.data_ptr()
        shift = 0 if bias is None else bias.data_ptr()
        module.forward(
            *what, torch.get_num_threads(), 0.0, here, added, here, 0,
            0, shift, True, identity.data_ptr(), 0, 0, False, 0.0,
        )  # fmt: skip
        return y

    return run


_IN_PLACE: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "relu": torch.relu_,
    "relu6": partial(torch.clamp_, min=0.0, max=6.0),
    "silu": partial(F.silu, inplace=True),
    "leaky_relu": F.leaky_relu_,
}


@lru_cache(maxsize=1024)
def _kernels(shape: tuple[int, ...]) -> Any:
    """Our kernels, if they are there and for such outputs."""
    _, c, h, w = shape
    view = view_of(torch.Size(shape), (c * h * w, 1, c * w, c), (1,))
    if view is None or choose("auto", view, torch.float32, torch.device("cpu")).name != "native":
        return None
    native = load("native")
    assert isinstance(native, Native)  # noqa: S101 - it is chosen before
    return native.module
