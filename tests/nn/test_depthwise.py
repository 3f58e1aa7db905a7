"""Depthwise convolutions by our own kernel, on every instruction set."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from .packing import ACTIVATIONS, LAYOUTS, assert_same, packed, way

native = pytest.importorskip("evenkeel._native", reason="the native kernels are not built")


pytestmark = pytest.mark.usefixtures("instructions")


def depthwise(channels, kernel, **settings):
    return nn.Conv2d(channels, channels, kernel, groups=channels, **settings).eval()


def compare(conv, x, activation=None):
    own = packed(conv, activation)
    assert_same(conv, own, x, ACTIVATIONS[activation])
    assert way(own) == "depthwise"


@pytest.mark.parametrize("channels", [2, 3, 7, 8, 9, 16, 31, 32, 33, 70, 144])
def test_any_number_of_channels(channels):
    for bias, layout in itertools.product((True, False), LAYOUTS.values()):
        conv = depthwise(channels, 3, padding=1, bias=bias)
        compare(conv, torch.randn(2, channels, 7, 9).contiguous(memory_format=layout))


@pytest.mark.parametrize("kernel", [1, 2, 3, 5, (1, 7), (4, 3)])
@pytest.mark.parametrize("stride", [1, 2, (3, 1), (1, 5)])
@pytest.mark.parametrize("padding", [0, 1, (0, 2), 4])
def test_any_window(kernel, stride, padding):
    """Windows that lie half outside, wholly outside, or over all of the image."""
    for dilation, size in itertools.product((1, 2, (1, 3)), ((8, 8), (5, 12), (15, 4))):
        conv = depthwise(11, kernel, stride=stride, padding=padding, dilation=dilation)
        x = torch.randn(2, 11, *size)
        try:
            conv(x)
        except RuntimeError:
            continue  # the window is larger than the image
        compare(conv, x)


def test_an_image_smaller_than_the_window():
    for size in itertools.product((1, 2, 3), repeat=2):
        compare(depthwise(20, 5, padding=3), torch.randn(3, 20, *size))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    conv, x = depthwise(20, 3, padding=1), torch.randn(2, 20, 8, 8)
    compare(conv, x, activation)
    x[0, 4, 3, 3], x[1, 0, 0, 0] = torch.nan, torch.inf
    with torch.no_grad():
        found, wanted = packed(conv, activation)(x), ACTIVATIONS[activation](conv(x))
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.isinf(), wanted.isinf())


def test_a_sum_is_added_before_the_activation():
    conv = depthwise(12, 3, padding=1)
    x, residual = torch.randn(2, 2, 12, 9, 9)
    own = packed(conv, "relu")
    with torch.no_grad():
        for added in (residual, residual[:, :, :1], torch.randn(12, 1, 1)):
            torch.testing.assert_close(own(x, added), torch.relu(conv(x) + added))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_bits_do_not_depend_on_threads(threads):
    conv, x = packed(depthwise(48, 3, padding=1), "silu"), torch.randn(3, 48, 40, 40)
    before = torch.get_num_threads()
    with torch.no_grad():
        torch.set_num_threads(1)
        wanted = conv(x)
        torch.set_num_threads(threads)
        found = conv(x)
    torch.set_num_threads(before)
    assert torch.equal(found, wanted)


def test_a_bias_or_weight_that_is_written_over():
    conv, x = depthwise(16, 3), torch.randn(2, 16, 8, 8)
    own = packed(conv)
    with torch.no_grad():
        own(x)
        for parameter in ("bias", "weight"):
            new = torch.randn_like(getattr(own, parameter))
            for each in (own, conv):
                getattr(each, parameter).data.copy_(new)
            torch.testing.assert_close(own(x), conv(x))


def test_nothing_beside_the_tensors_is_touched():
    """Input, weight and output lie between bytes that must not matter, or be written."""
    for channels, size in itertools.product((1, 5, 8, 19, 40), (1, 2, 6)):
        room, guard = channels * size * size, 64
        x, y = torch.full((2, room + 2 * guard), torch.nan)
        weight, bias = torch.full((9, channels + 0), 1.0), torch.zeros(channels)
        x[guard:-guard] = 1.0
        native.depthwise(
            1, channels, (size, size), (size, size), (3, 3), (1, 1), (1, 1), (1, 1), 0, 0.0, 1,
            x[guard:].data_ptr(), weight.data_ptr(), bias.data_ptr(), y[guard:].data_ptr(),
        )  # fmt: skip
        ones = torch.ones(1, 1, size, size)
        wanted = nn.functional.conv2d(ones, torch.ones(1, 1, 3, 3), padding=1).flatten()
        assert torch.equal(y[guard:-guard].view(-1, channels), wanted[:, None].expand(-1, channels))
        assert y[:guard].isnan().all()
        assert y[-guard:].isnan().all()


def test_other_convolutions_go_other_ways():
    for conv in (
        nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(8, 8, 3, groups=4),
        depthwise(8, 3, padding=1, padding_mode="reflect"),
    ):
        own, x = packed(conv.eval()), torch.randn(2, 8, 9, 9)
        assert_same(conv, own, x)
        assert way(own) != "depthwise"
