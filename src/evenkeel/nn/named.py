"""Torch's batch-norm classes with evenkeel's arithmetic.

They are subclasses: the constructor, state dict, defaults and every ``isinstance`` of torch hold.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import SurgeryError
from ..functional import activation_of
from ..kernels.reference import activate
from ..pattern import parse
from .norm import forward_with_memory

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

_SPATIAL = parse("n c ... -> c")


class _Named:
    """What the three classes share::

        y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)

    ``activation`` is None, 'relu', 'leaky_relu', ('leaky_relu', slope), 'relu6' or 'silu', and
    ``backend`` who computes it: 'auto', or a name from `evenkeel.kernels.select.backends`. Both are
    settings and no arguments of the constructor, which is torch's; no state dict knows them.
    """

    activation: str | tuple[str, float] | None = None
    backend: str = "auto"

    def forward(self: Any, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        if residual is None or _alike(input, residual):
            return forward_with_memory(
                self, input, _SPATIAL, activation=self.activation, residual=residual
            )
        # A sum that broadcasts or promotes is torch's business: it means what it meant before.
        y = forward_with_memory(self, input, _SPATIAL) + residual
        return activate(y, activation_of(self.activation))

    @property
    def qconfig(self: Any) -> Any:
        """A setting of torch's quantization.

        Torch asks for it when it builds another norm in this one's place, SyncBatchNorm above all,
        and there an activation would be lost without a word.

        Raises:
            SurgeryError: the norm has an activation.
        """
        if "qconfig" not in vars(self) and self.activation is not None:
            raise SurgeryError(
                f"a {type(self).__name__} that also does {self.activation!r} cannot be converted; "
                "convert the network that evenkeel.restore makes of it, then accelerate"
            )
        try:
            return vars(self)["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        vars(self)["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        del vars(self)["qconfig"]

    def extra_repr(self) -> str:
        text = str(super().extra_repr())  # type: ignore[misc]
        text += f", activation={self.activation!r}" if self.activation else ""
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"


class BatchNorm1d(_Named, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on (n, c) or (n, c, l), computed by evenkeel.

    Set ``activation`` for a function of the result; ``forward`` takes a residual to add before it.
    Set ``backend`` for who computes it.
    """


class BatchNorm2d(_Named, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on (n, c, h, w), computed by evenkeel: cuDNN's SPATIAL mode.

    Set ``activation`` for a function of the result; ``forward`` takes a residual to add before it.
    Set ``backend`` for who computes it.
    """


class BatchNorm3d(_Named, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on (n, c, d, h, w), computed by evenkeel.

    Set ``activation`` for a function of the result; ``forward`` takes a residual to add before it.
    Set ``backend`` for who computes it.
    """


def _alike(x: Tensor, residual: Tensor) -> bool:
    """True if the sum with the residual has x's shape and dtype without any conversion."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )
