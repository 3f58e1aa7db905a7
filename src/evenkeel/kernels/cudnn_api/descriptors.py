"""Tensor descriptors: how a tensor lies in memory, in cuDNN's terms.

Sizes are always in the order N, C, places; strides say how they lie. cuDNN's batch-norm calls take
four or five dimensions, so fewer are padded with ones at the end. It tells a layout by its strides,
so those of dimensions of size one, which mean nothing, are set as if the layout were packed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from ctypes import byref, c_int, c_void_p
from functools import lru_cache
from typing import NamedTuple

import torch

from .library import Library
from .values import ActivationMode, BatchNormMode, DataType

__all__ = [
    "TYPES",
    "Descriptor",
    "Layout",
    "channels_last",
    "derived",
    "derived_dtype",
    "packed",
    "relu",
    "tensor",
]

TYPES = {
    torch.float32: DataType.FLOAT,
    torch.float64: DataType.DOUBLE,
    torch.float16: DataType.HALF,
    torch.bfloat16: DataType.BFLOAT16,
}
_LEAST_RANK = 4


class Layout(NamedTuple):
    """Sizes in the order N, C, places, and strides in elements."""

    dims: tuple[int, ...]
    strides: tuple[int, ...]


def packed(dims: Sequence[int]) -> Layout:
    """NCHW without gaps, padded to four dimensions."""
    dims = (*dims, *[1] * (_LEAST_RANK - len(dims)))
    return Layout(dims, _strides(dims, range(len(dims))))


def channels_last(dims: Sequence[int]) -> Layout:
    """NHWC without gaps, padded to four dimensions."""
    dims = (*dims, *[1] * (_LEAST_RANK - len(dims)))
    return Layout(dims, _strides(dims, (0, *range(2, len(dims)), 1)))


def _strides(dims: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of memory without gaps, the slowest dimension first."""
    strides, step = [0] * len(dims), 1
    for d in reversed(order):
        strides[d] = step
        step *= dims[d]
    return tuple(strides)


def derived(mode: BatchNormMode, dims: Sequence[int]) -> Layout:
    """What cudnnDeriveBNTensorDescriptor gives: (1, C, 1, 1), or (1, C, H, W) per activation.

    It is packed NCHW whatever the layout of x.
    """
    if mode == BatchNormMode.PER_ACTIVATION:
        return packed((1, *dims[1:]))
    return packed((1, dims[1], *[1] * (len(dims) - 2)))


def derived_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of parameters and statistics: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Descriptor:
    """A descriptor of the C API, destroyed with this object."""

    def __init__(self, library: Library, kind: str) -> None:
        made = c_void_p()
        library.call(f"cudnnCreate{kind}Descriptor", byref(made))
        self.pointer = made.value
        end = weakref.finalize(self, library.call, f"cudnnDestroy{kind}Descriptor", made.value)
        end.atexit = False


class _Made(threading.local):
    """What this thread has made. A descriptor is never changed once it is set."""

    def __init__(self) -> None:
        self.tensor = lru_cache(maxsize=1024)(_tensor)
        self.relu = lru_cache(maxsize=8)(_relu)


def _tensor(library: Library, dtype: torch.dtype, layout: Layout) -> Descriptor:
    made = Descriptor(library, "Tensor")
    rank = len(layout.dims)
    sizes = (c_int * rank)(*layout.dims)
    strides = (c_int * rank)(*layout.strides)
    library.call(
        *("cudnnSetTensorNdDescriptor", made.pointer, TYPES[dtype], rank, sizes, strides),
        about=f"{dtype} {layout.dims} with strides {layout.strides}",
    )
    return made


def _relu(library: Library) -> Descriptor:
    made = Descriptor(library, "Activation")
    propagate_nan = 1
    library.call(
        *("cudnnSetActivationDescriptor", made.pointer, ActivationMode.RELU, propagate_nan, 0.0)
    )
    return made


_made = _Made()


def tensor(library: Library, dtype: torch.dtype, layout: Layout) -> Descriptor:
    """The descriptor of a tensor, the same object for the same layout while it is remembered."""
    return _made.tensor(library, dtype, layout)


def relu(library: Library) -> Descriptor:
    """The descriptor of ReLU, which lets NaN through as torch's does."""
    return _made.relu(library)
