"""Folding: right on every layer that can absorb a norm, and never a wrong answer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from evenkeel.errors import SurgeryError
from evenkeel.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm, PerActivationBatchNorm
from evenkeel.surgery import fold as fold_module
from evenkeel.surgery.fold import BUDGET, FoldReport, fold, folded_weights
from evenkeel.surgery.introduce import introduce

from .nets import ALL, TwoFaced, built, images, kinds, randomized, state

SHAPES = {1: (4, 4, 9), 2: (4, 4, 7, 7), 3: (4, 4, 5, 5, 5)}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
OURS = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}
TORCHS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
KINDS = {
    "plain": {},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4},
    "dilated": {"dilation": 2},
    "strided": {"stride": 2, "padding": 1},
    "reflecting": {"padding": 1, "padding_mode": "reflect"},
}


def example(shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def assert_same(model, folded, x, tolerance):
    """Equal on inputs that the fold has not seen."""
    wanted = copy.deepcopy(model).eval()(x)
    assert wanted.abs().max() > 0.1
    difference = (folded(x) - wanted).abs().max()
    assert difference <= tolerance * wanted.abs().max(), float(difference)


def all_folded(model, x, tolerance=BUDGET):
    """Folds, and insists that no norm is left and that the network computes the same."""
    before = state(model)
    folded, report = fold(model, x)
    assert state(model) == before
    assert report.left == ()
    assert report.folded
    assert not any(isinstance(m, fold_module.NORMS) for m in folded.modules())
    for _, name in report.folded:
        layer = folded.get_submodule(name)
        assert layer.bias.shape == (getattr(layer, "out_channels", layer.bias.numel()),)
    assert_same(model, folded, example(x.shape, x.dtype, seed=2), tolerance)
    return folded, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_of_every_kind(rank, kind, bias, affine, dtype):
    torch.manual_seed(0)
    conv = CONVS[rank](4, 8, 3, bias=bias, **KINDS[kind])
    for norms in (OURS, TORCHS):
        model = nn.Sequential(conv, norms[rank](8, affine=affine)).to(dtype)
        x = example(SHAPES[rank], dtype)
        tolerance = 1e-13 if dtype == torch.float64 else 2e-6
        folded, report = all_folded(randomized(model), x, tolerance)
        assert report.folded == (("1", "0"),)
        assert folded.get_submodule("0").bias.dtype == dtype


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "output_padding": 1}, {"dilation": 2}])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_convolutions(rank, options, bias):
    torch.manual_seed(0)
    layer = TRANSPOSED[rank](4, 6, 3, bias=bias, **options)
    model = nn.Sequential(layer, OURS[rank](6)).double()
    all_folded(randomized(model), example(SHAPES[rank], torch.float64), 1e-13)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "norm",
    [
        BatchNorm1d(6),
        nn.BatchNorm1d(6),
        nn.BatchNorm1d(6, affine=False),
        nn.SyncBatchNorm(6),
        Norm("n c -> c", c=6),
        Norm("n c -> c", affine=None, c=6),
        Norm("n ... -> ", affine=None),
        Norm("n c ->", affine="c", c=6),
        Norm("n c ->"),
        PerActivationBatchNorm(6),
        PerActivationBatchNorm(6, affine=False),
    ],
    ids=str,
)
def test_dense_layers(norm, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6, bias=bias), copy.deepcopy(norm)).double()
    all_folded(randomized(model), example((7, 5), torch.float64), 1e-13)


@pytest.mark.parametrize("pattern", ["n c ... -> c", "n c h w -> c", "n k a b -> k"])
def test_patterns_that_mean_spatial(pattern):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), Norm(pattern, **{pattern[2]: 6})).double()
    all_folded(randomized(model), example(SHAPES[2], torch.float64), 1e-13)


def test_the_folded_weights_are_those_of_torch():
    torch.manual_seed(0)
    for layer, norm, x, theirs in (
        (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), SHAPES[2], fuse_conv_bn_eval),
        (nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), SHAPES[1], fuse_conv_bn_eval),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4), fuse_linear_bn_eval),
        (
            nn.ConvTranspose2d(4, 6, 3),
            nn.BatchNorm2d(6),
            SHAPES[2],
            lambda conv, bn: fuse_conv_bn_eval(conv, bn, transpose=True),
        ),
    ):
        model = randomized(nn.Sequential(layer, norm)).double().eval()
        folded, _ = fold(model, example(x, torch.float64))
        wanted = theirs(model[0], model[1])
        torch.testing.assert_close(folded.get_submodule("0").weight, wanted.weight)
        torch.testing.assert_close(folded.get_submodule("0").bias, wanted.bias)


def test_the_arithmetic_is_done_in_float64():
    """A bias that cancels against the mean: in float32 nothing would be left of it."""
    weight, bias = torch.ones(1, 1), torch.tensor([1000.0])
    scale = torch.tensor([100.0], dtype=torch.float64)
    shift = torch.tensor([-1000.001 * 100], dtype=torch.float64)
    folded_weight, folded_bias = folded_weights(weight, bias, scale, shift)
    assert folded_weight.dtype == folded_bias.dtype == torch.float32
    assert folded_weight.item() == 100
    assert folded_bias.item() == pytest.approx(-0.1, rel=1e-6)
    assert folded_weights(weight, None, scale, shift)[1].item() == pytest.approx(-100000.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_and_zero_variances(dtype):
    model = nn.Sequential(nn.Conv2d(4, 3, 3), BatchNorm2d(3)).to(dtype)
    model[1].running_var.copy_(torch.tensor([1e-14, 0.0, 1e-30]))
    model[1].running_mean.copy_(torch.tensor([0.3, -0.2, 0.0]))
    all_folded(model, example(SHAPES[2], dtype), 1e-13 if dtype == torch.float64 else 2e-6)


def far_from_zero(dtype):
    """Outputs of mean 1000 and deviation 0.01, which a norm has learned."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 3, 3), BatchNorm2d(3, eps=1e-9), nn.Flatten(), nn.Linear(75, 2)
    )
    nn.init.constant_(model[0].bias, 1000.0)
    nn.init.constant_(model[1].running_mean, 1000.0)
    nn.init.constant_(model[1].running_var, 1e-4)
    return model.to(dtype), example(SHAPES[2], dtype) * 0.01


def test_a_mean_far_above_the_deviation_folds_in_double():
    model, x = far_from_zero(torch.float64)
    folded, report = fold(model, x)
    assert len(report.folded) == 1
    assert (folded(x) - model.eval()(x)).abs().max() < 1e-9


def test_a_mean_far_above_the_deviation_is_refused_in_single():
    """The unfolded network itself has lost its digits there, so the two cannot be shown equal."""
    model, x = far_from_zero(torch.float32)
    before = state(model)
    with pytest.raises(
        SurgeryError, match=r"changed the output by .* usual causes are a running m"
    ):
        fold(model, x)
    assert state(model) == before


def test_gammas_of_zero_and_below():
    model = nn.Sequential(
        nn.Conv2d(4, 3, 3), BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1)
    ).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.0, -2.0, 1.0]))
        model[1].bias.copy_(torch.tensor([0.5, -0.5, 0.0]))
    folded, _ = all_folded(model, example(SHAPES[2], torch.float64), 1e-13)
    assert folded.get_submodule("0").weight[0].abs().max() == 0
    assert folded.get_submodule("0").bias[0] == 0.5


def test_norm_behind_norm():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), BatchNorm2d(6), nn.BatchNorm2d(6)).double()
    _, report = all_folded(randomized(model), example(SHAPES[2], torch.float64), 1e-13)
    assert report.folded == (("1", "0"), ("2", "0"))


@pytest.mark.parametrize(
    ("name", "placement", "folded", "left"),
    [
        ("standard", "before-activation", 3, 0),
        ("standard", "after-activation", 0, 3),
        ("standard", "on-input", 0, 4),
        ("standard", "after-pooling", 0, 2),
        ("standard", "after-addition", 3, 0),
        ("paper", "before-activation", 3, 0),
        ("lenet5", "before-activation", 4, 0),
        ("residual", "before-activation", 8, 0),
        ("residual", "after-addition", 4, 3),
        ("residual", "after-activation", 0, 7),
        ("residual-pre", "before-activation", 8, 0),
        ("residual-pre", "after-addition", 3, 4),
    ],
)
def test_introduced_norms_fold_where_a_layer_is_before_them(name, placement, folded, left):
    network, introduced = introduce(built(name), images(2), placement)
    randomized(network)
    result, report = fold(network, images(8))
    assert (len(report.folded), len(report.left)) == (folded, left)
    names = [n for n, _ in (*report.folded, *report.left)]
    assert sorted(names) == sorted(n for n, _ in introduced.norms)
    assert_same(network, result, images(16, seed=3), 1e-5)
    assert sum("BatchNorm" in kind for kind in kinds(result)) == left


@pytest.mark.parametrize("statistics", ["spatial", "per-activation", "per-location", "layer"])
def test_statistics_decide_what_folds(statistics):
    network, _ = introduce(built("standard"), images(2), statistics=statistics)
    randomized(network)
    result, report = fold(network, images(8))
    expected = {"spatial": 3, "per-activation": 1, "per-location": 1, "layer": 0}
    assert len(report.folded) == expected[statistics]
    assert_same(network, result, images(16, seed=3), 1e-5)


@pytest.mark.parametrize("name", ALL)
def test_introducing_and_folding_gives_the_network_back(name):
    """Fresh norms in inference scale by 1 / sqrt(1 + eps) alone."""
    model = built(name)
    network, _ = introduce(model, images(2), eps=1e-12)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") and network.get_submodule(key[:-5]).bias is None:
                parameter.zero_()
    result, _ = fold(network, images(4))
    torch.testing.assert_close(result(images()), model.eval()(images()), atol=1e-5, rtol=1e-5)


def test_a_trained_network_folds_to_equal_logits():
    network, _ = introduce(built("standard"), images(2))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    labels = torch.arange(32) % 10
    for step in range(15):
        optimizer.zero_grad()
        F.cross_entropy(network(images(32, seed=step)), labels).backward()
        optimizer.step()
    result, report = all_folded(network, images(32), 1e-5)
    assert report.difference <= 1e-5 * report.scale
    assert kinds(result) == [
        "Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "MaxPool2d", "Flatten", "Linear", "ReLU",
        "Linear",
    ]  # fmt: skip


# The report and the original


def test_the_reports_numbers_are_true():
    model = randomized(
        nn.Sequential(nn.Conv2d(1, 4, 3), BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    )
    x = images(8)
    folded, report = fold(model, x)
    with torch.no_grad():
        wanted, given = copy.deepcopy(model).eval()(x), folded(x)
    assert report == FoldReport(
        folded=(("1", "0"),),
        left=(("3", "its input comes from '2', which is not a conv or dense layer"),),
        difference=float((given - wanted).abs().max()),
        scale=float(wanted.abs().max()),
        budget=BUDGET,
    )
    assert 0 < report.difference < 1e-5
    assert report.to_dict()["left"] == report.left
    assert str(report).splitlines() == [
        "1 norms folded, 1 left",
        "  1 into 0",
        "  3 stays: its input comes from '2', which is not a conv or dense layer",
        f"  largest output difference {report.difference:.2e} of {report.scale:.3g} "
        "(budget 1e-05 relative)",
    ]


@pytest.mark.parametrize("training", [True, False])
def test_the_original_is_untouched_and_the_fold_is_for_inference(training):
    model = randomized(nn.Sequential(nn.Conv2d(1, 4, 3), BatchNorm2d(4), nn.Dropout()))
    model.train(training)
    model[1].train(not training)
    before = state(model)
    folded, _ = fold(model, images())
    assert state(model) == before
    assert not any(m.training for m in folded.modules())
    with torch.no_grad():
        folded.get_submodule("0").weight.fill_(0)
    assert state(model) == before


@pytest.mark.parametrize("measured", [(1.0, 1.0), (1.01e-5, 1.0), (float("nan"), 1.0), (1e-9, 0.0)])
def test_over_the_budget_nothing_comes_of_it(measured, monkeypatch):
    model = randomized(built("standard"))
    network, _ = introduce(model, images(2))
    before = state(network)
    monkeypatch.setattr(fold_module, "_compare", lambda *arguments: measured)
    with pytest.raises(SurgeryError, match=r"folding changed the output by .* nothing was changed"):
        fold(network, images())
    assert state(network) == before


def test_an_accident_on_the_way_touches_nothing(monkeypatch):
    network, _ = introduce(built("standard"), images(2))
    before = state(network)
    calls = []

    def absorb(value, node):
        calls.append(node.name)
        if len(calls) == 3:
            raise MemoryError("no memory for the third")

    monkeypatch.setattr(fold_module, "_absorb", absorb)
    with pytest.raises(MemoryError):
        fold(network, images())
    assert len(calls) == 3
    assert state(network) == before


def test_a_wrong_fold_is_caught_by_the_comparison(monkeypatch):
    def careless(weight, bias, scale, shift, axis=0):
        return weight, bias if bias is not None else torch.zeros(len(scale))

    monkeypatch.setattr(fold_module, "folded_weights", careless)
    with pytest.raises(SurgeryError, match="folding changed the output"):
        fold(randomized(nn.Sequential(nn.Conv2d(1, 4, 3), BatchNorm2d(4))), images())


def test_outputs_that_cannot_be_compared_are_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(SurgeryError, match="gives tuple, not one tensor, to compare"):
        fold(Pair(), images())
    with pytest.raises(SurgeryError, match="the example gives no output to compare"):
        fold(nn.Sequential(nn.Conv2d(1, 2, 3), BatchNorm2d(2)), images(0))


def test_what_a_network_does_in_training_is_nobodys_concern():
    model = TwoFaced()
    model.fc1 = nn.Sequential(model.fc1, randomized(BatchNorm1d(4)))
    all_folded(model, example((5, 4)))


def test_half_precision_folds_or_is_refused():
    torch.manual_seed(0)
    model = randomized(nn.Sequential(nn.Conv2d(4, 6, 3), BatchNorm2d(6))).bfloat16()
    with pytest.raises(SurgeryError, match=r"half precision \(fold in float32, then convert\)"):
        fold(model, example(SHAPES[2], torch.bfloat16))
    model[1].reset_parameters()
    assert len(fold(model, example(SHAPES[2], torch.bfloat16))[1].folded) == 1
