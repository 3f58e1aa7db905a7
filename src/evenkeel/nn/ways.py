"""How a packed convolution computes inputs of one shape: which of four ways, and by what.

A weight in oneDNN's order, the product of two matrices for a convolution of one pixel, our own
kernel for a depthwise one, or torch's convolution where that is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import activation_of
from ..kernels.contract import Activation
from ..kernels.native import ACTS
from .tails import Tail, by_torch, kernels_for, tail

__all__ = ["HAS_OPS", "Way", "found", "padding_of"]

SMALL = 2 * 10**5
"""Up to so many products torch's own convolution is faster: a call of oneDNN's takes 60 us more.
Larger ones too, but their outputs are not channels last, which costs the next one as much."""

LARGE = 2**19
FEW = 256
"""A weight of so many values is in memory rather than in the cache; for fewer pixels than this its
product, which reads it twice, is slower than oneDNN's convolution. For all else it is faster: by a
tenth where the matrix is large, three times where it is small. Measured on AVX2."""

BEHIND = 17 * 10**5
"""With AVX-512 oneDNN is faster from so many products on, up to 2.2 times, if the processor is not
Intel's: MKL, which computes products of matrices, then goes without. Measured on AMD's Zen 5."""

PROBED = 16
"""How many values of a weight are compared at every call: ``weight.data.copy_(...)`` leaves no
trace in the version of a tensor, so that a few values are all there is to see it by."""

_OPS = (
    "_convolution_pointwise", "_reorder_convolution_weight",
    "_convolution_transpose_pointwise", "_reorder_convolution_transpose_weight",
)  # fmt: skip
HAS_OPS = all(hasattr(torch.ops.mkldnn, name) for name in _OPS)

NOTHING = Activation()

Run = Callable[[Tensor], Tensor]
RunWith = Callable[[Tensor, Tensor | None], Tensor]


class Way(NamedTuple):
    """How inputs of a shape are computed, and what that was decided from."""

    name: str
    """Reordered, product, depthwise or torch."""
    run: RunWith
    """Input and what is added before the activation, or None, to the output."""
    shape: torch.Size
    """The input's."""
    adds: bool
    """Whether something is added before the activation."""
    weight: Tensor
    bias: Tensor | None
    key: tuple[Any, ...]
    """What else it was decided from."""
    probe: Tensor | None = None
    """Some values of the weight as they are, and as they were."""
    values: Any = None


def found(
    conv: Any, x: Tensor, key: tuple[Any, ...], torchs: Run, sizes: Sequence[int] | None, adds: bool
) -> Way:
    """The way that is fastest for inputs of this shape.

    Args:
        conv: a packed convolution.
        x: an input.
        key: what is kept in the way for later comparison.
        torchs: torch's own convolution, without the activation.
        sizes: height and width of the output; None if only torch can compute it.
        adds: see `Way`.
    """
    act, weight, bias = activation_of(conv.activation), conv.weight, conv.bias
    kept = (x.shape, adds, weight, bias, key)
    if sizes is None or min(sizes) <= 0 or not x.numel():
        return Way("torch", _run(torchs, by_torch(act)), *kept)
    is_transposed = isinstance(conv, nn.ConvTranspose2d)
    shape = (len(x), conv.out_channels, *sizes)
    products = weight.numel() * math.prod(x.shape[2:] if is_transposed else sizes) * len(x)
    pixels, has_product = math.prod(shape) // shape[1], _has_product(conv)
    kernels = kernels_for(shape) if _is_depthwise(conv) else None
    behind = NOTHING if adds else act
    if kernels is not None:
        name, compute = "depthwise", _depthwise(kernels, conv, x.shape, shape, behind)
    elif has_product and (weight.numel() < LARGE or pixels >= FEW) and products <= _most(shape):
        name, compute, behind = "product", _product(conv, shape), NOTHING
    elif conv.groups == 1 and products <= SMALL:
        return Way("torch", _run(torchs, by_torch(act)), *kept)
    else:
        behind = behind if behind.name in _ATTRIBUTES else NOTHING
        name, compute = "reordered", _reordered(conv, x.shape, behind)
    finish = tail(act if behind is NOTHING else NOTHING, shape)
    own = weight.detach()
    flat = own.as_strided((own.numel(),), (1,)) if _fills(own) else own.flatten()
    probe = flat[:: max(1, flat.numel() // PROBED)]
    return Way(name, _run(compute, finish), *kept, probe, probe.clone())


def padding_of(conv: nn.Conv2d) -> tuple[int, ...] | None:
    """The padding on both sides of each axis; None if it is not the same, or not zeros."""
    if conv.padding_mode != "zeros":
        return None
    if not isinstance(conv.padding, str):
        return conv.padding
    if conv.padding == "valid":
        return (0, 0)
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(r % 2 for r in reach) else tuple(r // 2 for r in reach)


_ATTRIBUTES = {"silu": "swish", "leaky_relu": "leaky_relu"}
"""oneDNN's names of the activations that its convolution computes as torch does. Its relu and clamp
give 0 for NaN, which would hide it."""


def _run(compute: Run, finish: Tail) -> RunWith:
    return lambda x, residual: finish(compute(x), residual)


def _has_product(conv: nn.Module) -> bool:
    """True if each pixel is multiplied by one matrix."""
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
        return False
    return conv.weight.shape[2:] == (1, 1) and not any(padding_of(conv) or ())


def _most(shape: tuple[int, ...]) -> float:
    """Up to how many products a product of matrices is the way."""
    kernels = kernels_for(shape)
    has_both = kernels is not None and kernels.instructions() == "avx512"
    return BEHIND if has_both and not kernels.is_intels() else math.inf


def _is_depthwise(conv: nn.Module) -> bool:
    """True if each channel is computed from one, and that the kernels can."""
    if not isinstance(conv, nn.Conv2d) or not 1 < conv.groups == conv.out_channels:
        return False
    is_dense = conv.bias is None or conv.bias.is_contiguous()
    return conv.in_channels == conv.groups and is_dense


def _depthwise(
    kernels: Any, conv: nn.Conv2d, given: torch.Size, shape: tuple[int, ...], act: Activation
) -> Run:
    """A depthwise convolution by our own kernel, with what is behind it.

    oneDNN's call takes 0.1 ms longer, which is more than most of these compute.
    """
    weight, bias = conv.weight.detach().flatten(1).t().contiguous(), conv.bias
    strides = _channels_last(shape)
    what = (
        *shape[:2], given[2:], shape[2:], conv.weight.shape[2:], conv.stride,
        padding_of(conv), conv.dilation, ACTS[act.name], act.slope,
    )  # fmt: skip

    def run(x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        y = torch.empty_strided(shape, strides)
        at = 0 if bias is None else bias.data_ptr()
        kernels.depthwise(
            *what, torch.get_num_threads(), x.data_ptr(), weight.data_ptr(), at, y.data_ptr()
        )
        return y

    return run


def _product(conv: nn.Conv2d, shape: tuple[int, ...]) -> Run:
    """A 1x1 convolution as the product of pixels and weight.

    The weight is kept turned: MKL's products with it as it lies take a tenth longer.
    """
    matrix, bias = conv.weight.detach().flatten(1).t().contiguous().t(), conv.bias
    (down, right), (outputs, inputs) = conv.stride, matrix.shape
    rows, strides = math.prod(shape) // outputs, _channels_last(shape)

    def run(x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if down != 1 or right != 1:
            x = x[:, ::down, ::right]
        return F.linear(x.reshape(rows, inputs), matrix, bias).as_strided(shape, strides)

    return run


def _reordered(conv: Any, shape: torch.Size, act: Activation) -> Run:
    """A convolution by a weight in oneDNN's order, which depends on the input's shape."""
    scalars = (act.slope,) if act.name == "leaky_relu" else ()
    ops: Any = torch.ops.mkldnn
    if isinstance(conv, nn.ConvTranspose2d):
        reorder, function = (
            ops._reorder_convolution_transpose_weight,
            ops._convolution_transpose_pointwise.default,
        )
        places: tuple[Any, ...] = (conv.padding, conv.output_padding)
    else:
        reorder, function = ops._reorder_convolution_weight, ops._convolution_pointwise.default
        places = (padding_of(conv),)
    settings = (*places, conv.stride, conv.dilation, conv.groups)
    weight = reorder(conv.weight.detach(), *settings, list(shape))
    rest = (weight, conv.bias, *settings, _ATTRIBUTES.get(act.name, "none"), scalars, "")
    return lambda x: function(x, *rest)


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of (n, c, h, w)."""
    _, channels, height, width = shape
    return (height * width * channels, 1, width * channels, channels)


def _fills(t: Tensor) -> bool:
    """True if the tensor's memory is dense in the order of some axes."""
    return t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)
