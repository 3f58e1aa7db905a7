"""The digits that come with scikit-learn."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from evenkeel.study.data import load


def test_the_digits_are_what_they_always_were() -> None:
    np.random.seed(7)
    torch.manual_seed(7)
    data = load("digits")
    assert data.shape == (1, 8, 8)
    assert data.white == 16 == int(data.train.images.max())
    assert (len(data.train), len(data.test)) == (1347, 450)
    assert data.fingerprint == "3ebf9413f1a7dbf0"
    assert data.notes == ()


def test_each_class_is_split_three_to_one() -> None:
    data = load("digits")
    train, test = data.train.labels.bincount(), data.test.labels.bincount()
    assert ((train + test) / 4 - test).abs().max() <= 0.5


def test_every_digit_is_on_exactly_one_side() -> None:
    data = load("digits")
    images = torch.cat([data.train.images, data.test.images]).flatten(1)
    ours = sorted(bytes(row.tolist()) for row in images)
    theirs = sorted(bytes(row) for row in load_digits().data.astype(np.uint8))
    assert ours == theirs
