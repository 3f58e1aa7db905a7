"""What a backend must do: five verbs on dense tensors seen through a `View`.

All vectors (mean, invstd, weight, bias, the two sums) come in memory order with the shape
``view.kept_sizes`` and in the accumulation dtype of the input's device. All tensors (x, dy,
residual) have one layout, the one the view was made from. Checks are done before; kernels assume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..view import View

__all__ = [
    "Activation",
    "Affine",
    "Backend",
    "Composite",
    "Moments",
    "Sums",
    "accumulation_dtype",
]


class Moments(NamedTuple):
    """How many values, their mean and sum of squared deviations, per owner.

    The biased variance is ``m2 / n``, the unbiased one ``m2 / (n - 1)``.
    """

    n: int
    mean: Tensor
    m2: Tensor


class Affine(NamedTuple):
    """What turns x into the value before the activation: ``(x - mean) * invstd * weight + bias``.

    ``weight`` None means one, ``bias`` None means zero. ``invstd`` is ``1 / sqrt(var + eps)``.
    """

    mean: Tensor
    invstd: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


class Activation(NamedTuple):
    """The function after the norm and the residual add; ``slope`` is leaky_relu's."""

    name: str = "none"
    slope: float = 0.0

    @property
    def has_bit(self) -> bool:
        """True if one bit for each value decides its gradient: dy, or one other multiple of it."""
        return self.name in ("relu", "leaky_relu", "relu6")


class Sums(NamedTuple):
    """Per owner, ``dz`` being the gradient before the activation: sum(dz) and sum(dz * xhat)."""

    dz: Tensor
    dz_xhat: Tensor


class Backend(Protocol):
    """The five verbs, and the two calls that are made of them (see `Composite`)."""

    name: str

    def refuses(self, view: View, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this backend cannot run such a call, or None if it can."""
        ...

    def stats(self, x: Tensor, view: View) -> Moments:
        """Exact two-pass moments of each owner; never E[x^2] - E[x]^2."""
        ...

    def merge(self, parts: Sequence[Moments]) -> Moments:
        """Moments of the union of the parts (Chan et al. 1979), merged in the given order."""
        ...

    def apply(
        self, x: Tensor, view: View, affine: Affine, act: Activation, residual: Tensor | None
    ) -> Tensor:
        """``act((x - mean) * invstd * weight + bias + residual)`` in x's dtype and layout."""
        ...

    def backward_reduce(
        self,
        dy: Tensor,
        x: Tensor,
        view: View,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
    ) -> Sums:
        """The two sums that give dbias, dweight and, in training, the correction of dx."""
        ...

    def backward_dx(
        self,
        dy: Tensor,
        x: Tensor,
        view: View,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
        sums: Sums | None,
    ) -> tuple[Tensor, Tensor | None]:
        """dx, and d_residual where there is a residual.

        ``dx = weight * invstd * (dz - (sum(dz) + xhat * sum(dz * xhat)) / count)`` when ``sums``
        are given: the statistics came from x (the paper's section 3). Without them the statistics
        were constants, as in inference, and ``dx = weight * invstd * dz``.
        """
        ...

    def forward_training(
        self,
        x: Tensor,
        view: View,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        act: Activation,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, and the mean and biased variance that it was normalized with."""
        ...

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        view: View,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
        from_batch: bool,
    ) -> tuple[Tensor, Tensor | None, Sums]:
        """dx, d_residual and the two sums; ``from_batch`` says that the statistics depend on x."""
        ...


class Composite:
    """The two calls that a norm makes, out of the five verbs; a backend may fuse them.

    Fused, what the first verb has read can stay in cache for the second.
    """

    def forward_training(
        self: Backend,
        x: Tensor,
        view: View,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        act: Activation,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, mean, m2 = self.stats(x, view)
        var = m2 / max(n, 1)
        affine = Affine(mean, (var + eps).rsqrt(), weight, bias)
        return self.apply(x, view, affine, act, residual), mean, var

    def backward(
        self: Backend,
        dy: Tensor,
        x: Tensor,
        view: View,
        affine: Affine,
        act: Activation,
        residual: Tensor | None,
        from_batch: bool,
    ) -> tuple[Tensor, Tensor | None, Sums]:
        sums = self.backward_reduce(dy, x, view, affine, act, residual)
        given = sums if from_batch else None
        return *self.backward_dx(dy, x, view, affine, act, residual, given), sums


def accumulation_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of statistics: float64 on the CPU, float32 elsewhere (float64 for float64)."""
    if dtype == torch.float64 or device.type == "cpu":
        return torch.float64
    return torch.float32
