"""What comes behind a packed convolution: sum and activation, written over its output.

With our kernels both are one reading and writing of the output, for that is what is left of a batch
norm whose mean is 0 and variance 1; without them torch's operations one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.contract import Activation
from ..kernels.native import ACTS, MAP, TYPES, Native
from ..kernels.select import choose, load
from ..view import view_of

__all__ = ["Tail", "by_torch", "kernels_for", "tail"]

Tail = Callable[[Tensor, Tensor | None], Tensor]
"""An output and what is added to it, or None, to the output written over."""


def tail(act: Activation, shape: tuple[int, ...]) -> Tail:
    """What is done behind a convolution: ``act(y + residual)``.

    Args:
        act: the activation.
        shape: of the outputs (n, c, h, w), which are dense and channels last in memory.
    """
    module = kernels_for(shape)
    return by_torch(act) if module is None else _by_kernel(module, act, shape)


def by_torch(act: Activation) -> Tail:
    """The same by torch's operations, for outputs in any order in memory."""
    finish = _IN_PLACE[act.name]
    if act.name == "leaky_relu":
        finish = partial(F.leaky_relu_, negative_slope=act.slope)

    def run(y: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            y = y.add_(residual) if residual.shape == y.shape else y + residual
        return y if finish is None else finish(y)

    return run


def _by_kernel(module: Any, act: Activation, shape: tuple[int, ...]) -> Tail:
    plain = by_torch(act)
    images, channels, height, width = shape
    identity = torch.ones(3, channels, dtype=torch.float64, device="cpu")
    identity[0] = 0.0  # a mean of 0, and 1 / deviation
    view = (1, images * height * width, channels, 1, TYPES[torch.float32])
    what = (*view, ACTS[act.name], act.slope, MAP)

    def run(y: Tensor, residual: Tensor | None) -> Tensor:
        if residual is None:
            return plain(y, None)
        if residual.shape != y.shape:
            return plain(y, residual)
        if residual.stride() != y.stride():
            residual = torch.empty_like(y).copy_(residual)
        here = y.data_ptr()
        module.forward(
            *what, torch.get_num_threads(), 0.0, here, residual.data_ptr(), here, 0,
            0, 0, True, identity.data_ptr(), 0, 0, False, 0.0,
        )  # fmt: skip
        return y

    return run


_IN_PLACE: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "relu": torch.relu_,
    "relu6": partial(F.relu6, inplace=True),
    "silu": partial(F.silu, inplace=True),
    "leaky_relu": F.leaky_relu_,
}


@lru_cache(maxsize=1024)
def kernels_for(shape: tuple[int, ...]) -> Any:
    """The module of our kernels, if they are there and for such outputs."""
    _, c, h, w = shape
    view = view_of(torch.Size(shape), (c * h * w, 1, c * w, c), (1,))
    if view is None or choose("auto", view, torch.float32, torch.device("cpu")).name != "native":
        return None
    native = load("native")
    assert isinstance(native, Native)  # noqa: S101 - it is chosen before
    return native.module
