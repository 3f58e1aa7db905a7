"""The calls of the C API, one function each, on torch tensors of one CUDA device.

Nothing is checked here and nothing copied: the layouts must be those that the tensors have,
parameters and statistics contiguous and in `derived_dtype`. All memory is allocated by torch on the
current stream, on which the call is put too, so what is freed behind a call is safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_double, c_float, c_size_t
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from .descriptors import Descriptor, Layout, derived, derived_dtype, relu, tensor
from .handles import ready
from .library import library
from .values import BatchNormMode, BatchNormOps

__all__ = [
    "OVER",
    "Blend",
    "Call",
    "Pair",
    "backward",
    "backward_ex",
    "backward_workspace",
    "forward_inference",
    "forward_training",
    "forward_training_ex",
    "forward_workspace",
    "reserve_size",
]


class Blend(NamedTuple):
    """``alpha * result + beta * prior``; with beta 0 the destination is not read."""

    alpha: float = 1.0
    beta: float = 0.0


OVER: Final = Blend()


class Pair(NamedTuple):
    """A mean with a variance, or with an inverse standard deviation: both or neither."""

    mean: Tensor | None = None
    second: Tensor | None = None


_NO_PAIR: Final = Pair()


class Call:
    """What the arguments of all calls have in common, and the call itself.

    Args:
        mode: which values share a statistic.
        x: the data; all other data has its dtype.
        layout: how x lies.
    """

    def __init__(self, mode: BatchNormMode, x: Tensor, layout: Layout) -> None:
        self.library = library()
        self.mode = mode
        self.device, self.dtype = x.device, x.dtype
        self.layout = layout
        # Descriptors are kept here while the call runs, for the cache may drop them.
        self.x = self.data(layout)
        self.parameters = tensor(self.library, derived_dtype(x.dtype), derived(mode, layout.dims))

    def data(self, layout: Layout) -> Descriptor:
        """The descriptor of data that lies so."""
        return tensor(self.library, self.dtype, layout)

    def at(self, t: Tensor | None) -> tuple[int | None, int | None]:
        """Data that lies as x does: its descriptor and its address, or twice NULL."""
        return (None, None) if t is None else (self.x.pointer, t.data_ptr())

    def blend(self, blend: Blend) -> tuple[Any, Any]:
        """Two scalars on the host: doubles for double data, floats for all else."""
        scalar = c_double if self.dtype == torch.float64 else c_float
        return byref(scalar(blend.alpha)), byref(scalar(blend.beta))

    def run(self, name: str, *arguments: Any) -> None:
        """Calls the function on this thread's handle and torch's stream."""
        about = (
            f"{self.mode.name}, {str(self.dtype).removeprefix('torch.')} {self.layout.dims} with "
            f"strides {self.layout.strides} on {self.device}"
        )
        with ready(self.library, self.device) as handle:
            self.library.call(name, handle, *arguments, about=about)

    def size(self, name: str, *arguments: Any) -> int:
        """Calls a function whose last argument takes a number of bytes."""
        size = c_size_t()
        self.run(name, *arguments, byref(size))
        return size.value


def forward_training(
    call: Call,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    epsilon: float,
    blend: Blend = OVER,
    factor: float = 0.0,
    running: Pair = _NO_PAIR,
    saved: Pair = _NO_PAIR,
) -> None:
    """cudnnBatchNormalizationForwardTraining; y lies as x does."""
    call.run(
        *("cudnnBatchNormalizationForwardTraining", call.mode, *call.blend(blend)),
        *(*call.at(x), *call.at(y)),
        *(call.parameters.pointer, scale.data_ptr(), bias.data_ptr()),
        *(factor, *_addresses(running), epsilon, *_addresses(saved)),
    )


def forward_inference(
    call: Call,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float,
    blend: Blend = OVER,
) -> None:
    """cudnnBatchNormalizationForwardInference; y lies as x does."""
    call.run(
        *("cudnnBatchNormalizationForwardInference", call.mode, *call.blend(blend)),
        *(*call.at(x), *call.at(y)),
        *(call.parameters.pointer, scale.data_ptr(), bias.data_ptr()),
        *(mean.data_ptr(), variance.data_ptr(), epsilon),
    )


def backward(
    call: Call,
    x: Tensor,
    dy: Tensor,
    dx: Tensor,
    scale: Tensor,
    d_scale: Tensor,
    d_bias: Tensor,
    *,
    epsilon: float,
    data: Blend = OVER,
    parameters: Blend = OVER,
    saved: Pair = _NO_PAIR,
) -> None:
    """cudnnBatchNormalizationBackward; dy and dx lie as x does."""
    call.run(
        *("cudnnBatchNormalizationBackward", call.mode),
        *(*call.blend(data), *call.blend(parameters)),
        *(*call.at(x), *call.at(dy)),
        *call.at(dx),
        *(call.parameters.pointer, scale.data_ptr(), d_scale.data_ptr(), d_bias.data_ptr()),
        *(epsilon, *_addresses(saved)),
    )


def forward_training_ex(
    call: Call,
    ops: BatchNormOps,
    x: Tensor,
    z: Tensor | None,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    epsilon: float,
    workspace: Tensor,
    reserve: Tensor,
    blend: Blend = OVER,
    factor: float = 0.0,
    running: Pair = _NO_PAIR,
    saved: Pair = _NO_PAIR,
) -> None:
    """cudnnBatchNormalizationForwardTrainingEx; z and y lie as x does."""
    call.run(
        *("cudnnBatchNormalizationForwardTrainingEx", call.mode, ops, *call.blend(blend)),
        *(*call.at(x), *call.at(z)),
        *call.at(y),
        *(call.parameters.pointer, scale.data_ptr(), bias.data_ptr()),
        *(factor, *_addresses(running), epsilon, *_addresses(saved)),
        *(_activation(call, ops), *_room(workspace), *_room(reserve)),
    )


def backward_ex(
    call: Call,
    ops: BatchNormOps,
    x: Tensor,
    y: Tensor | None,
    dy: Tensor,
    dz: Tensor | None,
    dx: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    d_scale: Tensor,
    d_bias: Tensor,
    *,
    epsilon: float,
    workspace: Tensor,
    reserve: Tensor,
    data: Blend = OVER,
    parameters: Blend = OVER,
    saved: Pair = _NO_PAIR,
) -> None:
    """cudnnBatchNormalizationBackwardEx; all data lies as x does."""
    call.run(
        *("cudnnBatchNormalizationBackwardEx", call.mode, ops),
        *(*call.blend(data), *call.blend(parameters)),
        *(*call.at(x), *call.at(y), *call.at(dy)),
        *(*call.at(dz), *call.at(dx)),
        *(call.parameters.pointer, scale.data_ptr(), _address(bias)),
        *(d_scale.data_ptr(), d_bias.data_ptr(), epsilon, *_addresses(saved)),
        *(_activation(call, ops), *_room(workspace), *_room(reserve)),
    )


def forward_workspace(call: Call, ops: BatchNormOps) -> int:
    """cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize, in bytes."""
    z = call.x.pointer if ops == BatchNormOps.BN_ADD_ACTIVATION else None
    return call.size(
        *("cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize", call.mode, ops),
        *(call.x.pointer, z, call.x.pointer, call.parameters.pointer, _activation(call, ops)),
    )


def backward_workspace(call: Call, ops: BatchNormOps) -> int:
    """cudnnGetBatchNormalizationBackwardExWorkspaceSize, in bytes."""
    x = call.x.pointer
    y = None if ops == BatchNormOps.BN else x
    dz = x if ops == BatchNormOps.BN_ADD_ACTIVATION else None
    return call.size(
        *("cudnnGetBatchNormalizationBackwardExWorkspaceSize", call.mode, ops),
        *(x, y, x, dz, x, call.parameters.pointer, _activation(call, ops)),
    )


def reserve_size(call: Call, ops: BatchNormOps) -> int:
    """cudnnGetBatchNormalizationTrainingExReserveSpaceSize, in bytes."""
    return call.size(
        *("cudnnGetBatchNormalizationTrainingExReserveSpaceSize", call.mode, ops),
        *(_activation(call, ops), call.x.pointer),
    )


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _addresses(pair: Sequence[Tensor | None]) -> tuple[int | None, int | None]:
    mean, second = pair
    return _address(mean), _address(second)


def _room(memory: Tensor) -> tuple[int | None, int]:
    """Memory and its bytes; none is NULL and 0."""
    return (memory.data_ptr() or None, memory.numel() * memory.element_size())


def _activation(call: Call, ops: BatchNormOps) -> int | None:
    return None if ops == BatchNormOps.BN else relu(call.library).pointer
