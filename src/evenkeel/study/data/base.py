"""What every data set is once it is read: two splits of bytes and labels, and their fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ...errors import FormatError, ShapeError

__all__ = ["Dataset", "Split", "found_in", "refuse", "shuffled", "stratified"]

_TEST_SHARE: Final = 0.25


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Attributes:
        images: (n, c, h, w) uint8.
        labels: (n,) int64, each an index into the classes of the data set.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4 or 0 in images.shape:
            raise ShapeError(
                "images must be uint8 of shape (n, c, h, w), none of them 0, but got "
                f"{images.dtype} {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ShapeError(
                f"labels must be int64 of shape ({len(images)},), one for each image, but got "
                f"{labels.dtype} {tuple(labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Attributes:
        name: the name that it was loaded by.
        train, test: the two splits; images of both have one shape.
        classes: the name of each label.
        white: the pixel value that means full intensity, 255 or, for the 8x8 digits, 16.
        notes: what somebody who uses the data should know, one line each.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    white: int = 255
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise ShapeError(
                f"'{self.name}' has training images of shape {self.shape} but test images of shape "
                f"{tuple(self.test.images.shape[1:])}"
            )
        for part, split in (("training", self.train), ("test", self.test)):
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.classes):
                raise ShapeError(
                    f"'{self.name}' has {len(self.classes)} classes but {part} labels from {low} "
                    f"to {high}"
                )
            if int(split.images.max()) > self.white:
                raise ShapeError(
                    f"'{self.name}' has a {part} pixel of {int(split.images.max())}, above white, "
                    f"which is {self.white}"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (c, h, w) of every image."""
        c, h, w = self.train.images.shape[1:]
        return c, h, w

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 hex digits of a SHA-256 over shapes, pixels and labels of both splits."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(f"{tuple(split.images.shape)}".encode())
            digest.update(split.images.cpu().contiguous().numpy().data)
            digest.update(split.labels.cpu().numpy().astype("<i8").data)
        return digest.hexdigest()[:16]

    def summary(self) -> str:
        """One line for the terminal."""
        size = "x".join(str(s) for s in self.shape)
        return (
            f"{self.name}: {len(self.train):,} training and {len(self.test):,} test images, "
            f"{size}, {len(self.classes)} classes, fingerprint {self.fingerprint}"
        )


def refuse(where: Path | str, what: str, at: int | None = None) -> FormatError:
    """The error for a file that cannot be read: file, offset where there is one, reason."""
    place = "" if at is None else f" at byte {at:,}"
    return FormatError(f"{where}{place}: {what}")


def found_in(folder: Path) -> str:
    """What is in a folder where something else was looked for, for an error."""
    if folder.is_file():
        return "this is a file; give the folder that it is in"
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if not names:
        return "found nothing there"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"found {', '.join(names[:8])}{more}"


def stratified(labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Splits indices into three quarters for training and one for testing, class by class.

    The split depends on the labels alone, never on a seed of the user's. Each class has at least
    one image on either side, so each must have two or more. Both results are in rising order.
    """
    # RandomState and not a Generator: NumPy promises that its stream never changes.
    random = np.random.RandomState(0)
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        assert len(members) > 1, f"class {label} cannot be split"  # noqa: S101
        count = max(1, round(_TEST_SHARE * len(members)))
        test[random.permutation(members)[:count]] = True
    return torch.from_numpy(np.flatnonzero(~test)), torch.from_numpy(np.flatnonzero(test))


def shuffled(split: Split) -> Split:
    """The split in a fixed random order, so that its first images are a fair sample."""
    order = torch.from_numpy(np.random.RandomState(1).permutation(len(split)))
    return Split(split.images[order], split.labels[order])
