"""Folding: right on every layer that can absorb a norm, and never a wrong answer."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from evenkeel.errors import SurgeryError
from evenkeel.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm, PerActivationBatchNorm
from evenkeel.surgery import fold as fold_module
from evenkeel.surgery.fold import BUDGET, Folded, FoldReport, fold, folded_weights
from evenkeel.surgery.folding import absorbing, pushing
from evenkeel.surgery.folding.proof import drawn_like
from evenkeel.surgery.introduce import introduce
from evenkeel.surgery.unfold import unfold

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


def pairs(report):
    """Each norm that was folded, with what it was folded into."""
    return [(one.norm, *one.into) for one in report.folded]


def all_folded(model, x, tolerance=BUDGET):
    """Folds, and insists that no norm is left and that the network computes the same."""
    before = state(model)
    folded, report = fold(model, x)
    assert state(model) == before
    assert report.left == ()
    assert report.folded
    assert not any(isinstance(m, fold_module.NORMS) for m in folded.modules())
    for name in {name for one in report.folded for name in one.into}:
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
        assert pairs(report) == [("1", "0")]
        assert folded.get_submodule("0").bias.dtype == dtype


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "output_padding": 1}, {"dilation": 2}, {"groups": 2, "padding": 1}],
)
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


def test_a_mean_far_above_the_deviation_is_judged_by_the_rounding_that_was_there():
    """In single precision the network itself is far from exact; folded, it is no farther."""
    model, x = far_from_zero(torch.float32)
    folded, report = fold(model, x)
    exact = copy.deepcopy(model).double().eval()(x.double())
    own, new = ((net(x) - exact).abs().max() for net in (model.eval(), folded))
    assert report.budget > 10 * BUDGET
    assert new < 10 * own
    assert report.exact < 1e-9


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
    assert pairs(report) == [("1", "0"), ("2", "0")]


@pytest.mark.parametrize(
    ("name", "placement", "folded", "left"),
    [
        ("standard", "before-activation", 3, 0),
        ("standard", "after-activation", 1, 2),  # a maximum takes no negative scales
        ("standard", "on-input", 4, 0),
        ("standard", "after-pooling", 2, 0),
        ("standard", "after-addition", 3, 0),
        ("paper", "before-activation", 3, 0),
        ("lenet5", "before-activation", 4, 0),
        ("residual", "before-activation", 8, 0),
        ("residual", "after-addition", 5, 2),
        ("residual", "after-activation", 5, 2),
        ("residual-pre", "before-activation", 8, 0),
        ("residual-pre", "after-addition", 3, 4),
    ],
)
def test_introduced_norms_fold_where_a_layer_is_before_or_behind(name, placement, folded, left):
    network, introduced = introduce(built(name), images(2), placement)
    randomized(network)
    result, report = fold(network, images(8))
    assert (len(report.folded), len(report.left)) == (folded, left)
    names = [one[0] for one in (*report.folded, *report.left)]
    assert sorted(names) == sorted(n for n, _ in introduced.norms)
    assert_same(network, result, images(16, seed=3), 1e-5)
    assert not any("BatchNorm" in kind for kind in kinds(result))
    assert kinds(result).count("ScaleShift") == left


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
    reason = (
        "before it: it has a shift, which does not pass '2'; "
        "behind it: it is an output of the network"
    )
    with torch.no_grad():
        found = [
            (float((folded(one) - wanted).abs().max()), float(wanted.abs().max()))
            for one in (x, drawn_like(x, 1))
            for wanted in [copy.deepcopy(model).eval()(one)]
        ]
    assert (report.difference, report.scale) == max(found, key=lambda pair: pair[0] / pair[1])
    assert report == FoldReport(
        folded=(Folded("1", ("0",), (), "backward", report.folded[0].difference),),
        left=(("3", reason),),
        difference=report.difference,
        scale=report.scale,
        budget=BUDGET,
        exact=report.exact,
    )
    assert 0 < report.difference < 1e-5
    assert 0 < report.folded[0].difference < 1e-12
    assert 0 < report.exact < 1e-12
    assert json.loads(json.dumps(report.to_dict()))["left"] == [["3", reason]]
    assert str(report).splitlines() == [
        "1 norms folded, 1 left",
        "  1 into 0",
        f"  3 stays: {reason}",
        f"  largest output difference {report.difference:.2e} of {report.scale:.3g} "
        "(budget 1e-05 relative)",
        f"  in double precision {report.exact:.1e} relative",
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


@pytest.mark.parametrize("apart", [1.01e-5, float("nan"), 1.0])
def test_over_the_budget_nothing_comes_of_it(apart, monkeypatch):
    """The comparison in the network's own precision, and what comes before it."""
    network, _ = introduce(randomized(built("standard")), images(2))
    before = state(network)
    calls = []

    def measured(old, new):
        calls.append(old)
        narrow = all(t.dtype == torch.float32 for t in old)
        return (apart if narrow and len(calls) % 2 else 0.0, 1.0)

    monkeypatch.setattr(fold_module, "largest_apart", measured)
    monkeypatch.setattr(fold_module, "WORSE", 0.0)
    with pytest.raises(SurgeryError, match=r"folding changed the output by .* nothing was changed"):
        fold(network, images())
    assert state(network) == before


def test_what_torch_fx_cannot_see_is_refused():
    """On stand-ins ``v += x`` is ``v = v + x``, and the other name keeps the old value."""

    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = BatchNorm2d(1)

        def forward(self, x):
            y = x * 2
            v = y
            v += x
            return self.bn(v) + y

    with pytest.raises(SurgeryError, match=r"what torch.fx sees of Alias does something else"):
        fold(randomized(Alias()), images())


@pytest.mark.parametrize("place", ["absorb_behind", "_remove"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_accident_on_the_way_touches_nothing(place, at, monkeypatch):
    network, _ = introduce(built("standard"), images(2))
    before = state(network)
    calls = []
    own = getattr(pushing, place)

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise MemoryError("no memory")
        return own(*arguments)

    monkeypatch.setattr(pushing, place, fails)
    with pytest.raises(MemoryError):
        fold(network, images())
    assert len(calls) == at
    assert state(network) == before


@pytest.mark.parametrize("stage", ["trace", "record", "expand", "settle", "per_norm", "_narrow"])
def test_an_accident_at_any_stage_touches_nothing(stage, monkeypatch):
    network, _ = introduce(built("standard"), images(2))
    before = state(network)

    def fails(*arguments, **options):
        raise MemoryError(f"no memory to {stage}")

    monkeypatch.setattr(fold_module, stage, fails)
    with pytest.raises(MemoryError):
        fold(network, images())
    assert state(network) == before


def test_a_wrong_fold_is_caught_at_the_norm_that_it_happened_to(monkeypatch):
    def careless(weight, bias, scale, shift, axis=0):
        return weight, bias if bias is not None else torch.zeros(len(scale))

    monkeypatch.setattr(absorbing, "folded_weights", careless)
    with pytest.raises(SurgeryError, match=r"folding '1' into 0 changed what comes behind it"):
        fold(randomized(nn.Sequential(nn.Conv2d(1, 4, 3), BatchNorm2d(4))), images())


def test_weights_that_go_wrong_at_the_end_are_caught(monkeypatch):
    def careless(traced, dtypes):
        for parameter in traced.parameters():
            parameter.data.mul_(1.001)
        return own(traced, dtypes)

    own = fold_module._narrow
    monkeypatch.setattr(fold_module, "_narrow", careless)
    with pytest.raises(SurgeryError, match=r"folding changed the output by .* is allowed"):
        fold(randomized(nn.Sequential(nn.Conv2d(1, 4, 3), BatchNorm2d(4))), images())


def test_several_inputs_and_outputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 4, 3), BatchNorm2d(4)

        def forward(self, x, y):
            x = self.bn(self.conv(x + y))
            return {"all": x, "rows": [x.mean(3)]}

    model = randomized(Pair())
    given = (images(), images(seed=1))
    for inputs in (given, dict(zip("xy", given, strict=True))):
        folded, report = fold(model, inputs)
        assert pairs(report) == [("bn", "conv")]
        with torch.no_grad():
            wanted, found = model.eval()(*given), folded(*given)
        torch.testing.assert_close(found, wanted)
    with pytest.raises(SurgeryError, match=r"the example has z, but the network takes x, y"):
        fold(model, {"z": images()})


def test_outputs_without_values_are_refused():
    with pytest.raises(SurgeryError, match="the example gives no output to compare"):
        fold(nn.Sequential(nn.Conv2d(1, 2, 3), BatchNorm2d(2)), images(0))


def test_what_a_network_does_in_training_is_nobodys_concern():
    model = TwoFaced()
    model.fc1 = nn.Sequential(model.fc1, randomized(BatchNorm1d(4)))
    all_folded(model, example((5, 4)))


def test_half_precision_is_judged_by_its_own_rounding():
    torch.manual_seed(0)
    model = randomized(nn.Sequential(nn.Conv2d(4, 6, 3), BatchNorm2d(6))).bfloat16()
    x = example(SHAPES[2], torch.bfloat16)
    folded, report = fold(model, x)
    exact = copy.deepcopy(model).double().eval()(x.double())
    own, new = ((net(x) - exact).abs().max() for net in (model.eval(), folded))
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}
    assert new < 3 * own
    assert report.exact < 1e-12


def test_weights_too_large_for_their_type_are_not_made():
    model = nn.Sequential(nn.Conv2d(4, 6, 1), BatchNorm2d(6, eps=1e-30)).half()
    model[1].running_var.fill_(0)
    model[1].running_var[0] = 1
    _, report = fold(model, example(SHAPES[2], torch.float16) * 0)
    assert report.left[0][1].startswith(
        "before it: the weights of '0' would be too large for their type"
    )


def test_what_insists_on_single_precision_is_folded_in_it():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 4, 3), BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x.float()))

    model = randomized(Single())
    folded, report = fold(model, images())
    assert pairs(report) == [("bn", "conv")]
    assert report.exact is None
    assert_same(model, folded, images(seed=2), BUDGET)


def test_dead_channels_and_subnormal_weights_are_noted():
    model = nn.Sequential(nn.Conv2d(4, 3, 3), BatchNorm2d(3))
    model[1].running_var.copy_(torch.tensor([1e-14, 0.5, 2.0]))
    with torch.no_grad():
        model[1].weight[1] = 1e-38
    folded, report = fold(model, example(SHAPES[2]))
    weight = folded.get_submodule("0").weight
    assert not ((weight != 0) & (weight.abs() < torch.finfo(torch.float32).tiny)).any()
    assert report.notes[0] == (
        "1: 1 of 3 variances are below 1e-12, so x is scaled by up to 316 there"
    )
    assert "subnormal numbers of 0.weight are now 0" in report.notes[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_stays_has_the_networks_own_precision_single_at_least(dtype):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = BatchNorm2d(4)

        def forward(self, x):
            bn = self.bn
            y = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)
            return torch.relu(bn(torch.relu(bn(torch.relu(y)))))

    model = randomized(Net()).to(dtype)
    folded, report = fold(model, example(SHAPES[2], dtype))
    assert [name for name, _ in report.left] == ["batch_norm", "bn"]
    assert kinds(folded) == ["ScaleShift"] * 3
    kept = {t.dtype for t in folded.buffers()}
    assert kept == {torch.promote_types(dtype, torch.float32)}


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and detectron2 have it: all buffers, and a forward of its own."""

    def __init__(self, n, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((n,), float(value)))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


@pytest.mark.parametrize("eps", [1e-5, 0.0], ids=["usual", "torchvision's detectors"])
def test_frozen_norms_of_other_libraries(eps):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6, eps), nn.ReLU())
    _, report = all_folded(randomized(model).double(), example(SHAPES[2], torch.float64), 1e-13)
    assert pairs(report) == [("1", "0")]


def test_rows_of_an_embedding_take_a_norm_in():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 5, padding_idx=2)
            self.norm, self.fc = BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, words):
            return self.fc(self.norm(self.embedding(words).transpose(1, 2)).mean(2))

    model = randomized(Words())
    words = torch.arange(12).reshape(2, 6) % 7
    folded, report = fold(model, words)
    assert report.folded[0][:3] == ("norm", ("embedding",), ("transpose",))
    torch.testing.assert_close(folded(words), model.eval()(words))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tied_weights_keep_their_type(dtype):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model[3].weight = model[0].weight
    folded, report = fold(randomized(model).to(dtype), example(SHAPES[2], dtype))
    assert pairs(report) == [("1", "0")]
    assert {p.dtype for p in folded.parameters()} == {dtype}


def test_a_value_that_a_layer_made_for_its_norm_alone_may_be_written_over():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.next = nn.Conv2d(4, 6, 3), BatchNorm2d(6), nn.Conv2d(6, 6, 1)

        def forward(self, x):
            v = self.bn(self.conv(x))
            y = v.sigmoid()
            return self.next(F.relu_(v)) + v + y

    model = randomized(InPlace())
    folded, report = fold(model, example(SHAPES[2]))
    assert pairs(report) == [("bn", "conv")]
    assert_same(model, folded, example(SHAPES[2], seed=2), BUDGET)


def test_a_trial_in_double_precision_that_fails_is_not_heard(capfd):
    class Single(nn.Sequential):
        def forward(self, x):
            return super().forward(x.float())

    fold(Single(nn.Conv2d(4, 6, 3), BatchNorm2d(6)), example(SHAPES[2]))
    assert capfd.readouterr().err == ""


def test_packed_for_the_cpu():
    network, _ = introduce(built("residual"), images(2))
    folded, report = fold(randomized(network), images(), pack=True)
    plain, other = fold(network, images())
    assert report.folded == other.folded
    assert "PackedConv2d" in kinds(folded)
    assert "PackedConv2d" not in kinds(plain)
    assert folded.state_dict().keys() == plain.state_dict().keys()
    assert_same(network, folded, images(seed=2), BUDGET)
    again, _ = unfold(folded, images(), report)
    assert again.state_dict().keys() >= {f"{one.norm}.running_mean" for one in report.folded}
    assert_same(network, again.eval(), images(seed=2), BUDGET)
