"""`accelerate` and `restore`: what is found in networks as people write them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import evenkeel
from evenkeel.errors import SurgeryError
from evenkeel.surgery import accelerate as accelerate_module
from evenkeel.surgery import comparing

from .cnns import ZOO, ConvBN, ResNet, built, images
from .nets import built as plain
from .nets import state


def found(report) -> dict[str, str]:
    """What each norm took over."""
    return {name: what.partition(" with ")[2] for name, what in report.swapped}


@pytest.mark.parametrize("name", ZOO)
def test_everything_is_found(name):
    model = built(name)
    before = state(model)
    fast, report = evenkeel.accelerate(model, images())
    assert found(report) == ZOO[name][1]
    assert len(report.left) == ZOO[name][2], report.left
    assert report.output.relative < 1e-5
    assert report.gradient.relative < report.budget == comparing.BUDGET
    assert state(model) == before
    for path, module in model.named_modules():
        other = fast.get_submodule(path)
        assert isinstance(other, type(module))
        assert type(other).__name__ == type(module).__name__
    norms = [m for m in fast.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(type(m).__module__ == "evenkeel.nn.named" for m in norms)


@pytest.mark.parametrize("name", ZOO)
def test_it_computes_the_same_exactly(name):
    """In double precision, over steps of training and in inference."""
    model = built(name).double()
    fast, _ = evenkeel.accelerate(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, fast)]
    for step in range(3):
        losses = []
        for network, optimizer in zip((model, fast), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = network(images(seed=step).double()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-11)
    for (key, value), (other_key, other) in zip(
        model.state_dict().items(), fast.state_dict().items(), strict=True
    ):
        assert key == other_key
        torch.testing.assert_close(other, value, rtol=1e-8, atol=1e-10)
    x = images(6, seed=9).double()
    torch.testing.assert_close(fast.eval()(x), model.eval()(x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ZOO)
def test_restoring_gives_the_network_back(name):
    model = built(name).eval()
    fast, _ = evenkeel.accelerate(model)
    back = evenkeel.restore(fast)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    for mine, own in zip(back.modules(), model.modules(), strict=True):
        assert set(vars(mine)) == set(vars(own))
    assert torch.equal(back(images()), model(images()))
    assert repr(back) == repr(model)


def test_without_an_example_the_same_is_found_and_the_report_says_so():
    model = built("resnet")
    _, compared = evenkeel.accelerate(model, images())
    _, report = evenkeel.accelerate(model)
    assert (report.swapped, report.left) == (compared.swapped, compared.left)
    assert report.output is report.gradient is report.budget is None
    assert str(report).endswith("not compared, for there was no example")


def test_the_report_is_text_and_plain_values():
    _, report = evenkeel.accelerate(built("asks for training"), images())
    lines = str(report).splitlines()
    assert lines[0] == "2 norms swapped, 1 left as they are"
    assert lines[1] == "  body.1: BatchNorm2d with relu"
    assert lines[3] == (
        "  AsksForTraining: its own forward stays: its forward does something else in training "
        "than in inference"
    )
    assert lines[4].startswith("  largest output difference ")
    assert lines[5].startswith("  largest gradient difference ")
    assert lines[6] == "  budget 1e-04 relative"
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["output"]["absolute"] == report.output.absolute
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.budget = 1.0


def test_the_reports_differences_are_true():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    fast, report = evenkeel.accelerate(model, images())
    values = [comparing._values(m, images()) for m in (model, fast)]
    kind = {k for k in values[0] if not k.startswith("gradient")}
    assert kind == {
        f"{what} in {mode}"
        for what in ("output 0", "1.running_mean", "1.running_var")
        for mode in ("training", "inference")
    }
    where = report.output.where
    difference = (values[0][where] - values[1][where]).abs().max()
    assert report.output.absolute == pytest.approx(float(difference), rel=1e-6)
    assert report.output.scale == pytest.approx(float(values[0][where].abs().max()))
    assert report.gradient.where.startswith("gradient of ")


def test_in_place_keeps_objects_and_their_optimizer():
    model = built("resnet")
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    modules, parameters = list(model.modules()), list(model.parameters())
    same, report = evenkeel.accelerate(model, images(), inplace=True)
    assert same is model
    assert len(report.swapped) == 8
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    other = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9)
    for step in range(2):
        for network, own in ((model, optimizer), (reference, other)):
            own.zero_grad()
            network(images(seed=step)).square().mean().backward()
            own.step()
    for mine, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-5)
    assert evenkeel.restore(model, inplace=True) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]


def test_the_check_leaves_the_users_memory_and_random_numbers():
    model = built("vgg")
    before, drawn = state(model), torch.get_rng_state()
    evenkeel.accelerate(model, images(), inplace=True)
    assert torch.equal(torch.get_rng_state(), drawn)
    evenkeel.restore(model, inplace=True)
    assert state(model) == before


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("accident", ["_swap", "python_code", "third"])
def test_an_accident_on_the_way_changes_nothing(accident, inplace, monkeypatch):
    model = built("resnet")
    before = state(model)
    calls = []

    def fail(*arguments, **named):
        calls.append(1)
        raise MemoryError("no memory")

    if accident == "_swap":
        monkeypatch.setattr(accelerate_module, "_swap", fail)
    elif accident == "python_code":
        monkeypatch.setattr(torch.fx.Graph, "python_code", fail)
    else:
        swap = accelerate_module._swap

        def third(*arguments, **named):
            calls.append(1)
            if len(calls) == 8 + 3 * inplace:  # the copy is done first
                raise MemoryError("no memory")
            swap(*arguments, **named)

        monkeypatch.setattr(accelerate_module, "_swap", third)
    with pytest.raises(MemoryError):
        evenkeel.accelerate(model, inplace=inplace)
    assert calls
    assert state(model) == before


@pytest.mark.parametrize("inplace", [True, False])
def test_another_result_is_refused(inplace, monkeypatch):
    model = built("resnet")
    before = state(model)
    monkeypatch.setitem(
        accelerate_module.__dict__, "_HAND_ON", "def forward(self, x):\n    return x * 1.001\n"
    )
    with pytest.raises(SurgeryError, match=r"would change by .* 1e-04 of that is allowed; nothing"):
        evenkeel.accelerate(model, images(), inplace=inplace)
    assert state(model) == before


def test_rounding_alone_is_no_reason_to_refuse(monkeypatch):
    """Above the budget, float64 decides."""
    monkeypatch.setattr(comparing, "BUDGET", 1e-12)
    _, report = evenkeel.accelerate(built("resnet"), images())
    assert 1e-12 < report.output.relative < 1e-5
    assert report.budget == 1e-12


def test_double_precision_has_a_budget_of_its_own():
    _, report = evenkeel.accelerate(built("resnet").double(), images().double())
    assert report.budget == comparing.EXACT_BUDGET
    assert max(report.output.relative, report.gradient.relative) < 1e-11


def test_half_precision_is_compared_in_float64():
    model = built("resnet").bfloat16()
    _, report = evenkeel.accelerate(model, images().bfloat16())
    assert len(report.swapped) == 8
    assert report.output.relative < 0.3


def test_examples_of_every_form():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, a, scale):
            return {"y": self.bn(a).relu(), "n": (scale, a.long())}

    x = images()
    for example in ((x, 2.0), {"a": x, "scale": 2.0}):
        assert found(evenkeel.accelerate(Pair(), example)[1]) == {"bn": "relu"}
    with pytest.raises(SurgeryError, match=r"cannot run the example in training: .*missing 1 req"):
        evenkeel.accelerate(Pair(), x)


def test_examples_that_prove_nothing_are_refused():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    with pytest.raises(
        SurgeryError, match=r"cannot run the example in training: .* two samples or"
    ):
        evenkeel.accelerate(model, images(1))
    with pytest.raises(SurgeryError, match="it gives no floating tensor to compare"):
        evenkeel.accelerate(nn.Sequential(nn.Conv2d(3, 2, 1)), images(0))


def test_twice_is_refused_and_says_what_to_do():
    fast, _ = evenkeel.accelerate(built("resnet"))
    before = state(fast)
    with pytest.raises(SurgeryError, match=r"ResNet is accelerated already .* evenkeel.restore"):
        evenkeel.accelerate(fast, inplace=True)
    assert state(fast) == before


def test_on_cuda_nothing_is_claimed():
    with FakeTensorMode():
        there = torch.empty(2, device="cuda")
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    model[1].register_buffer("there", there)
    with pytest.raises(SurgeryError, match=r"is on CUDA \(see '1\.there'\), where .* for the CPU"):
        evenkeel.accelerate(model)


def test_our_own_norms_take_over_too_and_stay_ours():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), evenkeel.BatchNorm2d(4), nn.ReLU(), evenkeel.BatchNorm2d(4)
    )
    fast, report = evenkeel.accelerate(model, images())
    assert report.swapped == (("1", "BatchNorm2d with relu"),)
    assert fast[1].activation == "relu"
    back = evenkeel.restore(fast)
    assert type(back[1]) is evenkeel.BatchNorm2d
    assert back[1].activation is None
    assert torch.equal(back.eval()(images()), model.eval()(images()))


def test_a_network_without_norms_has_nothing_to_swap():
    _, report = evenkeel.accelerate(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), images())
    assert report.swapped == report.left == ()


def test_what_cannot_be_copied_is_not_edited():
    model = ResNet()
    model.fc.handle = (n for n in range(3))
    with pytest.raises(SurgeryError, match="ResNet cannot be copied"):
        evenkeel.accelerate(model, inplace=True)


class Odds(nn.Module):
    """Functions, sums and modules that end in a norm, for torch.fx."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bns = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(4)])
        self.act = nn.ReLU()
        self.last = ConvBN(3, 3)

    def forward(self, x):
        a, b, c, d = self.bns
        x = F.leaky_relu(a(self.conv(x)), 0.2)
        y = F.silu(b(x) + x)
        y = self.act(c(y) + y)
        return F.relu(self.last(torch.relu(d(y))))


class KeepsConvBN(torch.fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, ConvBN) or super().is_leaf_module(m, module_qualified_name)


def graph_modules():
    model = Odds()
    traced = torch.fx.GraphModule(model, KeepsConvBN().trace(model))
    wanted = {"bns.0": "leaky_relu of slope 0.2", "bns.1": "add and silu", "bns.2": "add and relu"}
    yield traced, images(), wanted | {"bns.3": "relu", "last.bn": ""}
    grey = images()[:, :1]
    network, introduced = evenkeel.introduce(plain("residual"), grey)
    found = {n: "add and relu" if "conv2" in n else "relu" for n, _ in introduced.norms}
    del found["block2.conv2_norm"]  # the sum goes to the later norm; this one is ours, and alone
    yield network, grey, found | {"block2.shortcut_norm": "add and relu"}


@pytest.mark.parametrize("place", [0, 1], ids=["traced", "introduced"])
def test_graph_modules_are_rewritten_and_come_back(place):
    model, x, wanted = list(graph_modules())[place]
    before = state(model)
    fast, report = evenkeel.accelerate(model, x)
    assert found(report) == wanted
    assert state(model) == before
    y = model.eval()(x)
    for other in (fast, copy.deepcopy(fast), copy.deepcopy(pickle.loads(pickle.dumps(fast)))):
        torch.testing.assert_close(other.eval()(x), y, rtol=1e-4, atol=1e-5)
        back = evenkeel.restore(other)
        assert [type(m) for m in back.modules()][1:] == [type(m) for m in model.modules()][1:]
        assert torch.equal(back.eval()(x), y)
        assert evenkeel.accelerate(back)[1].swapped == report.swapped
        folded, _ = evenkeel.fold(other, x)
        torch.testing.assert_close(folded(x), y, rtol=1e-4, atol=1e-4)


def test_an_accident_leaves_a_graph_module_as_it_was(monkeypatch):
    model, x, _ = next(graph_modules())
    code, before = model.code, state(model)
    swap, calls = accelerate_module._swap, []

    def fail(*arguments, **named):
        calls.append(1)
        if len(calls) > 7:  # in the midst of the second round, on the model itself
            raise MemoryError("no memory")
        swap(*arguments, **named)

    monkeypatch.setattr(accelerate_module, "_swap", fail)
    with pytest.raises(MemoryError):
        evenkeel.accelerate(model, inplace=True)
    assert (model.code, state(model)) == (code, before)
    assert model(x).shape == x.shape


def test_a_mean_that_is_zero_but_for_rounding_is_no_difference() -> None:
    """Behind a linear bottleneck: the norm before it has made every mean zero."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1, bias=False),
        nn.BatchNorm2d(16), nn.ReLU6(),
    )  # fmt: skip
    _, report = evenkeel.accelerate(network, torch.randn(32, 3, 18, 18))
    assert len(report.swapped) == 2
