"""Torch's batch-norm classes with evenkeel's arithmetic.

They are subclasses: the constructor, state dict, defaults and every ``isinstance`` of torch hold.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..pattern import parse
from .norm import forward_with_memory

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

_SPATIAL = parse("n c ... -> c")


class BatchNorm1d(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` on (n, c) or (n, c, l), computed by evenkeel."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        return forward_with_memory(self, x, _SPATIAL)


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on (n, c, h, w), computed by evenkeel: cuDNN's SPATIAL mode."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        return forward_with_memory(self, x, _SPATIAL)


class BatchNorm3d(nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` on (n, c, d, h, w), computed by evenkeel."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        return forward_with_memory(self, x, _SPATIAL)
