"""Packed convolutions: transposed ones, and what is added to the output."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evenkeel.nn import tails
from evenkeel.nn.packed import unpacked

from .packing import ACTIVATIONS, LAYOUTS, TOLERANCE, assert_same, conv_and_input, off, packed, way


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


TRANSPOSED = {
    "plain": {"kernel_size": 3},
    "of one pixel": {"kernel_size": 1},
    "strided": {"kernel_size": (3, 4), "stride": (2, 3), "padding": (1, 2)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "uneven": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": (1, 0)},
    "grouped": {"kernel_size": 4, "stride": 2, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4},
    "no bias": {"kernel_size": 2, "stride": 2, "bias": False},
}


class TestTransposed:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("name", TRANSPOSED)
    def test_every_setting(self, name, layout, limits):
        for batch, (height, width), (activation, function) in itertools.product(
            (1, 4), ((1, 1), (7, 12)), ACTIVATIONS.items()
        ):
            conv = nn.ConvTranspose2d(4, 8, **TRANSPOSED[name]).eval()
            if min(conv(torch.zeros(1, 4, 7, 12)).shape) < 1 or (height == 1 and conv.padding[0]):
                continue
            x = torch.randn(batch, 4, height, width).contiguous(memory_format=LAYOUTS[layout])
            assert_same(conv, packed(conv, activation), x, function)

    def test_ways(self):
        conv, x = nn.ConvTranspose2d(16, 24, 3).eval(), torch.randn(2, 16, 9, 9)
        own, small = packed(conv), torch.randn(1, 16, 3, 3)
        assert_same(conv, own, x)
        assert way(own) == "reordered"
        assert_same(conv, own, small)
        assert way(own) == "torch"

    @pytest.mark.parametrize(
        ("shape", "settings", "match"),
        [
            ((2, 15, 9, 9), {}, r"expected input\[2, 15, 9, 9\] to have 16 channels"),
            ((2, 16, 1, 9), {"padding": 3}, r"too small|memory descriptor"),
            ((2, 16, 9, 9), {"output_padding": 1}, r"output padding must be smaller"),
        ],
    )
    def test_errors_are_torchs(self, shape, settings, match, reordering):
        conv = nn.ConvTranspose2d(16, 8, 3, **settings)
        for net in (conv, packed(conv)):
            with torch.no_grad(), pytest.raises(RuntimeError, match=match):
                net(torch.randn(shape))

    @torch.no_grad()
    def test_undone(self):
        conv, x = nn.ConvTranspose2d(16, 24, 3).eval(), torch.randn(2, 16, 9, 9)
        again, activation = unpacked(packed(conv, "relu"))
        assert type(again) is nn.ConvTranspose2d
        assert isinstance(activation, nn.ReLU)
        assert torch.equal(again(x), conv(x))


@pytest.fixture(params=["native", "torch"])
def kernels(request, monkeypatch):
    """With our kernels and without."""
    if request.param == "torch":
        monkeypatch.setattr(tails, "kernels_for", lambda shape: None)


class TestResidual:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("kernel", [1, 3])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("bias", [True, False])
    @torch.no_grad()
    def test_is_added_before_the_activation(
        self, activation, kernel, layout, bias, limits, kernels
    ):
        conv = nn.Conv2d(16, 24, kernel, padding=kernel // 2, bias=bias).eval()
        own, wide = packed(conv, activation), copy.deepcopy(conv).double()
        for batch in (1, 3):
            x = torch.randn(batch, 16, 9, 7)
            residual = torch.randn(batch, 24, 9, 7).contiguous(memory_format=LAYOUTS[layout])
            kept = residual.clone()
            wanted = ACTIVATIONS[activation](wide(x.double()) + residual.double())
            for _ in range(2):
                assert off(own(x, residual).double(), wanted) <= TOLERANCE
            assert torch.equal(residual, kept)
            assert off(own(x).double(), ACTIVATIONS[activation](wide(x.double()))) <= TOLERANCE

    @torch.no_grad()
    def test_of_other_shapes_and_types(self, limits, kernels):
        conv, x = conv_and_input()
        own = packed(conv, "relu")
        for shape in ((24, 1, 1), (1, 24, 9, 9), (3, 1, 1, 1, 1)):
            residual = torch.randn(shape)
            assert off(own(x, residual), torch.relu(conv(x) + residual)) <= TOLERANCE
        residual = torch.randn(2, 24, 9, 9, dtype=torch.float64)
        assert off(own(x, residual), torch.relu(conv(x) + residual)) <= TOLERANCE

    @torch.no_grad()
    def test_nan_of_either(self, limits, kernels):
        conv, x = conv_and_input()
        residual = torch.zeros(2, 24, 9, 9)
        residual[0, 1, 2, 3] = float("nan")
        x[1, 0, 4, 4] = float("nan")
        found, wanted = packed(conv, "relu6")(x, residual), F.relu6(conv(x) + residual)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert wanted.isnan().any()

    def test_gradients(self, limits):
        conv, x = conv_and_input()
        own, residual = packed(conv, "relu"), torch.randn(2, 24, 9, 9, requires_grad=True)
        assert torch.equal(own(x, residual), torch.relu(conv(x) + residual))
        own.requires_grad_(False)(x, residual).sum().backward()
        assert torch.equal(residual.grad, (conv(x) + residual > 0).float())
