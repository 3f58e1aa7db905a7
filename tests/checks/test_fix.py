"""What --fix does changes no output, is proved, and is all or nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from evenkeel import BatchNorm2d, Norm, check
from evenkeel.checks import fix as fix_module
from evenkeel.checks.fix import fix
from evenkeel.errors import SurgeryError
from evenkeel.nn import PerActivationBatchNorm

from ..surgery.cnns import ZOO, built
from ..surgery.cnns import images as small_images
from .planted import Net, images, net, seen
from .test_observe import everything


def with_biases(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and module.bias is None:
            module.bias = nn.Parameter(torch.randn(module.out_channels))
    return model


@pytest.mark.parametrize("name", ZOO)
def test_biases_go_and_outputs_stay(name):
    """In both modes, and gradients of what is left too."""
    torch.manual_seed(0)
    model = seen(with_biases(built(name)), small_images(8), times=20)
    before = everything(model)
    fixed, report = fix(model, small_images())
    assert everything(model) == before
    assert type(fixed) is type(model)
    found = check(model, small_images()).of("EK101")
    assert {layer for layer, _ in report.biases} == {f.path for f in found if f.fixable}
    assert len(report.biases) >= 1
    for layer, _ in report.biases:
        assert fixed.get_submodule(layer).bias is None
    assert not [f for f in check(fixed, small_images()).of("EK101") if f.fixable]
    assert report.difference <= report.budget
    gradients = []
    for each in (model, fixed):
        torch.manual_seed(1)
        loss = each.train()(small_images()).square().mean()
        kept = [p for n, p in each.named_parameters() if n in dict(fixed.named_parameters())]
        gradients.append([loss.detach(), *torch.autograd.grad(loss, kept)])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        model.eval()(small_images()), fixed.eval()(small_images()), rtol=1e-4, atol=1e-4
    )


def test_subnormal_variances_become_zero():
    model = net()
    model.bn1.running_var[:3] = torch.tensor([1e-40, 1e-14, 1e-44])
    fixed, report = fix(model, images())
    assert report.flushed == (("bn1", 2),)
    assert report.biases == ()
    assert fixed.bn1.running_var[:3].tolist() == pytest.approx([0, 1e-14, 0])
    assert torch.equal(fixed.eval()(images()), model.eval()(images()))
    assert "2 subnormal variances set to zero" in str(report)


def test_per_activation_norms_take_biases_too():
    """One running mean for each place: the bias goes into all places of its channel."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), PerActivationBatchNorm((4, 6, 6)),
        nn.Conv2d(4, 5, 3), BatchNorm2d(5), nn.Conv2d(5, 6, 1), Norm("n c h w -> c w", c=6, w=4),
        nn.Conv2d(6, 3, 1), Norm("n c h w -> h w", h=4, w=4),
    )  # fmt: skip
    seen(model)
    _, report = fix(model, images())
    assert report.biases == (("0", "1"), ("2", "3"), ("4", "5"))
    assert report.to_dict()["biases"] == (("0", "1"), ("2", "3"), ("4", "5"))
    assert "bias moved into 1; build it bias=False" in str(report)


class Shared(Net):
    """One convolution for both norms."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__(bias)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2, self.bn3 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def body(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv2(x)))


class InTwoPlaces(Net):
    def body(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return F.relu(self.bn1(y))[:, :6] + y[:, :6]


class ByMode(Net):
    def body(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return F.relu(self.bn1(y) if self.training else y)[:, :6]


def hooked() -> nn.Module:
    model = net(bias=True)
    model.conv1.register_forward_hook(lambda module, given, out: out.sin())
    return model


def parametrized() -> nn.Module:
    model = net(bias=True)
    parametrizations.weight_norm(model.conv1)
    return model


def tied() -> nn.Module:
    model = net(bias=True)
    model.other = nn.Conv2d(3, 8, 1)
    model.other.bias = model.conv1.bias
    return model


def untracked() -> nn.Module:
    model = net(bias=True)
    model.bn1 = nn.BatchNorm2d(8, track_running_stats=False)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: seen(Shared()),
        lambda: net(True, kind=InTwoPlaces),
        lambda: net(True, kind=ByMode),
        hooked,
        parametrized,
        tied,
        untracked,
    ],
    ids=["shared", "two places", "by mode", "hooked", "parametrized", "tied", "untracked"],
)
def test_what_is_not_safe_is_left(make):
    model = make()
    fixed, report = fix(model, images())
    assert report.biases == ()
    assert len(list(fixed.parameters())) == len(list(model.parameters()))


def test_ignored_codes_are_not_fixed():
    model = net(bias=True)
    assert fix(model, images(), ["EK101"])[1].biases == ()
    assert fix(model, images())[1].biases == (("conv1", "bn1"),)


def test_a_changed_output_undoes_everything(monkeypatch):
    model = net(bias=True)
    before = everything(model)

    def wrong(own: nn.Module, layer: str, norm: str) -> None:
        own.get_submodule(layer).register_parameter("bias", None)

    monkeypatch.setattr(fix_module, "_absorb", wrong)
    with pytest.raises(SurgeryError, match=r"without the bias of conv1 the network would change"):
        fix(model, images())
    assert everything(model) == before


def test_a_network_that_cannot_run_is_refused():
    with pytest.raises(SurgeryError, match="cannot run the example in inference"):
        fix(net(bias=True), torch.randn(2, 7, 8, 8))
