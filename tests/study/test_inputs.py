"""Bytes to numbers, and the numbers of the normalization through plain text and back."""

from __future__ import annotations

import json

import pytest
import torch

from evenkeel.study.inputs import Inputs

IMAGES = torch.randint(0, 17, (50, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()


def test_full_intensity_is_one():
    assert torch.equal(Inputs()(IMAGES, 16), IMAGES.float() / 16)


def test_binary_splits_at_half_intensity():
    assert torch.equal(Inputs(binary=True)(IMAGES, 16), (IMAGES > 8).float())


def test_measured_gives_mean_zero_and_deviation_one_per_channel():
    values = Inputs.measured(IMAGES, 16)(IMAGES, 16).double()
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-6, rtol=0)
    deviation = values.std((0, 2, 3), unbiased=False)
    torch.testing.assert_close(deviation, torch.ones(3).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("binary", [False, True])
def test_the_numbers_survive_text_bit_by_bit(binary):
    inputs = Inputs.measured(IMAGES, 16, binary)
    shift, scale = json.loads(json.dumps(inputs.numbers))
    again = Inputs.of_numbers(binary, shift, scale)
    assert torch.equal(again(IMAGES, 16), inputs(IMAGES, 16))


def test_without_normalization_there_are_no_numbers():
    assert Inputs(binary=True).numbers is None
    assert Inputs.of_numbers(True, None, None).binary


def test_shift_without_scale_is_refused():
    with pytest.raises(ValueError, match="give shift and scale, or neither"):
        Inputs(shift=torch.zeros(1, 1, 1, 1))
