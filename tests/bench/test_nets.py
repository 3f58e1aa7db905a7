"""The benchmark's networks: shapes, with norms and without, and weights that repeat."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from evenkeel.bench.nets import LARGE, NETS, build
from evenkeel.bench.shapes import distinct
from evenkeel.errors import ConfigError

NORMS = {
    "vgg": 8, "resnet18": 20, "mobilenetv2": 52, "densenet": 53, "efficientnet": 49, "resnet50": 53,
}  # fmt: skip
KNOWN = (*NETS, *LARGE)


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("name", KNOWN)
def test_shapes_and_norms(name, size):
    images = torch.randn(2, 3, size, size)
    for norm in (True, False):
        model = build(name, size=size, width=0.125, classes=7, norm=norm)
        output = model(images)
        assert output.shape == (2, 7)
        output.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert norms(model) == (NORMS[name] if norm else 0)


@pytest.mark.parametrize("name", KNOWN)
def test_a_convolution_has_a_bias_where_it_has_no_norm(name):
    def biases(norm: bool) -> list[bool]:
        convs = build(name, width=0.125, norm=norm).modules()
        return [m.bias is not None for m in convs if isinstance(m, nn.Conv2d)]

    assert all(biases(norm=False))
    assert sum(biases(norm=True)) == (32 if name == "efficientnet" else 0)  # squeeze, excite


def test_width():
    narrow, wide = (build("vgg", width=width) for width in (0.5, 1.0))
    assert narrow[-1].in_features == 256
    assert wide[-1].in_features == 512


def test_resnet50_is_torchvisions():
    """Its 25,557,032 parameters, and its shapes at 224x224."""
    model = build("resnet50", size=224, classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    seen = []
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.register_forward_hook(lambda *given: seen.append(tuple(given[2].shape[1:])))
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    wanted = {place[:3]: 0 for place in distinct("resnet50")}
    for place, counts in distinct("resnet50").items():
        wanted[place[:3]] += counts["resnet50"]
    assert Counter(seen) == wanted


def test_resnet50_without_norms_keeps_the_size_of_its_signal():
    """Else a step or two of training end in NaN, which a GPU computes in less time."""
    model = build("resnet50", width=0.25, norm=False)
    output = model(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert 0.02 < float(output.detach().std()) < 1


def test_the_same_weights_every_time_and_no_random_numbers_used():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two = build("resnet18", width=0.125), build("resnet18", width=0.125)
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_unknown():
    with pytest.raises(ConfigError, match=r"'vg' \(did you mean 'vgg'\?\); choose one of vgg"):
        build("vg")
    with pytest.raises(ConfigError, match=r"resnet50, or all, which is the first 5$"):
        build("lenet")
