"""The algebra of calibration, the proof of it, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evenkeel.errors import ConfigError, ShapeError, SurgeryError
from evenkeel.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm
from evenkeel.surgery import introduce as introducing
from evenkeel.surgery.graph import trace
from evenkeel.surgery.introduce import introduce
from evenkeel.surgery.introducing.calibrate import Data, Values, measure, owned, prove, settle

from .nets import built, images, state
from .test_introduce_calibrated import BUDGET, data, norms_of, relative, trained

# The algebra

SHAPES = {2: (3,), 3: (3, 5), 4: (3, 4, 5), 5: (3, 2, 2, 3)}
CLASSES = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
PATTERNS = {
    "n c h w -> c h w": ({"c": 3, "h": 4, "w": 5}, (3, 4, 5)),
    "n c h w -> c w": ({"c": 3, "w": 5}, (3, 1, 5)),
    "n c h w -> h w": ({"h": 4, "w": 5}, (4, 5)),
    "n c h w ->": ({}, ()),
    "n (g c) h w -> g c w": ({"g": 3, "c": 1, "w": 5}, (3, 1, 5)),
}
"""Sizes of each pattern, and its statistics in a shape that goes with a sample's."""

seeds = st.integers(0, 2**16)
scales = st.floats(-6, 6).map(lambda power: 10.0**power)


def norm_for(chosen: int | str, eps: float) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    """A norm, the shape of a sample for it, and that of its statistics to go with a sample's."""
    if isinstance(chosen, int):
        return CLASSES[chosen](3, eps), SHAPES[chosen], (3, *[1] * (chosen - 2))
    sizes, spread = PATTERNS[chosen]
    return Norm(chosen, eps=eps, **sizes), SHAPES[4], spread


@given(
    chosen=st.sampled_from([*SHAPES, *PATTERNS]),
    eps=st.sampled_from([1e-12, 1e-5, 1e-3, 1.0]),
    offset=scales,
    spread=scales,
    shift=st.floats(-1e3, 1e3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=seeds,
)
def test_a_settled_norm_hands_on_what_it_is_given(chosen, eps, offset, spread, shift, dtype, seed):
    """And gives back the bias that was dropped, whatever the statistics, for any x near them."""
    norm, shape, spread_out = norm_for(chosen, eps)
    norm = norm.to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)

    def drawn(size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    size = norm.running_mean.shape
    mean, var, bias = offset * drawn(size), (spread * drawn(size)).square(), shift * drawn(size)
    settle(nn.ModuleDict({"norm": norm}), {"norm": Values(mean, var, bias, 3)})
    x = (offset * drawn((4, *shape)) + spread * drawn((4, *shape))).to(dtype)
    wanted = x.double() + bias.reshape(spread_out)
    largest = max(float(t.abs().max()) for t in (x.double(), mean, bias))
    budget = 1e-5 if dtype == torch.float32 else 1e-12
    assert float((norm(x).double() - wanted).abs().max()) <= budget * largest
    assert int(norm.num_batches_tracked) == 3


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    offset=st.floats(-1e4, 1e4),
    seed=seeds,
)
def test_statistics_do_not_depend_on_how_the_data_is_cut(sizes, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(max(sum(sizes), 2), 3, 4, 4, generator=generator) + offset
    parts = [part for part in x.split([*sizes[1:], len(x) - sum(sizes[1:])]) if len(part)]
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 2, 1))
    found = []
    for batches in (parts, parts[::-1], [x]):
        network, _ = introduce(model.eval(), x, "on-input", calibrate=batches)
        found.append(network.get_submodule("1_input_norm"))
    values = x.relu().double()
    for norm in found:
        near = {"rtol": 1e-5, "atol": 1e-30}
        torch.testing.assert_close(norm.bias.double(), values.mean((0, 2, 3)), **near)
        torch.testing.assert_close(norm.running_var.double(), values.var((0, 2, 3)), **near)


@pytest.mark.parametrize("chosen", [*SHAPES, *[p for p in PATTERNS if "c" in p.split(">")[1]]])
def test_a_bias_in_the_shape_of_the_statistics(chosen):
    norm, shape, _ = norm_for(chosen, 1e-5)
    bias = torch.tensor([1.0, -2.0, 3e4])
    found = owned(norm, nn.Parameter(bias), (2, *shape))
    assert found.shape == norm.running_mean.shape
    assert found.dtype == torch.float64
    for channel in range(3):
        assert torch.equal(found[channel].unique(), bias[channel : channel + 1].double())


# What is no rounding, and what is


class Chaos(nn.Module):
    """So steep that rounding shows in the output: each step multiplies what is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(144, 3)

    def forward(self, x):
        x = torch.tanh(self.conv(x)).flatten(1)
        for _ in range(4):
            x = torch.sin(30 * x)
        return self.fc(x)


class Insisting(Chaos):
    """Cannot run in double precision."""

    def forward(self, x):
        return super().forward(x.float())


def test_rounding_that_the_network_magnifies_is_judged_in_double_precision():
    torch.manual_seed(0)
    model = Chaos().eval()
    _, report = introduce(model, images(2), calibrate=data())
    assert BUDGET * report.scale < report.difference < report.scale
    assert report.exact is not None
    assert report.exact <= 1e-9
    assert "that is the network's own rounding: in double precision it is" in str(report)


def test_a_network_that_cannot_run_in_double_precision_gets_no_benefit_of_doubt():
    torch.manual_seed(0)
    with pytest.raises(SurgeryError, match=r"would change what the network computes"):
        introduce(Insisting().eval(), images(2), calibrate=data())


def test_half_precision_is_judged_in_double_precision_too():
    model = trained().bfloat16()
    batches = [batch.bfloat16() for batch in data()]
    network, report = introduce(model, batches[0], calibrate=batches)
    assert report.difference > BUDGET * report.scale
    assert report.exact <= 1e-9
    assert network.conv1_norm.running_mean.dtype == torch.float32
    assert relative(model(batches[1]), network(batches[1])) < 0.05


def off_by(change):
    """`settle`, and then something wrong."""

    def settled(network, values):
        settle(network, values)
        with torch.no_grad():
            change(next(iter(norms_of(network).values())))

    return settled


WRONG = {
    "gamma": lambda norm: norm.weight.mul_(1 + 1e-3),
    "beta": lambda norm: norm.bias.add_(1e-3),
    "mean": lambda norm: norm.running_mean.add_(1e-3),
    "variance": lambda norm: norm.running_var.mul_(1 + 1e-3),
    "nan": lambda norm: norm.bias.fill_(torch.nan),
}


@pytest.mark.parametrize("make", [trained, lambda: Chaos().eval(), lambda: trained().double()])
@pytest.mark.parametrize("what", WRONG)
def test_the_proof_sees_whatever_is_wrong(what, make, monkeypatch):
    torch.manual_seed(0)
    model = make()
    dtype = next(model.parameters()).dtype
    batches, before = [batch.to(dtype) for batch in data()], state(model)
    for module in (
        "evenkeel.surgery.introduce.settle",
        "evenkeel.surgery.introducing.calibrate.settle",
    ):
        monkeypatch.setattr(module, off_by(WRONG[what]))
    with pytest.raises(SurgeryError, match=r"change what the network computes by .* output 0"):
        introduce(model, batches[0], calibrate=batches)
    assert state(model) == before


def test_what_is_wrong_in_single_precision_alone_is_no_rounding(monkeypatch):
    """The algebra is right, and yet the copy is much farther from the truth than the original."""

    def settled(network, values):
        settle(network, values)
        norm = next(iter(norms_of(network).values()))
        if norm.bias.dtype == torch.float32:
            with torch.no_grad():
                norm.bias += 1e-2

    for module in (
        "evenkeel.surgery.introduce.settle",
        "evenkeel.surgery.introducing.calibrate.settle",
    ):
        monkeypatch.setattr(module, settled)
    with pytest.raises(SurgeryError, match=r"change what the network computes by .* output 0"):
        introduce(trained(), images(2), calibrate=data())


def test_a_difference_that_only_the_data_shows_is_seen():
    one, two = nn.Linear(3, 2).eval(), nn.Linear(3, 2).eval()
    two.bias = one.bias
    example, batch = torch.zeros(2, 3), torch.ones(4, 3)
    changed = trace(two, example)
    prove(one, changed, example, [example], None, {})
    for forward in (None, lambda model, given: model(given)):
        with pytest.raises(SurgeryError, match=r"in output 0 for batch 2, where 1e-05 of that"):
            prove(one, changed, example, [example, batch], forward, {})
    with pytest.raises(SurgeryError, match="no floating tensor to compare for batch 1; give real"):
        prove(one, changed, example, [batch], lambda model, given: None, {})


class Views(nn.Module):
    """Overwrites what another name of the same memory is read by later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(144, 3)

    def forward(self, x):
        x = self.conv(x)
        flat = x.flatten(1)
        return self.fc(torch.relu_(x).flatten(1) + flat)


def test_memory_with_two_names_is_refused_and_not_broken():
    torch.manual_seed(0)
    model = Views().eval()
    before = state(model)
    with pytest.raises(SurgeryError, match=r"in output 0 for the example.*operation in place"):
        introduce(model, images(2), "after-addition", calibrate=data())
    assert state(model) == before
    network, _ = introduce(model, images(2), calibrate=data())
    assert relative(model(images()), network(images())) <= BUDGET


# Refusals


def batches_with(value: float):
    batches = data()
    batches[1][0, 0, 0, 0] = value
    return batches


REFUSED = [
    ({"statistics": "layer"}, ConfigError,
     "cannot keep what the network computes with statistics 'layer': each sample is normalized by"),
    ({"pattern": "n c h w -> n c"}, ConfigError, "with statistics 'n c h w -> n c': each sample"),
    ({"dense_statistics": "layer"}, ConfigError, "with statistics 'layer'"),
    ({"affine": False}, ConfigError, "by gamma and beta; leave out affine=False"),
    ({"calibrate": 3}, ConfigError, "calibrate is of type int; give a batch as a tensor, or a loa"),
    ({"calibrate": []}, SurgeryError, "calibrate= gave no batch, so there are no statistics"),
    ({"calibrate": ["seven"]}, SurgeryError, "batch 1 is of type str, which holds no input"),
    ({"calibrate": [{"picture": images(2)}]}, SurgeryError, "batch 1 is a dict of picture, which"),
    ({"calibrate": [images(2), images(2, 3)]}, RuntimeError, "expected input.* to have 1 channels"),
    ({"calibrate": data(size=16), "statistics": "per-activation", "where": "conv1"}, ShapeError,
     r"'n c h w -> c h w' was built for h=8 but got \(5, 16, 16, 16\); a norm that owns"),
    ({"calibrate": data((1,)), "where": "fc1"}, SurgeryError,
     "'fc1_norm' was given 1 values per statistic by 1 batches, and two are the least"),
    ({"forward": lambda model, batch: None}, SurgeryError, "'conv1_norm' was given 0 values"),
    ({"calibrate": batches_with(math.nan)}, SurgeryError,
     "what goes into 'conv1_norm' has a value that is not finite in batch 2; look for NaN"),
    ({"calibrate": batches_with(math.inf), "where": "fc1"}, SurgeryError, "'fc1_norm' .* batch 2;"),
    ({"calibrate": [batch * 1e25 for batch in data()], "where": "conv1"}, SurgeryError,
     "'conv1_norm' keeps its statistics as torch.float32, which cannot hold a variance of"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "match"), REFUSED)
def test_a_refusal_names_the_reason_and_touches_nothing(options, kind, match):
    model = trained()
    before = state(model)
    with pytest.raises(kind, match=match):
        introduce(model, images(2), **{"calibrate": data(), **options})
    assert state(model) == before


def test_an_output_that_cannot_be_compared_is_refused():
    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = built("standard")

        def forward(self, x):
            return self.net(x).argmax(1)

    with pytest.raises(SurgeryError, match=r"no floating tensor to compare for the example; give"):
        introduce(Best().eval(), images(2), calibrate=data())


@pytest.mark.parametrize("stage", ["measure", "settle", "prove"])
def test_whatever_fails_the_model_is_as_it_was(stage, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    model = trained().train()
    before = state(model)
    monkeypatch.setattr(introducing, stage, fail)
    with pytest.raises(KeyboardInterrupt):
        introduce(model, images(2), calibrate=data())
    assert state(model) == before


def test_a_loader_that_fails_fails_with_its_own_error():
    def batches():
        yield images(2)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        introduce(trained(), images(2), calibrate=batches())


def test_what_measures_and_proves_leaves_the_networks_as_they_are():
    model = trained()
    network, _ = introduce(model, images(2))
    names = [*norms_of(network)]
    before, other = state(network), state(model)
    found = measure(network, names, Data(data()), None)
    assert state(network) == before
    assert found.batches == 3
    assert [*found.norms] == names
    with pytest.raises(SurgeryError, match="would change what the network computes"):
        prove(model, network, images(2), (), None, {})
    assert (state(network), state(model)) == (before, other)


def test_a_network_is_proved_to_be_itself():
    model = trained()
    proof = prove(model, trace(model, images(2)), images(2), data(), None, {})
    assert (proof.difference.absolute, proof.budget, proof.exact) == (0.0, BUDGET, None)
    assert proof.difference.scale > 0
