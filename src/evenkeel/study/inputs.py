"""What a network sees of an image: full intensity is 1, then perhaps binary, then normalized."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.reference import Reference
from ..view import logical_view

__all__ = ["Inputs"]

_CHUNK = 4096


class Inputs:
    """Turns the bytes of images into the numbers that a network is trained on.

    ::

        value = byte / white        value = value > 0.5 if binary        (value - shift) * scale

    Attributes:
        binary: pixels above half intensity are 1, the rest 0.
        shift, scale: (1, c, 1, 1), or None for numbers in [0, 1].
    """

    def __init__(
        self, binary: bool = False, shift: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        if (shift is None) != (scale is None):
            raise ValueError("give shift and scale, or neither")
        self.binary, self.shift, self.scale = binary, shift, scale

    @classmethod
    def measured(cls, images: Tensor, white: float, binary: bool = False) -> Inputs:
        """Normalizes each channel by its mean and deviation, merged exactly from chunks.

        A channel that is constant is shifted only.
        """
        raw, verbs = cls(binary), Reference()
        chunks = (raw(chunk, white) for chunk in torch.split(images, _CHUNK))
        parts = [verbs.stats(c, logical_view(c.shape, (1,))) for c in chunks]
        moments = verbs.merge(parts)
        deviation = (moments.m2 / moments.n).sqrt().flatten()
        deviation = deviation.where(deviation > 0, 1)
        shift = moments.mean.flatten().float().reshape(1, -1, 1, 1)
        return cls(binary, shift, deviation.reciprocal().float().reshape(1, -1, 1, 1))

    @classmethod
    def of_numbers(
        cls, binary: bool, shift: Sequence[float] | None, scale: Sequence[float] | None
    ) -> Inputs:
        """The inverse of `numbers`."""
        if shift is None or scale is None:
            return cls(binary)
        as_channels = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (shift, scale))
        return cls(binary, *as_channels)

    @property
    def numbers(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Shift and scale of each channel as plain numbers, exactly; None if there are none."""
        if self.shift is None or self.scale is None:
            return None
        return tuple(self.shift.flatten().tolist()), tuple(self.scale.flatten().tolist())

    def to(self, device: torch.device) -> Inputs:
        """The same for images on a device."""
        if self.shift is None or self.scale is None:
            return self
        return Inputs(self.binary, self.shift.to(device), self.scale.to(device))

    def __call__(self, images: Tensor, white: float) -> Tensor:
        """The numbers of (n, c, h, w) bytes of which ``white`` is full intensity."""
        values = images.float() / white
        if self.binary:
            values = (values > 0.5).float()
        if self.shift is not None and self.scale is not None:
            values = (values - self.shift) * self.scale
        return values
