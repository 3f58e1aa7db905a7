"""The mistake of leaving the norms out at inference, made on purpose."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evenkeel.nn import BatchNorm2d
from evenkeel.surgery.fold import skip_norms
from evenkeel.surgery.introduce import PLACEMENTS, introduce

from .nets import built, images, randomized, state


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_skipping_leaves_the_norms_out(placement):
    network, report = introduce(built("standard"), images(2), placement)
    randomized(network).eval()
    before = state(network)
    skipped = skip_norms(network)
    assert state(network) == before
    names = [name for name, _ in report.norms]
    assert all(type(skipped.get_submodule(name)) is nn.Identity for name in names)
    plain = built("standard").eval()
    with torch.no_grad():
        for name in report.dropped_biases:
            plain.get_submodule(name).bias.zero_()
    assert torch.equal(skipped(images()), plain(images()))
    assert not torch.allclose(network(images()), plain(images()))


def test_skipping_finds_a_norm_under_all_of_its_names():
    norm = randomized(BatchNorm2d(2))
    model = nn.Sequential(nn.Conv2d(1, 2, 1), norm, nn.Conv2d(2, 2, 1), norm, nn.Flatten())
    skipped = skip_norms(model)
    assert not any(isinstance(m, BatchNorm2d) for m in skipped.modules())
    assert torch.equal(skipped(images()), nn.Sequential(model[0], model[2], model[4])(images()))
