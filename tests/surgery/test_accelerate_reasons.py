"""What `accelerate` leaves, and the reason that it gives; what would go wrong if it did not."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evenkeel
from evenkeel.surgery import accelerate as accelerate_module

from .cnns import BasicBlock, SqueezeExcite, built, conv, images
from .nets import state


def left(model: nn.Module, example: object = None) -> dict[str, str]:
    fast, report = evenkeel.accelerate(model, example)
    if example is None:
        x = images()
        torch.testing.assert_close(fast.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    return dict(report.left)


def taken(model: nn.Module) -> dict[str, str]:
    return {n: w.partition(" with ")[2] for n, w in evenkeel.accelerate(model)[1].swapped}


class Body(nn.Module):
    """A network of one forward, given as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv(3, 3), nn.BatchNorm2d(3), nn.ReLU()
        self.other = nn.BatchNorm2d(3)
        self.flag = True


class UsedTwice(Body):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y) + y


class CalledTwice(Body):
    def forward(self, x):
        return F.relu(self.bn(F.relu(self.bn(x))))


class Sums(Body):
    """The sum is used twice."""

    def forward(self, x):
        y = self.bn(self.conv(x)) + x
        return F.relu(y) + y


class IntoIdentity(Body):
    """The sum overwrites what is used again."""

    def forward(self, x):
        identity = self.conv(x)
        y = identity
        y += self.bn(x)
        return F.relu(y) + identity


class InputChanges(Body):
    """The norm's input is overwritten before the sum."""

    def forward(self, x):
        x = x * 1.0
        y = self.bn(x)
        other = x.mul_(2.0)
        return F.relu(y + other)


class ResidualChanges(Body):
    """The other summand is overwritten behind the sum."""

    def forward(self, x):
        other = self.other(x)
        y = F.relu(self.bn(self.conv(x)) + other)
        other *= 2
        return y + other


class ConvChanges(Body):
    """The convolution's output is overwritten before the sum."""

    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        return F.relu(z + y.relu_())


class Twice(Body):
    def forward(self, x):
        y = self.bn(x)
        return F.relu(y + y)


class Alpha(Body):
    def forward(self, x):
        return F.relu(torch.add(self.bn(x), x, alpha=2))


class Context(Body):
    def forward(self, x):
        with torch.no_grad():
            y = F.relu(self.bn(self.conv(x)))
        return self.other(y)


class Kind(Body):
    def forward(self, x, extra=None):
        x = self.bn(self.conv(x))
        if extra is not None:
            return x + extra
        return F.relu(x)


class Helper(Body):
    def forward(self, x):
        return choose(self.bn(x), self.flag)


def choose(x, flag):
    return F.relu(x) if isinstance(x, torch.Tensor) else x


class Remembers(Body):
    def forward(self, x):
        self.features = self.bn(x)
        return F.relu(self.features)


class Draws(Body):
    def forward(self, x):
        x = self.bn(x)
        return F.relu(x) if random.random() < 2 else x


class DrawsTensors(Body):
    def forward(self, x):
        return F.relu(self.bn(x)) * torch.rand(1).clamp(1, 1).item()


class Constants(Body):
    def forward(self, x):
        return F.relu(self.bn(x)) * torch.tensor([1.0])


class Decorated(Body):
    @torch.no_grad()
    def forward(self, x):
        return F.relu(self.bn(x))


class OwnCopy(Body):
    def forward(self, x):
        return F.relu(self.bn(x))

    def __reduce__(self):
        return (type(self), (), vars(self))


class Asks(Body):
    def forward(self, x):
        x = self.bn(x)
        return F.relu(x) if torch.is_grad_enabled() else x.relu()


ALONE = {
    UsedTwice: ("bn", "swapped alone: its output is also used by add"),
    CalledTwice: ("bn", "swapped alone: 'bn' is called at more than one place"),
    Sums: ("bn", "swapped alone: the sum is also used by add_1"),
    InputChanges: ("bn", "swapped alone: 'add' comes later, and its input may have changed by the"),
    ConvChanges: ("bn", "swapped alone: 'add' comes later, and its input may have changed by then"),
    ResidualChanges: ("bn", "swapped alone: 'other' is overwritten, and the norm's backward needs"),
    Context: ("Context", "its own forward stays: 'forward' works in a context: with torch.no_grad"),
    Kind: ("Kind", "its own forward stays: 'forward' asks what it was given: extra is not None"),
    Helper: ("Helper", "its own forward stays: 'choose' asks what it was given: isinstance(x, t"),
    Remembers: ("Remembers", "its own forward stays: 'forward' changes its module: self.features"),
    Draws: ("Draws", "its own forward stays: its forward draws random numbers"),
    DrawsTensors: ("DrawsTensors", "its own forward stays: "),
    Constants: ("Constants", "its own forward stays: its forward makes tensors of its own"),
    Decorated: ("Decorated", "its own forward stays: its forward is decorated"),
    OwnCopy: ("OwnCopy", "its own forward stays: its class has a __reduce__ of its own"),
    Asks: ("Asks", "its own forward stays: 'forward' asks for a mode of torch: torch.is_grad"),
}


@pytest.mark.parametrize("kind", ALONE, ids=lambda kind: kind.__name__)
def test_what_cannot_be_proved_is_left(kind):
    name, reason = ALONE[kind]
    found = left(kind())
    assert found[name].startswith(reason), found
    assert taken(kind()) == {"bn": "", "other": ""}


@pytest.mark.parametrize("kind", [IntoIdentity, Twice, Alpha], ids=lambda kind: kind.__name__)
def test_sums_that_are_none_are_not_taken(kind):
    model = kind()
    assert taken(model) == {"bn": "", "other": ""}
    assert left(model) == {}


def test_a_sum_in_place_into_the_other_value_keeps_overwriting_it():
    """torch.fx would write it down as a sum of its own."""

    class Net(Body):
        def forward(self, x):
            y = F.relu(self.bn(x))
            x += y
            return x

    x, other = images(), images()
    model = Net()
    fast, report = evenkeel.accelerate(model)
    assert report.swapped[0] == ("bn", "BatchNorm2d with relu")
    assert fast(x) is x
    torch.testing.assert_close(x, model(other), rtol=1e-4, atol=1e-5)


class Custom(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_other_classes_stay():
    model = nn.Sequential(Custom(3), nn.ReLU(), nn.SyncBatchNorm(3))
    fast, report = evenkeel.accelerate(model)
    assert report.swapped == ()
    assert dict(report.left) == {
        "0": "it is a Custom, which may do more than its base",
        "2": "it is a SyncBatchNorm, which may do more than its base",
    }
    assert [type(m) for m in fast] == [type(m) for m in model]


def test_lazy_norms_are_built_first():
    model = nn.Sequential(conv(3, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    with pytest.raises(evenkeel.errors.SurgeryError, match="Call `forward` with a dummy batch"):
        evenkeel.accelerate(model)
    model(images())
    assert taken(model) == {"1": "relu"}


def test_parametrized_norms_stay():
    model = built("resnet")

    class Positive(nn.Module):
        def forward(self, x):
            return x.abs()

    nn.utils.parametrize.register_parametrization(model.layer1[0].bn1, "weight", Positive())
    assert left(model) == {"layer1.0.bn1": "it has parametrizations"}
    fast, _ = evenkeel.accelerate(model)
    assert nn.utils.parametrize.is_parametrized(fast.layer1[0].bn1)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("path", ["layer1.0.bn1", "layer1.0.relu"])
def test_hooks_on_a_norm_or_activation_see_what_they_saw(path, kind):
    model = built("resnet")
    model.layer1[0].relu.inplace = False  # torch has no backward hooks around what is in place
    seen = []
    register = getattr(model.get_submodule(path), f"register_{kind}_hook")
    register(lambda module, *given: seen.append(given[-1][0].detach().clone()))
    fast, report = evenkeel.accelerate(model)
    why = dict(report.left)["layer1.0.bn1"]
    assert why.startswith("swapped alone: 'layer1.0.")
    assert why.endswith("hooks, which would see something else")
    assert dict(report.swapped)["layer1.0.bn1"] == "BatchNorm2d"
    for network in (model, fast):
        network(images()).sum().backward()
    half = len(seen) // 2
    for wanted, got in zip(seen[:half], seen[half:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_hooks_on_a_sequential_that_ends_in_a_norm():
    model = built("branches")
    model[0].shortcut.register_forward_hook(lambda *_: None)
    _, report = evenkeel.accelerate(model)
    assert dict(report.swapped)["0.shortcut.1"] == "BatchNorm2d"
    assert dict(report.swapped)["0.residual.3.1"] == "BatchNorm2d with add and relu"
    model[0].residual.register_forward_hook(lambda *_: None)
    assert left(model) == {
        "0.residual.3.1": "swapped alone: '0.residual' has hooks, which would see something else",
        "0.shortcut.1": "swapped alone: '0.shortcut' has hooks, which would see something else",
    }


def test_a_forward_on_the_object_stays():
    model = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU())
    model[1].forward = lambda x: x * 3
    assert left(model) == {"1": "its forward was replaced on the object"}
    model = nn.Sequential(BasicBlock(3, 3))
    model[0].forward = lambda x: x * 3
    assert left(model) == {"0": "its own forward stays: its forward was replaced on the object"}
    model = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU())
    model[2].forward = lambda x: x * 3
    assert left(model)["1"] == (
        "swapped alone: the forward of '2' behind it was replaced on the object"
    )


def test_one_activation_object_at_every_place():
    """Where all norms do its work it hands on; where some do not, its calls go one by one."""
    act = nn.ReLU()
    model = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), act, conv(3, 3), nn.BatchNorm2d(3), act)
    assert taken(model) == {"1": "relu", "4": "relu"}
    assert left(model) == {}
    model = nn.Sequential(conv(3, 3), act, conv(3, 3), nn.BatchNorm2d(3), act)
    assert left(model) == {"3": "swapped alone: '1' is also used behind others"}
    shared = nn.ModuleList([SqueezeExcite(), SqueezeExcite()])
    shared[1].act = shared[0].act
    model = nn.Sequential(shared[0].stem, shared[0].depthwise, shared[0].bn1, shared[0].act)
    assert taken(model) == {"0.1": "silu", "2": "silu"}


def test_a_norm_that_two_modules_hold():
    class Holder(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.conv, self.norm = conv(3, 3), norm

        def forward(self, x):
            return F.relu(self.norm(self.conv(x)))

    norm = nn.BatchNorm2d(3)
    assert left(nn.Sequential(Holder(norm), Holder(norm))) == {
        "0.norm": "swapped alone: '0.norm' is called at more than one place"
    }
    block = BasicBlock(3, 3)  # the same block twice, and its norms once each in it
    assert left(nn.Sequential(block, block)) == {}


def test_a_norm_that_someone_else_may_call():
    class Reaches(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x):
            return self.body[1](self.body(x))

    assert left(Reaches()) == {"body.1": "swapped alone: 'body.1' is called at more than one place"}

    class Unclear(Reaches):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.BatchNorm2d(3), nn.ReLU()])
            self.also = self.parts[0]

        def forward(self, x):
            x = self.body(x)
            return self.parts[1](self.parts[0](x)) if x.sum() > 0 else self.also(x)

    assert list(left(Unclear())) == ["Unclear"]
    assert taken(Unclear()) == {"body.1": "relu", "parts.0": ""}


def test_a_norm_and_an_activation_that_an_unclear_forward_holds_too():
    class Unclear(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.body = nn.Sequential(conv(3, 3), nn.BatchNorm2d(3), nn.ReLU())
            self.also = self.body[shared]

        def forward(self, x):
            x = self.body(x)
            return x if x.sum() < -1e9 else self.also(x - 0.5)

    for shared in (1, 2):
        model = Unclear(shared).eval()
        fast, _ = evenkeel.accelerate(model)
        torch.testing.assert_close(fast(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_a_norm_whose_output_changes_before_it_is_given():
    class Inner(Body):
        def forward(self, x):
            y = self.bn(self.conv(x))
            y.add_(1)
            return y

    model = nn.Sequential(Inner(), nn.ReLU())
    assert taken(model)["0.bn"] == ""
    assert left(model) == {}


def test_random_numbers_are_drawn_in_their_order():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.residual = nn.Sequential(conv(3, 3), nn.Dropout(), nn.BatchNorm2d(3))
            self.shortcut = nn.Sequential(conv(3, 3), nn.Dropout())

        def forward(self, x):
            return F.relu(self.residual(x) + self.shortcut(x))

    model = Net()
    fast, _ = evenkeel.accelerate(model)
    results = []
    for network in (model, fast):
        torch.manual_seed(0)
        results.append(network(images()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_buffers_are_read_at_every_call():
    class Scaled(Body):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(1))

        def forward(self, x):
            return F.relu(self.bn(x)) * (self.scale * 2)

    fast, report = evenkeel.accelerate(Scaled().eval())
    assert dict(report.swapped)["bn"] == "BatchNorm2d with relu"
    before = fast(images())
    fast.scale.fill_(3)
    torch.testing.assert_close(fast(images()), before * 3)


class Pair(Body):
    """Pairs in the text of a class whose forward depends on the data."""

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.relu(self.bn(self.conv(x)))


class PairAndMore(Pair):
    def features(self, x):
        return self.bn(x)


class PairByAnotherName(Pair):
    def features(self):
        return list(self.children())


class PairByText(Pair):
    def features(self, name):
        return getattr(self, name)


def test_pairs_that_the_text_proves():
    assert taken(Pair()) == {"bn": "relu", "other": ""}
    for kind in (PairAndMore, PairByAnotherName, PairByText):
        assert taken(kind()) == {"bn": "", "other": ""}, kind
    model = Pair()
    model.relu.register_forward_hook(lambda *_: None)
    assert taken(model) == {"bn": "", "other": ""}
    model = Pair()
    model.relu = nn.Tanh()
    assert taken(model) == {"bn": "", "other": ""}
    model = Pair()
    model.other = model.bn
    assert taken(model) == {"bn": "relu"}


def test_a_network_that_is_not_deterministic_is_refused():
    class Moody(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            Moody.calls += 1
            return self.bn(x) * Moody.calls

    model = Moody()
    before = state(model)
    with pytest.raises(evenkeel.errors.SurgeryError, match="the network would change by"):
        evenkeel.accelerate(model, images(), inplace=True)
    assert state(model) == before


def test_what_no_longer_runs_is_refused(monkeypatch):
    model = built("resnet")
    before = state(model)
    monkeypatch.setattr(
        accelerate_module, "_HAND_ON", "def forward(self, input):\n    return input.no_such_thing\n"
    )
    words = "would no longer run, and nothing was changed: .* no attribute 'no_such_thing'"
    with pytest.raises(evenkeel.errors.SurgeryError, match=words):
        evenkeel.accelerate(model, images(), inplace=True)
    assert state(model) == before


def test_a_norm_that_is_called_by_name():
    class Named(Body):
        def forward(self, x):
            return self.relu(self.bn(input=x))

    assert taken(Named()) == {"bn": "relu", "other": ""}
    assert left(Named()) == {}


def test_fold_and_skip_see_through_acceleration():
    model = built("vgg").eval()
    fast, _ = evenkeel.accelerate(model)
    folded, report = evenkeel.fold(fast, images())
    assert len(report.folded) == 4
    torch.testing.assert_close(folded(images()), model(images()), rtol=1e-4, atol=1e-5)
    own = nn.Sequential(conv(3, 3), evenkeel.BatchNorm2d(3))
    own[1].activation = "relu"
    assert evenkeel.fold(own, images())[1].left == ()
