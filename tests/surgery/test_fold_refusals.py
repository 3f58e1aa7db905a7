"""What must not be folded is left where it is, with the reason; and random networks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evenkeel.nn import BatchNorm1d, BatchNorm2d, Norm, PerActivationBatchNorm
from evenkeel.nn.folded import ScaleShift
from evenkeel.surgery.fold import fold
from evenkeel.surgery.graph import NORMS

from .nets import randomized, state


class Net(nn.Module):
    """A convolution and a norm, put together by a function."""

    def __init__(self, how, **modules: nn.Module) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = BatchNorm2d(4)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.how(self, x)


class OurWithActivation(BatchNorm2d):
    """A subclass of ours that does more."""

    def forward(self, x):
        return F.relu(super().forward(x))


class NormWithActivation(Norm):
    """A subclass of the pattern norm that does more."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Standardized(nn.Conv2d):
    """A convolution whose weights are not what it multiplies with."""

    def forward(self, x):
        weight = self.weight - self.weight.mean()
        return F.conv2d(x, weight, self.bias)


def hooked(module, kind="forward"):
    if kind == "forward":
        module.register_forward_hook(lambda m, args, output: output * 2)
    else:
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    return module


def chain(*modules):
    return nn.Sequential(*modules)


def conv(outputs=4, inputs=1):
    return nn.Conv2d(inputs, outputs, 3)


OUT = "; behind it: it is an output of the network"
SAMPLE = "each sample has its own statistics"
PLACES = (
    "before it: it has more than one scale or shift for each channel of '0', which are axis 1 of "
    "(4, 4, 4, 4)" + OUT
)
MORE = "'{}' is a {}, which may do more than its base"


def both(before, behind=OUT):
    """The reasons against both directions."""
    return f"before it: {before}{behind}"


IMAGE, ROW, LINE = (4, 1, 6, 6), (4, 5), (4, 3, 5)

LEFT = {
    "conv output also used elsewhere": (
        Net(lambda m, x: m.bn(y := m.conv(x)) + torch.relu(y)), IMAGE,
        {"bn": both("the output of 'conv' is also used by relu",
                    "; behind it: 'add' adds something to it, which must not be scaled")},
    ),
    "conv output is an output too": (
        Net(lambda m, x: torch.cat([m.bn(y := m.conv(x)), y])), IMAGE,
        {"bn": both("the output of 'conv' is also used by cat",
                    "; behind it: 'cat' joins along the batch axis")},
    ),
    "two norms on one conv": (
        Net(lambda m, x: m.bn(y := m.conv(x)) * m.other(y), other=BatchNorm2d(4)), IMAGE,
        {"bn": both("the output of 'conv' is also used by other",
                    "; behind it: nothing is known of how a scale and shift pass 'mul' "
                    "(a function)"),
         "other": both("the output of 'conv' is also used by bn",
                       "; behind it: nothing is known of how a scale and shift pass 'mul' "
                       "(a function)")},
    ),
    "conv called twice, norm on one call": (
        Net(lambda m, x: m.conv(m.bn(m.conv(x)).sum(1, keepdim=True))), IMAGE,
        {"bn": both("'conv' is used more than once",
                    "; behind it: nothing is known of how a scale and shift pass 'sum_1' "
                    "(a function)")},
    ),
    "conv called twice, norm before and behind": (
        chain(BatchNorm2d(1), *[conv(1)] * 2, BatchNorm2d(1)), IMAGE,
        {"0": "before it: 'input_1' is an input of the network; "
              "behind it: '1' is used more than once",
         "3": both("'1' is used more than once")},
    ),
    "conv under two names": (
        (lambda c: chain(c, BatchNorm2d(1), c, BatchNorm2d(1)))(conv(1)), IMAGE,
        {"1": "before it: '0' is used more than once; behind it: '0' is used more than once",
         "3": both("'0' is used more than once")},
    ),
    "weights tied to another layer's": (
        Net(lambda m, x: F.conv_transpose2d(m.bn(m.conv(x)), m.conv.weight)), IMAGE,
        {"bn": both("'conv' is used more than once",
                    "; behind it: nothing is known of how a scale and shift pass "
                    "'conv_transpose2d' (a function)")},
    ),
    "our norm with activation": (
        chain(conv(), OurWithActivation(4)), IMAGE, {"1": MORE.format(1, "OurWithActivation")},
    ),
    "pattern norm with activation": (
        chain(conv(), NormWithActivation("n c ... -> c", c=4)), IMAGE,
        {"1": MORE.format(1, "NormWithActivation")},
    ),
    "conv with weights of its own making": (
        chain(Standardized(1, 4, 3), BatchNorm2d(4)), IMAGE,
        {"1": both("nothing is known of how a scale and shift pass 'conv2d' (a function)")},
    ),
    "a hook on the layer": (
        chain(hooked(conv()), BatchNorm2d(4)), IMAGE,
        {"1": both("'0' has hooks, which may change what it computes")},
    ),
    "a hook on the norm": (
        chain(conv(), hooked(BatchNorm2d(4), "before")), IMAGE,
        {"1": "'1' has hooks, which may change what it computes"},
    ),
    "a hook on what is between": (
        chain(conv(), hooked(nn.Dropout()), BatchNorm2d(4)), IMAGE,
        {"2": both("nothing is known of how a scale and shift pass '1' (Dropout)")},
    ),
    "no running statistics": (
        chain(conv(), BatchNorm2d(4, track_running_stats=False)), IMAGE,
        {"1": "it has no running statistics"},
    ),
    "a pattern without running statistics": (
        chain(conv(), Norm("n c ... -> c", c=4, track_running_stats=False)), IMAGE,
        {"1": "it has no running statistics"},
    ),
    "layer norm": (chain(conv(), nn.LayerNorm([4, 4, 4])), IMAGE, {"1": SAMPLE}),
    "group norm": (chain(conv(), nn.GroupNorm(2, 4)), IMAGE, {"1": SAMPLE}),
    "instance norm": (chain(conv(), nn.InstanceNorm2d(4)), IMAGE, {"1": SAMPLE}),
    "our layer norm": (chain(conv(), Norm("n c h w -> n", "c", c=4)), IMAGE, {"1": SAMPLE}),
    "functional norm of the batch": (
        Net(lambda m, x: F.batch_norm(m.conv(x), None, None, training=True)), IMAGE,
        {"batch_norm": "it uses the statistics of each batch (training=True)"},
    ),
    "linear with more axes": (
        chain(nn.Linear(5, 3), BatchNorm1d(3)), LINE,
        {"1": both("it has more than one scale or shift for each channel of '0', which are axis 2 "
                   "of (4, 3, 3)")},
    ),
    "conv of one sample": (
        chain(nn.Conv1d(4, 3, 3), BatchNorm1d(3)), (4, 5),
        {"1": both("channels are not the second axis of what '0' gives")},
    ),
    "behind the activation": (
        chain(conv(), nn.ReLU(), BatchNorm2d(4)), IMAGE,
        {"2": both("it has a shift, which does not pass '1'")},
    ),
    "behind an activation that scales do not pass": (
        chain(conv(), nn.SiLU(), BatchNorm2d(4)), IMAGE,
        {"2": both("nothing is known of how a scale and shift pass '1' (SiLU)")},
    ),
    "behind a pooling": (
        chain(conv(), nn.MaxPool2d(2), BatchNorm2d(4)), IMAGE,
        {"2": both("2 of its 4 scales are negative, and those do not pass '1'")},
    ),
    "behind an average that counts the padding": (
        chain(conv(), nn.AvgPool2d(2, padding=1), BatchNorm2d(4)), IMAGE,
        {"2": both("it has a shift, and '1' pads with zeros, which have none")},
    ),
    "behind ones put in": (
        chain(conv(), nn.ConstantPad2d(1, 1.0), BatchNorm2d(4)), IMAGE,
        {"2": both("'1' puts in values of its own")},
    ),
    "behind a dropout that is always on": (
        Net(lambda m, x: m.bn(F.dropout(m.conv(x), 0.0, True))), IMAGE,
        {"bn": both("nothing is known of how a scale and shift pass 'dropout' (a function)")},
    ),
    "on samples of the batch": (
        Net(lambda m, x: m.bn(m.conv(x).transpose(0, 1).contiguous())), IMAGE,
        {"bn": both("'transpose' mixes the batch axis with others")},
    ),
    "on the mean over the batch": (
        Net(lambda m, x: m.bn(m.conv(x).mean((0, 2), keepdim=True))), IMAGE,
        {"bn": both("'mean' takes the batch axis in")},
    ),
    "on a sum with a number": (
        Net(lambda m, x: m.bn(m.conv(x) + 1)), IMAGE, {"bn": both("'add' adds a number")},
    ),
    "on a value written over while it is in use": (
        Net(lambda m, x: m.bn(y := m.conv(x)) + 0 * y.relu_()), IMAGE,
        {"bn": "before it: 'conv' is written over in place while others use it; behind it: 'conv' "
               "is written over in place while others use it"},
    ),
    "per activation behind a conv": (
        chain(conv(), PerActivationBatchNorm((4, 4, 4))), IMAGE, {"1": PLACES},
    ),
    "per location": (chain(conv(), Norm("n c h w -> h w", h=4, w=4)), IMAGE, {"1": PLACES}),
    "per channel with gammas per place": (
        chain(conv(), Norm("n c h w -> c", "h w", c=4, h=4, w=4)), IMAGE, {"1": PLACES},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_left_with_the_reason(case):
    model, shape, left = LEFT[case]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    randomized(model)
    before = state(model)
    folded, report = fold(model, x)
    assert state(model) == before
    assert dict(report.left) == left
    assert report.folded == ()
    with torch.no_grad():
        torch.testing.assert_close(folded(x), copy.deepcopy(model).eval()(x), atol=1e-6, rtol=1e-5)


FRONTS = {
    IMAGE: chain(nn.Conv2d(1, 1, 1), BatchNorm2d(1)),
    (2, 4, 5, 5): chain(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("case", [case for case in LEFT if LEFT[case][1] in FRONTS])
def test_a_norm_that_stays_keeps_no_other_from_folding(case):
    """The same network with a foldable pair in front, and something between the two."""
    model, shape, left = LEFT[case]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    front = copy.deepcopy(FRONTS[shape])
    whole = randomized(chain(front, nn.Identity(), copy.deepcopy(model)))
    folded, report = fold(whole, x)
    assert ("0.1", ("0.0",)) in [one[:2] for one in report.folded]
    assert len(report.folded) + len(report.left) == 1 + len(left)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), whole.eval()(x), atol=1e-5, rtol=1e-5)


def test_what_would_have_gone_wrong_does_go_wrong():
    """The refusals are needed: folded by force, these networks compute something else."""
    model = randomized(chain(nn.Linear(3, 3), BatchNorm1d(3)))
    x = torch.randn(4, 3, 3)
    scale = model[1].weight * (model[1].running_var + 1e-5).rsqrt()
    forced = nn.Linear(3, 3)
    with torch.no_grad():
        forced.weight.copy_(model[0].weight * scale[:, None])
        forced.bias.copy_((model[0].bias - model[1].running_mean) * scale + model[1].bias)
        assert (forced(x) - model.eval()(x)).abs().max() > 0.1
        flat = x[:, 0]
        torch.testing.assert_close(forced(flat), model(flat))


# Random networks


@st.composite
def networks(draw):
    """A chain of layers, norms and what comes between, on images or rows, in float64."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    on_images = draw(st.booleans())
    channels = draw(st.sampled_from([2, 4]))
    shape = (3, channels, 6, 6) if on_images else (3, channels)
    modules: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        outputs = draw(st.sampled_from([2, 4]))
        bias, affine = draw(st.booleans()), draw(st.booleans())
        if on_images:
            groups = draw(st.sampled_from([1, 2]))
            kind = draw(st.sampled_from([nn.Conv2d, nn.ConvTranspose2d]))
            modules.append(kind(channels, outputs, 3, padding=1, groups=groups, bias=bias))
        else:
            modules.append(nn.Linear(channels, outputs, bias=bias))
        modules += [
            draw(st.sampled_from([nn.ReLU(), nn.LeakyReLU(-0.5), nn.Identity(), nn.Dropout()]))
            for _ in range(draw(st.sampled_from([0, 0, 1])))
        ]
        for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
            kinds = [
                lambda n, a=affine: (BatchNorm2d if on_images else BatchNorm1d)(n, affine=a),
                lambda n, a=affine: (nn.BatchNorm2d if on_images else nn.BatchNorm1d)(n, affine=a),
                lambda n: Norm("n c ... -> c", c=n),
                lambda n: Norm("n c ... ->", "c", c=n),
                lambda n: Norm("n c ... -> n", "c", c=n),
            ]
            modules.append(draw(st.sampled_from(kinds))(outputs))
        channels = outputs
    model = randomized(nn.Sequential(*modules).double(), draw(st.integers(0, 2**16)))
    return model, torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


@given(networks())
def test_random_networks_fold_right_or_are_left(case):
    model, x, unseen = case
    before = state(model)
    folded, report = fold(model, x)
    assert state(model) == before
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for inputs in (x, unseen):
            wanted = model(inputs)
            assert (folded(inputs) - wanted).abs().max() <= 1e-11 * wanted.abs().max()
    norms = {name for name, module in model.named_modules() if isinstance(module, NORMS)}
    assert norms == {one[0] for one in (*report.folded, *report.left)}
    assert len(norms) == len(report.folded) + len(report.left)
    kinds_kept = (*NORMS, ScaleShift)
    kept = {name for name, module in folded.named_modules() if isinstance(module, kinds_kept)}
    assert kept == {name for name, _ in report.left}
    assert all(reason for _, reason in report.left)
    modules = list(model)
    for at, module in enumerate(modules):
        foldable = isinstance(modules[at - 1], nn.Linear | nn.Conv2d) and at > 0
        if isinstance(module, NORMS) and foldable and "-> n'" not in repr(module):
            assert (str(at), (str(at - 1),)) in [one[:2] for one in report.folded]
