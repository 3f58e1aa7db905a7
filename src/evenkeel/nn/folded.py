"""What folding leaves in a network: a scale and shift, and convolutions that know their border."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..direct import PLAIN, is_plain, kernels, kind_of
from ..functional import activation_of, batch_norm
from ..kernels.native import ACTS, MAP
from ..kernels.reference import activate

__all__ = ["BORDERED", "ScaleShift"]


class ScaleShift(nn.Module):
    """All that is left of a batch norm in inference::

        y = act((x - center) * scale + shift + residual)

    The mean is subtracted first, for where it is far above the deviation nothing would be left of
    ``scale * x + t`` in single precision.

    Args:
        scale, shift, center: one value per channel, (c,); or of any shape that fits x, without its
            batch axis.
        activation: as of `evenkeel.batch_norm`.
    """

    scale: Tensor
    shift: Tensor
    center: Tensor

    def __init__(
        self,
        scale: Tensor,
        shift: Tensor,
        center: Tensor,
        activation: str | tuple[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.register_buffer("center", center)

    _plan: tuple[Any, ...] | None = None
    """For inputs of one shape, type and order in memory: those three, and what the kernel takes."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None and not torch.is_grad_enabled() and _is_unwatched(x):
            plan = self._plan
            if plan is None or plan[:3] != (x.shape, x.stride(), x.dtype):
                plan = self._plan = self._planned(x)
            y = self._by_kernel(x, plan)
            if y is not None:
                return y
        if self.scale.dim() == 1 and x.dim() > 1 and not _is_traced():
            return batch_norm(
                x, self.scale, self.shift, self.center, torch.ones_like(self.scale),
                training=False, eps=0.0, activation=self.activation, residual=residual,
            )  # fmt: skip
        rank = x.dim() - 2 if self.scale.dim() == 1 else 0
        scale, shift, center = (
            t.reshape(*t.shape, *[1] * rank) for t in (self.scale, self.shift, self.center)
        )
        y = ((x - center) * scale + shift).to(x.dtype)
        y = y if residual is None else y + residual
        return y if self.activation is None else activate(y, activation_of(self.activation))

    def _planned(self, x: Tensor) -> tuple[Any, ...]:
        """What the kernel takes, None where it is not the way."""
        act, kind = activation_of(self.activation), None
        if self.scale.dim() == 1 and x.dim() > 1 and x.shape[1] == len(self.scale):
            kind = kind_of(x)
        what = None if kind is None else (*kind, ACTS[act.name], act.slope, MAP)
        unit = torch.ones(x.shape[1] if what else 0)  # no buffer: nothing would fill it again
        return x.shape, x.stride(), x.dtype, self.activation, what, unit

    def _by_kernel(self, x: Tensor, plan: tuple[Any, ...]) -> Tensor | None:
        """The same in a third of the time that `evenkeel.batch_norm` takes to find its way."""
        own = self._buffers
        activation, what, unit = plan[3:]
        given: Any = own["scale"], own["shift"], own["center"], unit
        if what is None or self.activation is not activation:
            return None
        if not all(_is_vector(t, x.shape[1]) for t in given):
            return None
        scale, shift, center, ones = (t.data_ptr() for t in given)
        y = torch.empty_like(x)
        memory = torch.empty(3 * x.shape[1], dtype=torch.float64, device="cpu")
        kernels().forward(
            *what, torch.get_num_threads(), 0.0, x.data_ptr(), 0, y.data_ptr(), 0,
            scale, shift, True, memory.data_ptr(), center, ones, True, 0.0,
        )  # fmt: skip
        return y

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_plan", None)
        return state

    def extra_repr(self) -> str:
        shape = tuple(self.scale.shape)
        return f"{shape}, activation={self.activation!r}" if self.activation else str(shape)


class _Bordered:
    """A convolution with zero padding that a shift of its input was folded into.

    Padding is zero also where the input has a shift, so what the shift adds to an output depends on
    how much of its window is padding. ``border`` is the kernel summed over the input channels, each
    times its shift; convolved with a plane of ones it gives what is to be added, for any size. What
    the inner outputs get of it is in the bias already.
    """

    border: Tensor

    def forward(self: Any, x: Tensor, *sizes: Any) -> Tensor:
        y: Tensor = super().forward(x, *sizes)  # type: ignore[misc]
        ones = x.new_ones((1, 1, *x.shape[2:]))
        if self.transposed:
            convolve = _TRANSPOSED[x.dim() - 3]
            added = convolve(
                ones, self.border, None, self.stride, self.padding, self.output_padding, 1,
                self.dilation,
            )  # fmt: skip
            return y + added.to(y.dtype)
        added = _CONVS[x.dim() - 3](
            ones, self.border, None, self.stride, self.padding, self.dilation
        )
        inside = self.border.flatten(1).sum(1).reshape(-1, *[1] * (x.dim() - 2))
        added = (added - inside).to(y.dtype)
        return y + added if _is_traced() or y.requires_grad else _frame(y, added, x, self)


def _frame(y: Tensor, added: Tensor, x: Tensor, conv: Any) -> Tensor:
    """Adds to the outer outputs alone, in place: the inner ones would get zero."""
    inner = y
    for axis in range(2, y.dim()):
        at, stride = axis - 2, conv.stride[axis - 2]
        reach = conv.dilation[at] * (conv.kernel_size[at] - 1)
        if isinstance(conv.padding, str):
            before = reach // 2 if conv.padding == "same" else 0
        else:
            before = conv.padding[at]
        first = min(-(-before // stride), y.shape[axis])
        last = max(first, (x.shape[axis] - 1 - reach + before) // stride + 1)
        for start, end in ((0, first), (last, y.shape[axis])):
            if start < end:
                piece = added.narrow(axis, start, end - start)
                inner.narrow(axis, start, end - start).add_(piece)
        length = max(0, min(last, y.shape[axis]) - first)
        inner, added = (t.narrow(axis, first, length) for t in (inner, added))
    return y


_CONVS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class BorderedConv1d(_Bordered, nn.Conv1d):
    """`torch.nn.Conv1d` of a shifted input, padded with zeros that are not shifted."""


class BorderedConv2d(_Bordered, nn.Conv2d):
    """`torch.nn.Conv2d` of a shifted input, padded with zeros that are not shifted."""


class BorderedConv3d(_Bordered, nn.Conv3d):
    """`torch.nn.Conv3d` of a shifted input, padded with zeros that are not shifted."""


class BorderedConvTranspose1d(_Bordered, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` of an input with a shift."""


class BorderedConvTranspose2d(_Bordered, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` of an input with a shift."""


class BorderedConvTranspose3d(_Bordered, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` of an input with a shift."""


BORDERED: dict[Any, Any] = {
    nn.Conv1d: BorderedConv1d,
    nn.Conv2d: BorderedConv2d,
    nn.Conv3d: BorderedConv3d,
    nn.ConvTranspose1d: BorderedConvTranspose1d,
    nn.ConvTranspose2d: BorderedConvTranspose2d,
    nn.ConvTranspose3d: BorderedConvTranspose3d,
}
"""The class that knows its border, for each of torch's."""


def _is_unwatched(x: Any) -> bool:
    """True if nobody follows what is done with a value."""
    return not torch.compiler.is_compiling() and is_plain(x) and x.is_cpu


def _is_vector(t: Tensor, length: int) -> bool:
    fits = type(t) in PLAIN and t.shape == (length,) and t.dtype is torch.float32
    return fits and t.is_cpu and t.is_contiguous()


def _is_traced() -> bool:
    """True where torch's plain operations are wanted, which export, compile and have tangents."""
    is_traced = torch._C._get_tracing_state() is not None
    return is_traced or torch.compiler.is_compiling() or forward_ad._current_level >= 0
