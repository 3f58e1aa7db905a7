"""Small data and plans that train in milliseconds."""

from __future__ import annotations

import torch

from evenkeel.study.arms import Arm, Plan
from evenkeel.study.data import Dataset, Split

CPU = torch.device("cpu")


def tiny_dataset(train: int = 96, test: int = 40, size: int = 8, channels: int = 1) -> Dataset:
    """Images of three classes that differ in their brightest row, with noise."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        labels = torch.arange(count) % 3
        images = torch.randint(0, 120, (count, channels, size, size), generator=generator)
        images[torch.arange(count), :, labels * 2] += 130
        return Split(images.to(torch.uint8), labels)

    return Dataset("tiny", split(train), split(test), ("top", "middle", "low"))


def tiny_plan(*arms: Arm, **changes) -> Plan:
    """A plan of a few steps on the embedded digits."""
    arms = arms or (Arm("plain"), Arm("normed", placement="before-activation"))
    settings = {"seeds": 2, "steps": 6, "points": 3, "curve_limit": 50, "target": 0.3}
    return Plan("tiny", arms, **(settings | changes))
