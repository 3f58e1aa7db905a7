"""The 8x8 handwritten digits that come with scikit-learn: real data without a download."""

from __future__ import annotations

import numpy as np
import torch

from .base import Dataset, Split, stratified

__all__ = ["load"]


def load() -> Dataset:
    """1797 digits of 8x8 pixels from 0 to 16, about a quarter of each class for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = stratified(labels.numpy())
    return Dataset(
        name="digits",
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
        classes=tuple(str(d) for d in range(10)),
        white=16,
    )
