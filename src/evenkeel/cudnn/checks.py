"""What is checked before a call: all that cuDNN refuses, and what it should and does not.

A message that ends in a CUDNN_STATUS is about something that cuDNN refuses by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError
from ..kernels.cudnn_api.calls import Blend, Call
from ..kernels.cudnn_api.descriptors import (
    TYPES,
    Layout,
    channels_last,
    derived,
    derived_dtype,
    packed,
)
from ..kernels.cudnn_api.values import MAX_SPAN, BatchNormMode, BatchNormOps
from .results import TensorDescriptor

__all__ = [
    "Data",
    "apart",
    "check_epsilon",
    "check_factor",
    "check_fused",
    "check_ops",
    "check_training",
    "derive_bn_tensor_descriptor",
    "destination",
    "examine",
    "like",
    "pair",
    "parameter",
]

_BAD = "cuDNN: CUDNN_STATUS_BAD_PARAM"
_UNCHECKED = "cuDNN does not check this"


@dataclass(frozen=True)
class Data:
    """x as a call takes it: without gaps, and how it lies with four dimensions or five."""

    mode: BatchNormMode
    x: Tensor
    layout: Layout

    @property
    def call(self) -> Call:
        """A call of cuDNN's on it."""
        return Call(self.mode, self.x, self.layout)

    @property
    def parameters(self) -> Layout:
        """The shape of scale, bias, mean and variance."""
        return derived(self.mode, self.layout.dims)

    @property
    def count(self) -> int:
        """How many values share one mean and variance: m."""
        owners = 1
        for size in self.parameters.dims:
            owners *= size
        return self.x.numel() // owners


def derive_bn_tensor_descriptor(x: Tensor, mode: BatchNormMode) -> TensorDescriptor:
    """cudnnDeriveBNTensorDescriptor: what scale, bias and all statistics of x look like.

    (1, C, 1, 1) for SPATIAL and SPATIAL_PERSISTENT, (1, C, H, W) for PER_ACTIVATION, with one
    dimension more for x of five. float64 if x is, else float32. It is packed as NCHW even where x
    is channels_last. An x of two or three dimensions, which cuDNN's other calls refuse, is taken
    as (N, C, 1, 1) or (N, C, L, 1).

    Raises:
        ShapeError, ConfigError: x or the mode is nothing that cuDNN's batch norm takes.
    """
    data = examine(mode, x)
    return TensorDescriptor(*data.parameters, derived_dtype(x.dtype))


def examine(mode: BatchNormMode, x: Tensor) -> Data:
    """x and the mode, or an error."""
    try:
        mode = BatchNormMode(mode)
    except ValueError:
        names = ", ".join(f"{m.name} ({m.value})" for m in BatchNormMode)
        raise ConfigError(f"there is no mode {mode!r}; choose one of {names}; {_BAD}") from None
    if not isinstance(x, Tensor):
        raise ShapeError(f"x is a {type(x).__name__}, not a tensor; use torch.as_tensor(x)")
    shape = tuple(x.shape)
    if x.dtype not in TYPES:
        raise ShapeError(
            f"x is {x.dtype}; cuDNN's batch norm takes float16, bfloat16, float32 and float64; "
            "use x.float()"
        )
    if not 2 <= x.dim() <= 5:
        raise ShapeError(
            f"x must be (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W) but is {shape}; {_BAD}"
        )
    if x.numel() == 0:
        raise ShapeError(f"x of {shape} is empty, and a descriptor takes no size of 0; {_BAD}")
    if x.numel() > MAX_SPAN:
        raise ShapeError(
            f"x of {shape} has 2^31 elements or more; cuDNN: CUDNN_STATUS_NOT_SUPPORTED; split it"
        )
    layouts = [packed(shape), channels_last(shape)]
    if mode == BatchNormMode.SPATIAL_PERSISTENT:
        layouts.reverse()  # without places x lies in both, and this mode prefers the second
    for layout in layouts:
        if _lies(x, layout):
            return Data(mode, x, layout)
    return Data(mode, x.contiguous(), packed(shape))


def _lies(t: Tensor, layout: Layout) -> bool:
    """True if ``t`` lies so; the stride of a dimension of size one means nothing."""
    own = zip(t.shape, t.stride(), layout.strides, strict=False)
    return all(size == 1 or stride == wanted for size, stride, wanted in own)


def check_epsilon(epsilon: float) -> None:
    """0 or more: CUDNN_BN_MIN_EPSILON is 0.0."""
    if not epsilon >= 0:
        raise ConfigError(f"epsilon must be 0 or more but is {epsilon}; {_BAD}")


def check_factor(factor: float) -> None:
    """Within [0, 1]."""
    if not 0 <= factor <= 1:
        raise ConfigError(
            f"exponential_average_factor is the weight of the new value, from 0 to 1, but is "
            f"{factor}; {_UNCHECKED}"
        )


def check_training(data: Data) -> None:
    """More than one value for each mean."""
    if data.count == 1:
        raise ShapeError(
            f"{data.mode.name} on {tuple(data.x.shape)} has one value for each mean: a variance "
            f"of 0 and a running variance of 0/0; {_UNCHECKED}; use a larger batch, or inference"
        )


def check_ops(ops: BatchNormOps, blends: Mapping[str, Blend]) -> BatchNormOps:
    """The operation of an Ex call; an activation and a blend do not go together."""
    try:
        ops = BatchNormOps(ops)
    except ValueError:
        names = ", ".join(f"{m.name} ({m.value})" for m in BatchNormOps)
        raise ConfigError(f"there is no bn_ops {ops!r}; choose one of {names}; {_BAD}") from None
    for name, blend in blends.items():
        if ops != BatchNormOps.BN and blend != Blend():
            raise ConfigError(
                f"{ops.name} with {name} of {tuple(blend)}: what cuDNN does there is not known; "
                "use 1 and 0, or BN alone"
            )
    return ops


def check_fused(ops: BatchNormOps, data: Data) -> None:
    """What cuDNN 9.28 refuses before it looks at the device: it was seen without one."""
    is_last = data.layout == channels_last(data.layout.dims)
    if ops != BatchNormOps.BN and not (is_last and data.mode == BatchNormMode.SPATIAL_PERSISTENT):
        raise ConfigError(
            f"{ops.name} is for SPATIAL_PERSISTENT on NHWC memory, not for {data.mode.name} on "
            f"{'NHWC' if is_last else 'NCHW'}; cuDNN: CUDNN_STATUS_NOT_SUPPORTED; use channels_last"
        )


def like(name: str, t: Tensor | None, data: Data) -> Tensor:
    """Data that is read: like x in size, dtype and device; copied if it lies otherwise."""
    t = _same(name, t, data)
    return t if _lies(t, data.layout) else torch.empty_like(data.x).copy_(t)


def destination(name: str, t: Tensor | None, data: Data, blend: Blend) -> Tensor:
    """Data that is written: given, or made if nothing is to be read from it."""
    if t is None:
        _check_given(name, blend)
        return torch.empty_like(data.x)
    if not _lies(_same(name, t, data), data.layout):
        raise ShapeError(
            f"{name} must lie in memory as x does, with strides {tuple(data.x.stride())}, but has "
            f"{tuple(t.stride())}"
        )
    return t


def _check_given(name: str, blend: Blend) -> None:
    if blend.beta != 0:
        raise ShapeError(f"beta of {blend.beta} takes the prior value of {name}, so pass {name}")


def _same(name: str, t: Tensor | None, data: Data) -> Tensor:
    if t is None:
        raise ShapeError(f"{name} is missing; {_BAD}")
    wanted = (tuple(data.x.shape), data.x.dtype, data.x.device)
    if (tuple(t.shape), t.dtype, t.device) != wanted:
        raise ShapeError(
            f"{name} must be like x, {wanted[0]} {wanted[1]} on {wanted[2]}, but is "
            f"{tuple(t.shape)} {t.dtype} on {t.device}; {_BAD}"
        )
    return t


def parameter(
    name: str,
    t: Tensor | None,
    data: Data,
    *,
    blend: Blend | None = None,
    form: Tensor | None = None,
) -> Tensor:
    """A vector of one value for each mean, of the derived shape or of that without its ones.

    With ``blend`` and ``form`` it is made in the form of another one if it is not given.
    """
    if t is None and blend is not None and form is not None:
        _check_given(name, blend)
        return torch.empty_like(form)
    if t is None:
        raise ShapeError(f"{name} is missing; {_BAD}")
    dims, dtype = data.parameters.dims, derived_dtype(data.x.dtype)
    owners = [size for size in dims if size != 1]
    if [size for size in t.shape if size != 1] != owners and tuple(t.shape) != (t.numel(),):
        fits = False
    else:
        fits = t.numel() == data.x.numel() // data.count
    if not fits:
        raise ShapeError(
            f"{name} of {tuple(t.shape)} does not fit {data.mode.name} on {tuple(data.x.shape)}, "
            f"which wants {dims}; cuDNN sees an address only, and would read and write beyond"
        )
    if t.dtype != dtype:
        raise ShapeError(f"{name} must be {dtype} for x of {data.x.dtype} but is {t.dtype}; {_BAD}")
    if t.device != data.x.device or not t.is_contiguous():
        raise ShapeError(f"{name} must be contiguous and on {data.x.device}; {_UNCHECKED}")
    return t


def pair(
    names: tuple[str, str], given: tuple[Tensor | None, Tensor | None], data: Data, refused: bool
) -> tuple[Tensor, Tensor] | None:
    """Two vectors, or neither. ``refused`` says that cuDNN itself refuses one alone."""
    one, two = given
    if one is None and two is None:
        return None
    if one is None or two is None:
        end = _BAD if refused else f"the manual says BAD_PARAM, but {_UNCHECKED}"
        raise ShapeError(f"{names[0]} and {names[1]} go together: pass both or neither; {end}")
    return parameter(names[0], one, data), parameter(names[1], two, data)


def apart(written: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]) -> None:
    """What is written shares no memory with anything else."""
    outs = {name: _span(t) for name, t in written.items() if t is not None}
    ins = {name: _span(t) for name, t in read.items() if t is not None}
    for name, (start, stop) in outs.items():
        for other, (first, last) in {**ins, **outs}.items():
            if other != name and start < last and first < stop:
                raise ShapeError(
                    f"{name} shares memory with {other}; whether cuDNN may work in place is not "
                    "known, so give it memory of its own"
                )


def _span(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()
