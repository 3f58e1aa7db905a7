"""Convolutions for inference on a CPU, their weights in the order in which oneDNN reads them.

Torch's own convolution reorders the weight at every call, and computes small batches without
oneDNN. Here the weight is reordered once and kept, and the activation is taken in where the kernel
has it with torch's handling of NaN. All else is the ordinary convolution: state dict, pickle, copy,
export, training and other devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..direct import PLAIN, is_plain
from ..functional import activation_of
from ..kernels.reference import activate

__all__ = ["Activation", "PackedConv2d", "pack_module", "unpacked"]

Activation = str | tuple[str, float] | None
"""As of `evenkeel.batch_norm`: 'relu', 'relu6', 'silu', 'leaky_relu' or that with its slope."""

SMALL = 10**6
"""Up to so many products torch's own convolution is faster: a call of oneDNN's takes 60 us more."""

DENSE = 12 * 10**6
"""Up to so many products of a 1x1 convolution a dense product is faster than oneDNN's convolution,
by half where it is small; measured on AVX2, one and two threads."""

PROBED = 16
"""How many values of a weight are compared at every call: ``weight.data.copy_(...)`` leaves no
trace in the version of a tensor, so that a few values are all there is to see it by."""

_OPS = ("_convolution_pointwise", "_reorder_convolution_weight")
_HAS_OPS = all(hasattr(torch.ops.mkldnn, name) for name in _OPS)
_convolution_pointwise: Any = torch.ops.mkldnn._convolution_pointwise.default if _HAS_OPS else None


class _Packed(NamedTuple):
    """How inputs of a shape are computed, and what that was decided from.

    ``weight`` is the reordered one, ``matrix`` the weight itself for a dense product; without both
    torch's convolution is taken.
    """

    key: tuple[Any, ...]
    source: Tensor
    finish: Callable[[Tensor], Tensor] | None
    matrix: Tensor | None = None
    weight: Tensor | None = None
    padding: tuple[int, ...] = ()
    attribute: str = "none"
    scalars: tuple[float, ...] = ()
    probe: Tensor | None = None
    values: Tensor | None = None


class PackedConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with an activation: ``y = act(conv(x))``, made by `pack_module`.

    The fast paths give a channels last output for any input; torch's gives torch's layout. They are
    taken for float32 on the CPU where nothing records gradients or operations. A weight that is
    written over is reordered again at the next call.
    """

    activation: Activation = None
    _packed: _Packed | None = None

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if not _applies(input, weight, bias):
            return activate(super().forward(input), activation_of(self.activation))
        packed = self._renewed(input, weight)
        if packed.weight is not None:
            y: Tensor = _convolution_pointwise(
                input, packed.weight, bias, packed.padding, self.stride, self.dilation,
                self.groups, packed.attribute, packed.scalars, "",
            )  # fmt: skip
        elif packed.matrix is not None:  # a 1x1 convolution is the product of pixels and weight
            x = input.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
            if self.stride != (1, 1):
                x = x[:, :: self.stride[0], :: self.stride[1]]
            y = F.linear(x, packed.matrix, bias).permute(0, 3, 1, 2)
        else:
            y = super().forward(input)
        return y if packed.finish is None else packed.finish(y)

    def extra_repr(self) -> str:
        own: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return own if self.activation is None else f"{own}, activation={self.activation!r}"

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_packed", None)
        return state

    def _renewed(self, x: Tensor, weight: Any) -> _Packed:
        """What holds for inputs of this shape and this weight; decided now if nothing does."""
        key = (
            x.shape, weight._version, weight.data_ptr(), self.stride, self.padding, self.dilation,
            self.groups, self.padding_mode, self.activation,
        )  # fmt: skip
        old = self._packed
        if old is not None and old.source is weight and old.key == key and _is_current(old):
            return old
        self._packed = made = self._made(x, weight, key)
        return made

    @torch.inference_mode(False)
    @torch.no_grad()
    def _made(self, x: Tensor, weight: Tensor, key: tuple[Any, ...]) -> _Packed:
        act, padding, own = activation_of(self.activation), self._padding(), weight.detach()
        finish = _FINISH[act.name]
        if act.name == "leaky_relu":
            finish = partial(F.leaky_relu_, negative_slope=act.slope)
        if padding is None or not self._fits(x, padding):
            return _Packed(key, weight, finish)
        products = self._products(x, padding)
        if self.groups == 1 and weight.shape[2:] == (1, 1) and not any(padding):
            matrix = own.flatten(1)
            if products <= DENSE and matrix.data_ptr() == own.data_ptr():
                return _Packed(key, weight, finish, matrix)
        if self.groups == 1 and products <= SMALL:
            return _Packed(key, weight, finish)
        flat = own.as_strided((own.numel(),), (1,)) if _fills(own) else own.flatten()
        probe = flat[:: max(1, flat.numel() // PROBED)]
        reordered = torch.ops.mkldnn._reorder_convolution_weight(
            own, padding, self.stride, self.dilation, self.groups, list(x.shape)
        )
        attribute = _ATTRIBUTES.get(act.name, "none")
        return _Packed(
            key, weight, finish if attribute == "none" else None, None, reordered, padding,
            attribute, (act.slope,) if attribute == "leaky_relu" else (), probe, probe.clone(),
        )  # fmt: skip

    def _padding(self) -> tuple[int, ...] | None:
        """The padding on both sides of each axis; None if it is not the same, or not zeros."""
        if self.padding_mode != "zeros":
            return None
        if not isinstance(self.padding, str):
            return self.padding
        if self.padding == "valid":
            return (0, 0)
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return None if any(r % 2 for r in reach) else tuple(r // 2 for r in reach)

    def _fits(self, x: Tensor, padding: tuple[int, ...]) -> bool:
        """False if torch is to say what is wrong, or the output is empty."""
        weight: Any = self._parameters["weight"]
        if x.dim() != 4 or not x.numel() or x.shape[1] != weight.shape[1] * self.groups:
            return False
        return min(self._sizes(x, padding)) > 0

    def _sizes(self, x: Tensor, padding: tuple[int, ...]) -> list[int]:
        """The height and width of the output."""
        weight: Any = self._parameters["weight"]
        sizes = zip(x.shape[2:], padding, self.dilation, weight.shape[2:], self.stride, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes]

    def _products(self, x: Tensor, padding: tuple[int, ...]) -> int:
        """How many products of two numbers the convolution is made of."""
        weight: Any = self._parameters["weight"]
        return int(weight.numel() * math.prod(self._sizes(x, padding)) * len(x))


_ATTRIBUTES = {"silu": "swish", "leaky_relu": "leaky_relu"}
"""oneDNN's names of the activations that its convolution computes as torch does. Its relu and clamp
give 0 for NaN, which would hide it."""

_FINISH: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "relu": torch.relu_,
    "relu6": partial(torch.clamp_, min=0.0, max=6.0),
    "silu": partial(F.silu, inplace=True),
    "leaky_relu": F.leaky_relu_,
}
"""The activation, written over what the convolution has just made."""


def pack_module(conv: nn.Conv2d, activation: Activation = None) -> None:
    """Makes a `PackedConv2d` of a convolution, in place.

    Raises:
        TypeError: it is a subclass, which may do more.
        ConfigError: there is no such activation.
    """
    if type(conv) is not nn.Conv2d:
        raise TypeError(f"got {type(conv).__name__}, and only torch.nn.Conv2d itself is packed")
    activation_of(activation)
    conv.__class__ = PackedConv2d
    conv.activation = activation  # type: ignore[assignment]


def unpacked(module: PackedConv2d) -> tuple[nn.Conv2d, nn.Module | None]:
    """The ordinary convolution, with the same parameters, and its activation as a module."""
    conv = nn.Conv2d.__new__(nn.Conv2d)
    state = {k: v for k, v in module.__getstate__().items() if k != "activation"}
    conv.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in state.items()})
    if module.activation is None:
        return conv, None
    act = activation_of(module.activation)
    made: dict[str, nn.Module] = {
        "relu": nn.ReLU(),
        "relu6": nn.ReLU6(),
        "silu": nn.SiLU(),
        "leaky_relu": nn.LeakyReLU(act.slope),
    }
    return conv, made.get(act.name, nn.Identity()).train(module.training)


def _applies(x: Any, weight: Any, bias: Any) -> bool:
    """True if the kernel may run: dense float32 on the CPU, and nobody follows what is done."""
    if torch.compiler.is_compiling() or not (_HAS_OPS and is_plain(x)):
        return False
    for t in (x, weight, bias):
        if t is not None and (
            t.dtype is not torch.float32 or t.layout is not torch.strided or not t.is_cpu
        ):
            return False
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return False
    return not (
        weight.is_inference()  # it has no version
        or not torch._C._get_mkldnn_enabled()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or type(weight) not in PLAIN
    )


def _is_current(packed: _Packed) -> bool:
    """False if the values that were noted have changed."""
    probe, values = packed.probe, packed.values
    return probe is None or values is None or torch.equal(probe, values)


def _fills(t: Tensor) -> bool:
    """True if the tensor's memory is dense in the order of some axes."""
    return t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)
