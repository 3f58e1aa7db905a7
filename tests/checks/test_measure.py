"""The gap of a norm against what the norm really gives, and the network's gap against torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from evenkeel import Norm, check
from evenkeel.checks.facts import norms_of
from evenkeel.checks.measure import floor_of, gap, merged, moments, shift_between
from evenkeel.checks.observe import observe
from evenkeel.nn import PerActivationBatchNorm

from .planted import images, net

NORMS = {
    "spatial": lambda: nn.BatchNorm2d(3),
    "no affine": lambda: nn.BatchNorm2d(3, affine=False),
    "large eps": lambda: nn.BatchNorm2d(3, eps=2.0),
    "per activation": lambda: PerActivationBatchNorm((3, 8, 8)),
    "per location": lambda: Norm("n c h w -> h w", h=8, w=8),
    "groups": lambda: Norm("n (g c) h w -> g", affine="g", g=3, c=1),
}


def random_norm(name: str) -> nn.Module:
    torch.manual_seed(3)
    norm = NORMS[name]()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 4)
    for p in norm.parameters():
        nn.init.normal_(p)
    return norm


@pytest.mark.parametrize("name", NORMS)
def test_the_gap_is_what_the_outputs_differ_by(name):
    """Root mean square of the difference of two real outputs, over the deviation of one."""
    norm, x = random_norm(name).double().requires_grad_(False), images(500).double()
    facts = norms_of(norm)[""]
    found = gap(facts, moments(facts, x))
    a, b = norm.eval()(x), norm.train()(x)
    beta = norm(x * 0)
    true = (a - b).square().mean().sqrt() / (b - beta).square().mean().sqrt()
    assert found.size == pytest.approx(float(true), rel=5e-3)  # unbiased against biased


@pytest.mark.parametrize("name", NORMS)
def test_no_gap_where_statistics_are_those_of_the_data(name):
    norm, x = random_norm(name), images(200)
    norm.momentum = 1.0
    norm.train()(x)
    facts = norms_of(norm)[""]
    assert gap(facts, moments(facts, x)).size < 1e-5


def test_the_worst_owner_is_named():
    norm, x = nn.BatchNorm2d(3).eval(), torch.randn(200, 3, 4, 4)
    norm.running_mean[1] = -5
    facts = norms_of(norm)[""]
    found = gap(facts, moments(facts, x))
    assert found.owner == 1
    assert found.shift == pytest.approx(5, abs=0.1)
    assert found.ratio == pytest.approx(1, abs=0.1)
    assert "owner 1: mean off by +" in check(norm, data=x).of("EK306")[0].message


def test_constant_and_unused_channels_do_not_count():
    """A constant channel's variance is still on its way from 1 to 0, and does no harm."""
    norm, x = nn.BatchNorm2d(3), torch.randn(200, 3, 4, 4)
    x[:, 0] = 0
    norm.running_var[0] = 0.3
    norm.running_mean[2] = 50
    with torch.no_grad():
        norm.weight[2] = 0
    facts = norms_of(norm)[""]
    assert gap(facts, moments(facts, x)).size < 0.1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda n: n.running_var.fill_(-1),
        lambda n: n.running_mean.fill_(float("nan")),
        lambda n: n.running_var[:1].fill_(float("inf")),
    ],
)
def test_statistics_that_cannot_be_used_have_no_gap(spoil):
    norm = nn.BatchNorm2d(3)
    spoil(norm)
    facts = norms_of(norm)[""]
    assert gap(facts, moments(facts, images())) is None
    check(norm.eval(), data=images())  # and break nothing


def test_moments_of_batches_are_those_of_all():
    facts = norms_of(nn.BatchNorm2d(3))[""]
    x = images(60)
    whole = moments(facts, x)
    parts = merged([moments(facts, part) for part in x.split(17)])
    assert parts.n == whole.n == 60 * 64
    torch.testing.assert_close(parts.mean, x.double().mean((0, 2, 3)))
    torch.testing.assert_close(parts.m2, whole.m2)
    assert moments(facts, x.long()) is None
    assert moments(facts, x.flatten()) is None


def test_shift_between_two_places():
    facts = norms_of(nn.BatchNorm2d(3))[""]
    x = torch.randn(4000, 3, 2, 2)
    a = moments(facts, x)
    assert shift_between(a, a) == 0
    assert shift_between(a, moments(facts, x + 2)) == pytest.approx(2, abs=0.1)
    assert shift_between(a, moments(facts, 3 * x)) == pytest.approx(2, abs=0.1)
    nothing = moments(facts, x * 0)
    assert shift_between(nothing, a) == 0


def test_the_limit_is_above_chance():
    assert floor_of(150) == pytest.approx(0.1)
    sizes = []
    for seed in range(200):
        torch.manual_seed(seed)
        norm = nn.BatchNorm1d(1)
        facts = norms_of(norm)[""]
        sizes.append(gap(facts, moments(facts, torch.randn(16, 1))).size)
    assert math.sqrt(sum(s * s for s in sizes) / 200) == pytest.approx(floor_of(16), rel=0.2)
    assert max(sizes) < 4 * floor_of(16)


def stale(model: nn.Module, name: str) -> nn.Module:
    model.get_submodule(name).running_mean += 3 * model.get_submodule(name).running_var.sqrt()
    return model.eval()


@pytest.mark.parametrize("name", ["bn1", "bn2"])
def test_the_layer_where_the_gap_starts_is_named(name):
    model = stale(net(), name)
    batches = images(512).split(64)
    found = check(model, data=batches)
    assert [f.path for f in found.of("EK306")] == [name]
    (finding,) = found.of("EK307")
    assert finding.path == name
    assert f"it starts at {name}" in finding.message
    layers = {layer.path: layer for layer in found.layers}
    assert list(layers) == ["bn1", "bn2"]
    assert layers[name].own == pytest.approx(3, rel=0.05)
    assert layers["bn2"].at_inference > 1
    assert layers["bn2"].own > 1 if name == "bn2" else layers["bn2"].own < 0.1


def test_the_networks_gap_is_what_update_bn_changes():
    """Against torch's own estimate of the statistics."""
    model = stale(net(), "bn1")
    batches = [*images(512).split(64)]
    seen = observe(model, data=batches).measured
    x = torch.cat(batches)
    with torch.no_grad():
        a = model(x)
        update_bn(batches, model)
        b = model.eval()(x)
    true = (a - b).square().mean().sqrt() / (b - b.mean(0)).square().mean().sqrt()
    assert seen.difference == pytest.approx(float(true), rel=0.02)
    assert seen.changed == pytest.approx(
        float((a.argmax(1) != b.argmax(1)).float().mean()), abs=0.01
    )
    assert seen.samples == 512


def test_a_gap_of_many_small_shares_names_the_largest():
    """Twelve norms, each a third of a deviation off: none is over the limit, the output is."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(12):
        layers += [nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(16, 4))
    data = [torch.randn(64, 16) for _ in range(16)]
    update_bn(data, model)
    for norm in model:
        if isinstance(norm, nn.BatchNorm1d):
            norm.running_var *= 2.2
    found = check(model.eval(), data=data)
    assert found.of("EK306") == ()
    (finding,) = found.of("EK307")
    assert "adds up over 12 norms" in finding.message
    assert max(layer.own for layer in found.layers) < 0.5


def test_few_batches_leave_the_initial_variance():
    """After 10 batches of momentum 0.1 the initial 1 still weighs a third."""
    norm = nn.BatchNorm2d(3)
    x = images(256) * 1e-2
    for part in x.split(16)[:10]:
        norm(part)
    found = check(nn.Sequential(norm, nn.Conv2d(3, 4, 3)).eval(), data=x)
    (finding,) = found.of("EK306")
    variance = float(x.var())
    kept = 0.9**10 + (1 - 0.9**10) * variance
    assert finding.evidence == pytest.approx(1 - math.sqrt(variance / kept), abs=0.1)


def test_networks_without_an_answer_or_a_gap():
    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> None:
            self.bn(x)

    found = check(Nothing(), data=images())
    assert not found.of("EK307")
    fresh = check(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), data=images())
    assert not fresh.errors
    assert not fresh.warnings
    assert fresh.layers[0].own > 0.5  # told as a number, not as a mistake
    refused = check(nn.BatchNorm1d(3), data=[torch.randn(5, 4)])
    assert any("cannot run the data" in u.reason for u in refused.unchecked)


def test_batches_of_one_have_no_statistics_of_their_own():
    """They count as two of the same sample: enough to see the structure, and no more."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    found = check(model, data=[torch.randn(1, 3) for _ in range(3)])
    assert found.of("EK501")[0].severity == "error"


def test_frozen_norms_have_no_gap():
    """In training they use what they use at inference."""
    model = stale(net(), "bn1").train()
    model.bn1.eval().requires_grad_(False)
    found = check(model, data=images(256).split(64))
    assert [layer.path for layer in found.layers] == ["bn2"]
