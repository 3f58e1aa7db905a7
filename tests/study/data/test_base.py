"""Splits, data sets, fingerprints and the fixed split."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenkeel.errors import FormatError, ShapeError
from evenkeel.study.data import Dataset, Split
from evenkeel.study.data.base import found_in, refuse, shuffled, stratified


def _split(n: int = 4, size: int = 2, first: int = 0) -> Split:
    images = torch.arange(first, first + n * size * size, dtype=torch.uint8)
    return Split(images.reshape(n, 1, size, size), torch.arange(n) % 2)


def _dataset(**changes: object) -> Dataset:
    values = {"name": "tiny", "train": _split(4), "test": _split(2), "classes": ("a", "b")}
    return Dataset(**{**values, **changes})


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (torch.zeros(2, 1, 3, 3), r"uint8 .* but got torch.float32"),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), r"\(n, c, h, w\)"),
        (torch.zeros(2, 1, 0, 3, dtype=torch.uint8), r"none of them 0"),
    ],
)
def test_images_that_are_no_images(images: torch.Tensor, match: str) -> None:
    with pytest.raises(ShapeError, match=match):
        Split(images, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("labels", [torch.zeros(3, dtype=torch.int64), torch.zeros(2)])
def test_labels_that_do_not_fit(labels: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"int64 of shape \(2,\)"):
        Split(torch.zeros(2, 1, 3, 3, dtype=torch.uint8), labels)


def test_a_data_set_knows_its_shape_and_says_so() -> None:
    data = _dataset()
    assert data.shape == (1, 2, 2)
    assert len(data.train) == 4
    assert data.summary() == (
        f"tiny: 4 training and 2 test images, 1x2x2, 2 classes, fingerprint {data.fingerprint}"
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"test": _split(2, size=3)}, r"training images of shape \(1, 2, 2\) but .* \(1, 3, 3\)"),
        ({"classes": ("a",)}, "1 classes but training labels from 0 to 1"),
        ({"white": 7}, "training pixel of 15, above white, which is 7"),
    ],
)
def test_splits_that_do_not_belong_together(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ShapeError, match=match):
        _dataset(**changes)


def test_the_fingerprint_is_of_pixels_and_labels_only() -> None:
    data = _dataset()
    labels = (bytes([0] * 8 + [1] + [0] * 7) * k for k in (2, 1))  # 0, 1, ... in 64 bits
    by_hand = b"(4, 1, 2, 2)" + bytes(range(16)) + next(labels)
    by_hand += b"(2, 1, 2, 2)" + bytes(range(8)) + next(labels)
    assert data.fingerprint == hashlib.sha256(by_hand).hexdigest()[:16]
    assert _dataset(name="other", notes=("x",), white=100).fingerprint == data.fingerprint
    flipped = Split(data.train.images, data.train.labels.flip(0))
    assert _dataset(train=flipped).fingerprint != data.fingerprint
    assert _dataset(train=_split(4, first=1)).fingerprint != data.fingerprint
    assert _dataset(train=data.test, test=data.train).fingerprint != data.fingerprint


def test_the_fingerprint_does_not_depend_on_memory_order() -> None:
    images = _split(4).images.expand(4, 2, 2, 2)
    strided = Split(images.contiguous(memory_format=torch.channels_last), _split(4).labels)
    plain = Split(images.contiguous(), _split(4).labels)
    prints = {_dataset(train=s, test=s).fingerprint for s in (strided, plain)}
    assert len(prints) == 1


@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_split_is_a_partition_that_keeps_every_class(counts: list[int], random) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    random.shuffle(labels)
    np.random.seed(random.randrange(2**31))
    train, test = stratified(np.array(labels))
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    assert train.tolist() == sorted(train.tolist())
    for label, count in enumerate(counts):
        tested = sum(labels[i] == label for i in test.tolist())
        assert tested == max(1, round(count / 4))
    again = stratified(np.array(labels))
    assert torch.equal(again[0], train)
    assert torch.equal(again[1], test)


def test_shuffling_keeps_images_with_their_labels() -> None:
    images = torch.arange(100, dtype=torch.uint8).reshape(100, 1, 1, 1)
    mixed = shuffled(Split(images, torch.arange(100)))
    assert torch.equal(mixed.images.flatten().long(), mixed.labels)
    assert not torch.equal(mixed.labels, torch.arange(100))
    assert torch.equal(shuffled(Split(images, torch.arange(100))).labels, mixed.labels)


def test_what_is_found_in_a_folder(tmp_path) -> None:
    assert found_in(tmp_path) == "found nothing there"
    assert "cannot be read (No such file" in found_in(tmp_path / "none")
    for i in range(10):
        (tmp_path / f"f{i}").touch()
    assert found_in(tmp_path).endswith("f6, f7 and 2 more")
    assert "this is a file" in found_in(tmp_path / "f0")


def test_a_refusal_names_file_and_offset() -> None:
    assert str(refuse("a.bin", "is odd", 1234)) == "a.bin at byte 1,234: is odd"
    assert str(refuse("a.bin", "is odd")) == "a.bin: is odd"
    assert isinstance(refuse("a.bin", "is odd"), FormatError)
