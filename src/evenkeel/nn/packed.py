"""Convolutions for inference on a CPU, their weights in the order in which oneDNN reads them.

Torch's own convolution reorders the weight at every call, and computes small batches without
oneDNN. Here the weight is reordered once and kept, and what comes behind, a sum and an activation,
is done in the same call. All else is the ordinary convolution: state dict, pickle, copy, export,
training and other devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..direct import PLAIN, is_plain
from ..functional import activation_of
from ..kernels.reference import activate
from . import ways
from .ways import Way

__all__ = [
    "KINDS", "Activation", "Packed", "PackedConv2d", "PackedConvTranspose2d", "is_open",
    "pack_module", "unpacked",
]  # fmt: skip

Activation = str | tuple[str, float] | None
"""As of `evenkeel.batch_norm`: 'relu', 'relu6', 'silu', 'leaky_relu' or that with its slope."""

_SETTINGS = attrgetter(
    "stride", "padding", "output_padding", "dilation", "groups", "padding_mode", "activation"
)


class Packed(nn.Module):
    """What packed convolutions of both kinds have; see `PackedConv2d`."""

    activation: Activation = None
    _way: Way | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        own, adds = self._parameters, residual is not None
        is_whole = "weight" in own and "bias" in own  # else one is computed anew at every call
        if not (is_whole and _applies(input, own["weight"], own["bias"], residual)):
            y = super().forward(input)
            return activate(y + residual if adds else y, activation_of(self.activation))
        way = self._way
        if way is None or way.shape != input.shape or way.adds != adds or not self._keeps(way):
            self._way = way = self._found(input, adds)
        return way.run(input, residual)

    def is_current(self, way: Way) -> bool:
        """False if a way was found for other settings, or another weight or bias.

        The weight's values are not looked at.
        """
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        return weight is way.weight and bias is way.bias and self._key() == way.key

    def _keeps(self, way: Way) -> bool:
        same = way.probe is None or torch.equal(way.probe, way.values)
        return same and self.is_current(way)

    def _key(self) -> tuple[Any, ...]:
        weight: Any = self._parameters["weight"]
        bias = self._parameters["bias"]
        at = 0 if bias is None else bias.data_ptr()
        return (weight._version, weight.data_ptr(), at, _SETTINGS(self))

    def extra_repr(self) -> str:
        own: str = super().extra_repr()
        return own if self.activation is None else f"{own}, activation={self.activation!r}"

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_way", None)
        return state

    @torch.inference_mode(False)
    @torch.no_grad()
    def _found(self, x: Tensor, adds: bool) -> Way:
        """The way for inputs of this shape."""
        return ways.found(self, x, self._key(), super().forward, self._sizes(x), adds)

    def _sizes(self, x: Tensor) -> Sequence[int] | None:
        """The output's height and width; None if torch is to compute it, or say what is wrong."""
        raise NotImplementedError


class PackedConv2d(Packed, nn.Conv2d):
    """`torch.nn.Conv2d` and what is behind it: ``y = act(conv(x) + residual)``.

    Made by `pack_module`; ``residual`` may be left out. The fast ways give a channels last output
    for any input; torch's gives torch's layout. They are taken for float32 on the CPU where nothing
    records gradients or operations. A weight that is written over is reordered again at the next
    call; what goes past torch (``.data``, numpy) is seen if it changes one of sixteen values that
    are looked at, so pack again after pruning so.
    """

    def _sizes(self, x: Tensor) -> Sequence[int] | None:
        padding, shape = ways.padding_of(self), self.weight.shape
        if padding is None or x.dim() != 4 or x.shape[1] != shape[1] * self.groups:
            return None
        axes = zip(x.shape[2:], padding, self.dilation, shape[2:], self.stride, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in axes]


class PackedConvTranspose2d(Packed, nn.ConvTranspose2d):  # type: ignore[misc]
    """`torch.nn.ConvTranspose2d` with an activation, as `PackedConv2d`; without ``output_size``."""

    def _sizes(self, x: Tensor) -> Sequence[int] | None:
        if x.dim() != 4 or x.shape[1] != len(self.weight):
            return None
        each: Any = (x.shape[2:], self.stride, self.padding, self.output_padding, self.dilation)
        axes = list(zip(*each, self.weight.shape[2:], strict=True))
        if any(o >= max(s, d) for _, s, _, o, d, _ in axes):
            return None
        return [(n - 1) * s - 2 * p + o + d * (k - 1) + 1 for n, s, p, o, d, k in axes]


KINDS: dict[type[nn.Module], type[Packed]] = {
    nn.Conv2d: PackedConv2d,
    nn.ConvTranspose2d: PackedConvTranspose2d,
}
"""What can be packed, and what it becomes."""


def pack_module(conv: nn.Module, activation: Activation = None) -> None:
    """Makes a packed convolution of a convolution, in place.

    Raises:
        TypeError: it is none of `KINDS`, or a subclass, which may do more.
        ConfigError: there is no such activation.
    """
    kind = KINDS.get(type(conv))
    if kind is None:
        names = " and ".join(f"torch.nn.{one.__name__}" for one in KINDS)
        raise TypeError(f"got {type(conv).__name__}, and only {names} themselves are packed")
    activation_of(activation)
    conv.__class__ = kind
    conv.activation = activation  # type: ignore[assignment]


def unpacked(module: Packed) -> tuple[nn.Module, nn.Module | None]:
    """The ordinary convolution, with the same parameters, and its activation as a module."""
    kind = next(one for one, packed in KINDS.items() if type(module) is packed)
    conv = kind.__new__(kind)
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


def is_open(x: Any) -> bool:
    """True if a value may go to oneDNN's kernels, for nobody follows what is done with it."""
    return not torch.compiler.is_compiling() and (
        ways.HAS_OPS
        and is_plain(x)
        and x.is_cpu
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _applies(x: Any, weight: Any, *others: Any) -> bool:
    """True if a fast way may be taken: dense float32 on the CPU, and no gradient is recorded."""
    if not is_open(x):
        return False
    given = [x, weight, *(t for t in others if t is not None)]
    for t in given:
        if t.dtype is not torch.float32 or t.layout is not torch.strided or not t.is_cpu:
            return False
        if type(t) not in PLAIN:
            return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False
    return not weight.is_inference()  # which has no version
