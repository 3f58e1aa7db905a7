"""What other folding tools get wrong, or leave, or stop at: here it is right, or left by name.

Some of them are run, so that it is seen that these networks do catch a wrong fold.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from evenkeel.errors import SurgeryError
from evenkeel.nn import BatchNorm2d
from evenkeel.surgery.fold import FoldReport, fold
from evenkeel.surgery.graph import is_norm, name_of

from .nets import randomized, state

IMAGE = (3, 4, 7, 7)


def example(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or IMAGE, generator=generator, dtype=torch.float64)


@torch.no_grad()
def assert_right(model: nn.Module, folded: nn.Module, x: Tensor, tolerance: float = 1e-9) -> None:
    """Equal to within the tolerance of the largest output."""
    wanted, found = copy.deepcopy(model).eval()(x), folded(x)
    assert found.shape == wanted.shape
    difference = float((found.double() - wanted.double()).abs().max())
    assert difference <= tolerance * float(wanted.double().abs().max())


def folding(model: nn.Module, x: Tensor, left: str | None = None, tolerance: float = 1e-9) -> Any:
    """Folds and compares, on the example and on what the fold has not seen.

    Args:
        model, x: the network, with its statistics, and an example.
        left: a pattern for the reasons of the norms that stay; None if none may stay.
        tolerance: of the largest output.

    Returns:
        the folded network and the report.
    """
    torch.manual_seed(0)
    before = state(model)
    folded, report = fold(model, x)
    assert state(model) == before
    for inputs in (x, example(*x.shape, seed=1).to(x.dtype), example(5, *x.shape[1:]).to(x.dtype)):
        assert_right(model, folded, inputs, tolerance)
    stay = {name_of(node) for node in folded.graph.nodes if is_norm(node)}
    assert stay <= {norm for norm, _ in report.left}
    assert bool(report.left) == (left is not None), report.left
    for _, reason in report.left:
        assert left is None or re.search(left, reason), reason
    return folded, report


def went(report: FoldReport) -> dict[str, tuple[str, ...]]:
    """Into which layers each norm went."""
    return {norm: into for norm, into, _, _, _ in report.folded}


class Net(nn.Module):
    """Convolutions and norms, put together by a function."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.conv, self.other = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for name, module in modules.items():
            self.add_module(name, module)
        randomized(self.double())

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def chain(*modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomized(nn.Sequential(*modules).double()).eval()


# The rows of the table


def test_a_conv_output_that_is_also_used_elsewhere():
    """torchao folds the norm into the convolution, for the other reader too: 2.3 off."""
    folding(
        Net(lambda m, x: m.bn(y := m.conv(x)) + torch.sigmoid(y)), example(), "also used by sigmoid"
    )


def test_a_conv_output_that_is_also_used_elsewhere_with_a_conv_behind_the_norm():
    """The norm can go the other way."""
    model = Net(lambda m, x: m.other(m.bn(y := m.conv(x))) + torch.sigmoid(y))
    _, report = folding(model, example())
    assert went(report) == {"bn": ("other",)}


def test_one_conv_called_twice_with_a_norm_on_one_call():
    """fx.fuse, fuse_fx and torchao fold it for both calls: 4.0 off."""
    model = Net(lambda m, x: torch.sigmoid(m.bn(m.conv(torch.sigmoid(m.conv(x))))))
    folding(model, example(), "'conv' is used more than once")


def test_one_conv_called_twice_with_two_norms():
    """The same convolution would get both: 3.1 to 8.4 off."""
    how = Net(lambda m, x: m.bn2(m.conv(torch.tanh(m.bn(m.conv(x))))))
    folding(how, example(), "used more than once")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1, "output_padding": 1}])
def test_transposed_convolutions_in_groups(groups, options):
    """torchao stops with a bare size error, fx.fuse leaves it."""
    layer = nn.ConvTranspose2d(4, 8, 3, groups=groups, **options)
    _, report = folding(chain(layer, nn.BatchNorm2d(8)), example())
    assert went(report) == {"1": ("0",)}


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_norm_before_a_transposed_convolution(groups):
    layer = nn.ConvTranspose2d(4, 8, 3, 2, 1, groups=groups)
    _, report = folding(chain(nn.BatchNorm2d(4), layer), example())
    assert went(report) == {"0": ("1",)}


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_norm_before_a_conv_without_padding(groups):
    """All peers leave it."""
    _, report = folding(chain(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=groups)), example())
    assert went(report) == {"0": ("1",)}
    assert report.folded[0].direction == "forward"


PADDED = {
    "zeros": {"padding": 1},
    "more than the kernel": {"padding": 4},
    "on one axis": {"padding": (0, 2)},
    "strided": {"padding": 2, "stride": 2},
    "dilated": {"padding": 2, "dilation": 2},
    "strided and dilated": {"padding": (1, 3), "stride": (3, 2), "dilation": (1, 2)},
    "same": {"padding": "same"},
    "same, an even kernel": {"padding": "same", "kernel_size": (2, 4)},
    "in groups": {"padding": 1, "groups": 2},
    "depthwise": {"padding": 1, "groups": 4},
    "reflecting": {"padding": 2, "padding_mode": "reflect"},
    "replicating": {"padding": 2, "padding_mode": "replicate"},
    "circular": {"padding": 2, "padding_mode": "circular"},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", PADDED)
def test_a_norm_before_a_conv_with_padding(case):
    """Nobody does it exactly: a shift is not there in the padding. At every size, it must hold."""
    conv = nn.Conv2d(4, 8, **{"kernel_size": 3, **PADDED[case]})
    model = chain(nn.BatchNorm2d(4), conv)
    folded, report = folding(model, example())
    assert went(report) == {"0": ("1",)}
    for size in ((3, 3), (5, 12), (9, 4)):
        assert_right(model, folded, example(2, 4, *size))
    with torch.enable_grad():
        x = example().requires_grad_()
        torch.testing.assert_close(folded(x), model(x))


@pytest.mark.parametrize("rank", [1, 3])
def test_a_norm_before_a_padded_conv_of_other_ranks(rank):
    conv, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 3: (nn.Conv3d, nn.BatchNorm3d)}[rank]
    model = chain(norm(4), conv(4, 3, 3, padding=2, stride=2))
    _, report = folding(model, example(2, 4, *[6] * rank))
    assert went(report) == {"0": ("1",)}


def test_a_dense_layer_on_three_axes_whose_channels_fit_by_accident():
    """fx.fuse, fuse_fx and jit.freeze take the last axis for the channels: 4.7 to 6.4 off."""
    model = chain(nn.Linear(6, 5), nn.BatchNorm1d(5))
    folding(model, example(4, 5, 6), r"channel of '0', which are axis 2 of \(4, 5, 5\)")


def test_a_dense_layer_on_three_axes_with_its_channels_brought_second():
    model = Net(
        lambda m, x: m.norm(m.fc(x).transpose(1, 2)),
        fc=nn.Linear(6, 5),
        norm=nn.BatchNorm1d(5),
    )
    _, report = folding(model, example(4, 3, 6))
    assert went(report) == {"norm": ("fc",)}


# The lines under it


def test_conv_relu_norm():
    """mmcv pairs by the order of registration and passes over the ReLU: 1.4 off."""
    model = chain(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    folding(model, example(), "a shift, which does not pass '1'")


def test_conv_relu_norm_conv():
    layers = nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)
    _, report = folding(chain(*layers), example())
    assert went(report) == {"2": ("3",)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_conv_with_a_bias_and_a_norm_without_gammas(bias, affine, norm_first):
    """optimum forgets to scale the bias (0.13 off) and takes one for beta's default (1.0 off)."""
    pair = nn.Conv2d(4, 4, 3, bias=bias), nn.BatchNorm2d(4, affine=affine)
    _, report = folding(chain(*(reversed(pair) if norm_first else pair)), example())
    assert len(report.folded) == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_dense_layer_and_a_norm_without_gammas(bias, affine, norm_first):
    pair = nn.Linear(4, 4, bias=bias), nn.BatchNorm1d(4, affine=affine)
    _, report = folding(chain(*(reversed(pair) if norm_first else pair)), example(3, 4))
    assert len(report.folded) == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_the_axis_of_a_transposed_convolution(groups):
    """As many inputs as outputs, so that the wrong axis fits: 0.38 off without a word."""
    pair = nn.ConvTranspose2d(4, 4, 3, groups=groups), nn.BatchNorm2d(4)
    _, report = folding(chain(*pair), example())
    assert went(report) == {"1": ("0",)}


# Further cases that people met


class WithActivation(nn.BatchNorm2d):
    """A norm of the user's own, as timm's."""

    def __init__(self, channels: int, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Weighed(nn.BatchNorm2d):
    """A norm whose gammas are not what it multiplies with."""

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.weight / self.weight.norm()
        return F.batch_norm(x, self.running_mean, self.running_var, gamma, self.bias)


@pytest.mark.parametrize("act", [F.relu, torch.tanh, F.silu])
def test_a_subclass_with_an_activation(act):
    """mmengine and torch convert it to a norm without."""
    model = chain(nn.Conv2d(4, 4, 3), WithActivation(4, act), nn.Conv2d(4, 4, 1))
    _, report = folding(model, example())
    assert went(report) == {"1": ("0",)}


def test_a_subclass_with_gammas_of_its_own_making():
    """What is computed at each call is no number to fold."""
    model = chain(nn.Conv2d(4, 4, 3), Weighed(4))
    folded, report = fold(model, example())
    assert_right(model, folded, example(seed=1))
    assert report.folded == ()
    assert report.left == (("1", "its weight is computed by 'truediv'"),)


@pytest.mark.parametrize("activation", ["relu", ("leaky_relu", 0.2), "relu6", "silu"])
def test_our_norm_with_its_activation(activation):
    model = chain(nn.Conv2d(4, 4, 3), BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[1].activation = activation
    _, report = folding(model, example())
    assert went(report) == {"1": ("0",)}


def test_a_norm_that_is_used_twice():
    """fvcore stops at it. Each place has a layer of its own, and that takes it."""
    model = Net(lambda m, x: m.bn(m.other(torch.tanh(m.bn(m.conv(x))))))
    _, report = folding(model, example())
    assert [(f.norm, f.into) for f in report.folded] == [("bn", ("conv",)), ("bn", ("other",))]


def test_a_norm_that_is_used_twice_and_folds_once():
    """The place that stays has its own scale and shift."""
    model = Net(lambda m, x: torch.tanh(m.bn(torch.tanh(m.bn(m.conv(x))))))
    _, report = folding(model, example(), "does not pass|nothing is known")
    assert [(f.norm, f.into) for f in report.folded] == [("bn", ("conv",))]
    assert [norm for norm, _ in report.left] == ["bn"]


def test_two_norms_in_a_row():
    _, report = folding(chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), example())
    assert went(report) == {"1": ("0",), "2": ("0",)}


def far(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """Values of mean 1000 and deviation 0.01."""
    model = chain(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3, eps=1e-9), nn.ReLU(), nn.Conv2d(3, 2, 1))
    nn.init.constant_(model[0].bias, 1000.0)
    nn.init.constant_(model[1].running_mean, 1000.0)
    nn.init.constant_(model[1].running_var, 1e-4)
    return model.to(dtype), example().to(dtype) * 0.01


def test_a_mean_far_above_the_deviation():
    model, x = far(torch.float64)
    folded, report = fold(model, x)
    assert went(report) == {"1": ("0",)}
    assert_right(model, folded, example(seed=1) * 0.01)


def test_a_mean_far_above_the_deviation_in_single_precision():
    """Single precision has few digits left there: folded it has more, or it is refused by name."""
    model, x = far(torch.float32)
    try:
        folded, report = fold(model, x)
    except SurgeryError:
        with pytest.raises(SurgeryError, match="running mean"):
            fold(model, x)
        return
    truth = copy.deepcopy(model).double().requires_grad_(False)(x.double())
    with torch.no_grad():
        lost, now = (float((network(x) - truth).abs().max()) for network in (model, folded))
    assert now <= lost + 1e-5 * float(truth.abs().max())
    assert report.folded or report.left


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_variance_of_almost_nothing(norm_first, dtype):
    """The scale is then 1 / sqrt(eps), and the report says that the channel is dead."""
    pair = [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    model = chain(*(reversed(pair) if norm_first else pair)).to(dtype)
    norm = model[int(not norm_first)]
    norm.running_var.copy_(torch.tensor([1e-14, 0.0, 1e-30, 1.0]))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    folded, report = folding(model, example().to(dtype), tolerance=tolerance)
    assert all(p.isfinite().all() for p in folded.parameters())
    assert any("variance" in note for note in report.notes)


def test_half_precision_of_a_tiny_variance():
    """A variance of 1e-9 is zero in half precision. Fold first, convert then."""
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).float()
    model[1].running_var.fill_(1e-9)
    x = example().float()
    halves = copy.deepcopy(model).half()
    assert halves[1].running_var.max() == 0
    try:
        folded, report = fold(halves, x.half())
    except SurgeryError:
        with pytest.raises(SurgeryError, match="fold in float32, then convert"):
            fold(halves, x.half())
    else:
        assert_right(halves, folded, x.half(), report.budget)
    folded, _ = folding(model, x, tolerance=1e-5)
    with torch.no_grad():
        wanted, found = model(x), folded.half()(x.half())
    assert (found - wanted).abs().max() <= 5e-3 * wanted.abs().max()


def test_folded_subnormals_are_flushed():
    """fasterai: weights under the smallest normal number make a convolution five times slower."""
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).float()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1e-38, -1e-39, 1e-42, 1.0]))
    folded, report = folding(model, example().float(), tolerance=1e-6)
    tiny = torch.finfo(torch.float32).tiny
    for parameter in folded.parameters():
        assert not ((parameter != 0) & (parameter.abs() < tiny)).any()
    assert any("subnormal" in note for note in report.notes)


def test_an_embedding_before_a_norm():
    model = Net(
        lambda m, x: m.norm(m.table(x).transpose(1, 2)),
        table=nn.Embedding(9, 5),
        norm=nn.BatchNorm1d(5),
    )
    x = torch.arange(12).reshape(3, 4) % 9
    folded, report = fold(model, x)
    assert_right(model, folded, (x + 4) % 9)
    assert went(report) == {"norm": ("table",)}


def test_a_table_of_rows_that_is_used_elsewhere_too():
    def how(m: Any, x: Tensor) -> Tensor:
        rows = m.table(x).transpose(1, 2)
        return m.norm(rows) + F.linear(rows.transpose(1, 2), m.table.weight).sum(2)[:, None]

    model = Net(how, table=nn.Embedding(9, 5), norm=nn.BatchNorm1d(5))
    x = torch.arange(12).reshape(3, 4) % 9
    folded, report = fold(model, x)
    assert_right(model, folded, (x + 4) % 9)
    assert [norm for norm, _ in report.left] == ["norm"]


def test_statistics_of_each_batch_are_left():
    folding(
        chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        example(),
        "no running statistics",
    )


# The judge, on what the peers make of these networks


def fx_fused(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, as it is imported
        from torch.fx.experimental.optimization import fuse
    return fuse(model)


def twice() -> nn.Module:
    return Net(lambda m, x: m.conv(torch.tanh(m.bn(m.conv(x))))).eval()


def three_axes() -> nn.Module:
    return chain(nn.Linear(6, 5), nn.BatchNorm1d(5))


def by_registration() -> nn.Module:
    conv, norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    model = chain(conv, nn.ReLU(), norm)
    return nn.Sequential(fuse_conv_bn_eval(model[0], model[2]), nn.ReLU())


def unscaled() -> nn.Module:
    model = chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    wrong = fuse_conv_bn_eval(model[0], model[1])
    norm = model[1]
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = model[0].bias + norm.bias - norm.running_mean * scale
    wrong.bias = nn.Parameter(bias.detach())
    return wrong


def wrong_axis() -> nn.Module:
    model = chain(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4))
    return fuse_conv_bn_eval(model[0], model[1])


PEERS = {
    "fx.fuse, a conv called twice": (twice, lambda: fx_fused(twice()), IMAGE),
    "fx.fuse, three axes": (three_axes, lambda: fx_fused(three_axes()), (4, 5, 6)),
    "fuse_linear_bn_eval, three axes": (
        three_axes,
        lambda: fuse_linear_bn_eval(*three_axes()),
        (4, 5, 6),
    ),
    "fuse_conv_bn_eval, transposed": (
        lambda: chain(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)),
        wrong_axis,
        IMAGE,
    ),
    "by the order of registration": (
        lambda: chain(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
        by_registration,
        IMAGE,
    ),
    "a bias that is not scaled": (
        lambda: chain(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        unscaled,
        IMAGE,
    ),
}


@pytest.mark.parametrize("case", PEERS)
def test_the_comparison_sees_what_peers_get_wrong(case):
    network, wrong, shape = PEERS[case]
    model, x = network(), example(*shape)
    with pytest.raises(AssertionError):
        assert_right(model, wrong(), x)
    assert_right(model, fold(model, x)[0], x)
