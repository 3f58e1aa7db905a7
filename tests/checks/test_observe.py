"""A check changes nothing, whatever happens, and sees networks of any make."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evenkeel import BatchNorm2d, accelerate, check
from evenkeel.checks.facts import norms_of
from evenkeel.checks.measure import moments
from evenkeel.checks.observe import observe
from evenkeel.checks.record import recorded, traced
from evenkeel.checks.walk import kind, target
from evenkeel.errors import ConfigError, SurgeryError

from ..surgery.cnns import ZOO
from ..surgery.cnns import images as small_images
from .planted import PLANTED, Net, images, net, seen


def everything(model: nn.Module) -> tuple[object, ...]:
    """All that a check might change: tensors, flags, hooks, settings, random numbers."""
    modules = {
        path: (
            type(m).__name__,
            m.training,
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            {k: v for k, v in vars(m).items() if isinstance(v, int | float | str | bool)},
        )
        for path, m in model.named_modules()
    }
    held = [*model.named_parameters(), *model.named_buffers()]
    tensors = {k: (id(v), v._version, v.detach().numpy().tobytes()) for k, v in held}
    gradients = [p.grad for p in model.parameters()]
    drawn = (torch.get_rng_state().numpy().tobytes(), random.getstate())
    return modules, tensors, gradients, drawn, pickle.dumps(np.random.get_state())


class Drawing(Net):
    """Draws every kind of random numbers, counts its calls, writes into its input."""

    calls = 0
    fails_in = ""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        torch.rand(1), random.random(), np.random.rand()
        x.mul_(1.5)
        if self.fails_in == ("training" if self.training else "inference"):
            raise RuntimeError("planted failure")
        return super().forward(F.dropout(x, 0.1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails_in", ["", "training", "inference"])
def test_nothing_changes(training, fails_in):
    torch.manual_seed(0)
    model = seen(Drawing()).train(training)
    model.bn2.eval()
    model.fails_in = fails_in
    model.bn1.register_forward_hook(lambda *_: None)
    x, batches = images(), list(images(128).split(32))
    kept = [t.clone() for t in (x, *batches)]
    optimizer = torch.optim.Adam(model.parameters())
    before = everything(model)
    found = check(model, x, batches, optimizer)
    assert everything(model) == before
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, *batches), strict=True))
    reasons = " ".join(u.reason for u in found.unchecked)
    assert ("planted failure" in reasons) == bool(fails_in)


@pytest.mark.parametrize("code", PLANTED)
def test_no_rule_changes_anything(code):
    plant = PLANTED[code](True)
    model = plant.model
    before = everything(model)
    check(model, **plant.given)
    assert everything(model) == before


def test_an_interrupt_changes_nothing():
    class Interrupted(Net):
        def forward(self, x: Tensor) -> Tensor:
            if stop:
                raise KeyboardInterrupt
            return super().forward(x)

    stop = False
    model = seen(Interrupted())
    stop = True
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        check(model, images())
    assert everything(model) == before


@pytest.mark.parametrize("name", [n for n in ZOO if n != "untraceable"])
def test_a_recorded_run_is_what_torch_fx_traces(name):
    """The same calls, in the same order, with the same users."""
    torch.manual_seed(0)
    model = ZOO[name][0]().train()
    facts = norms_of(model)
    ran, _ = recorded(model, small_images(), lambda path, x: moments(facts[path], x))
    read = traced(copy.deepcopy(model))
    for a, b in zip(ran.nodes, read.nodes, strict=True):
        assert (kind(a), len(a.users)) == (kind(b), len(b.users)), (a, b)
        assert [kind(n) for n in a.all_input_nodes] == [kind(n) for n in b.all_input_nodes]
        if kind(a) in ("norm", "layer"):
            assert target(a) == target(b)


@pytest.mark.parametrize("name", ZOO)
def test_accelerated_networks_are_seen_as_they_were(name):
    torch.manual_seed(0)
    model = ZOO[name][0]().train()
    fast, _ = accelerate(model)
    for example in (None, small_images()):
        was, now = check(model, example), check(fast, example)
        assert [(f.code, f.path) for f in was] == [(f.code, f.path) for f in now]


def test_without_an_example_a_trace_shows_structure():
    class Early(Net):
        def body(self, x: Tensor) -> Tensor:
            return F.relu(self.bn2(self.conv2(self.bn1(self.bn1(self.conv1(x))))))

    found = check(Early(bias=True))
    assert [f.path for f in found.of("EK101")] == ["conv1"]
    assert not found.of("EK101")[0].fixable  # nothing ran, so nothing is proved
    assert found.of("EK103")
    assert found.of("EK105")[0].evidence == 2
    assert any("EK310" in u.codes and "example" in u.reason for u in found.unchecked)


def test_what_cannot_be_traced_is_said():
    found = check(ZOO["untraceable"][0]())
    (unchecked,) = [u for u in found.unchecked if "EK101" in u.codes]
    assert "torch.fx cannot trace it" in unchecked.reason
    assert "give an example" in unchecked.reason


def test_a_network_that_cannot_be_copied_is_read_only():
    class Held(Net):
        def __deepcopy__(self, memo: object) -> None:
            raise TypeError("a lock is held")

    model = Held()
    model.bn1.momentum = 0.9
    found = check(model, images())
    assert [f.path for f in found.of("EK403")] == ["bn1"]
    assert any("a lock is held" in u.reason and "EK101" in u.codes for u in found.unchecked)
    with pytest.raises(SurgeryError, match="a lock is held"):
        check(model, checkpoint=Net().state_dict())


class Functional(nn.Module):
    """F.batch_norm with the buffers of a module, and with tensors of its own."""

    def __init__(self, training: bool | None = None) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.mean, self.var = torch.zeros(4), torch.ones(4)
        self.fc, self.always = nn.Linear(4, 5), training

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        x = self.conv(x)
        training = self.training if self.always is None else self.always
        x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training)
        x = F.batch_norm(F.relu(x), self.mean, self.var, training=self.training)
        return self.fc(x.mean((2, 3)))


def test_functional_norms_are_seen():
    found = check(Functional(), images())
    assert [f.path for f in found.of("EK101")] == ["conv"]
    assert "bn" in found.of("EK101")[0].message
    assert not found.of("EK107")
    assert not found.of("EK109")
    always = check(Functional(True), images()).of("EK109")
    assert [f.path for f in always] == ["bn"]
    assert "training=True" in always[0].message or "in training" in always[0].message
    assert [f.path for f in check(Functional(True)).of("EK109")] == ["bn"]  # torch.fx


def test_classes_of_the_users_are_norms():
    class Mine(nn.BatchNorm2d):
        """A norm and an activation, as in many repositories."""

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x))

    class Frozen(nn.Module):
        """As in torchvision: buffers and no parameters."""

        def __init__(self, count: int) -> None:
            super().__init__()
            for name, value in (
                ("weight", 1),
                ("bias", 0),
                ("running_mean", 0),
                ("running_var", 1),
            ):
                self.register_buffer(name, torch.full((count,), float(value)))
            self.eps = 0.0

        def forward(self, x: Tensor) -> Tensor:
            scale = (self.weight / (self.running_var + self.eps).sqrt()).reshape(1, -1, 1, 1)
            shift = self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale
            return x * scale + shift

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Mine(4), Frozen(4), BatchNorm2d(4), BatchNorm2d(4))
    model[2].running_var[1] = -0.5
    model[1].momentum = 0.99
    found = check(model, images())
    assert [f.path for f in found.of("EK303")] == ["2"]
    assert [f.path for f in found.of("EK405")] == ["2"]
    assert [f.path for f in found.of("EK403")] == ["1"]
    assert [f.path for f in found.of("EK101")] == ["0"]
    assert not found.of("EK101")[0].fixable
    assert [f.path for f in found.of("EK103")] == ["4"]  # who knows what a Mine or a Frozen does


def test_instance_and_layer_norms_are_no_batch_norms():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4),
        nn.Flatten(), nn.Linear(64, 6), nn.LayerNorm(6),
    )  # fmt: skip
    found = check(model, images())
    assert [(f.code, f.path) for f in found] == [("EK101", "0")]


def test_a_layer_with_a_norm_inside_is_looked_into():
    class Normed(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 4, 3)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(super().forward(x))

    for example in (images(), None):
        found = check(nn.Sequential(Normed(), nn.ReLU()), example)
        assert not found.of("EK107")
        assert found.of("EK101")[0].path == "0"
        assert "conv2d in 0" in found.of("EK101")[0].message


def test_what_a_norm_does_inside_is_its_own():
    """A norm with an activation of the user's in it, as timm has them."""

    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sigmoid()

    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = Act()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4), nn.BatchNorm2d(4), nn.Flatten())
    graph = observe(model, images()).trains
    assert [kind(node) for node in graph.nodes] == [
        "input", "layer", "norm", "norm", "shape", "output",
    ]  # fmt: skip
    found = check(model, images())
    assert found.of("EK101")
    assert not found.of("EK103")


def test_inputs_by_name_and_several():
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
            return {"out": super().forward(x if y is None else x + y)}

    model = net(kind=Two)
    x = images(64)
    one, both, named = x, (x, x), {"x": x, "y": x}
    for example, data in (
        (one, [(x, torch.zeros(64)), (x, torch.zeros(64))]),
        (both, [(x, x, torch.zeros(64))]),
        (named, [{"x": x, "y": x, "label": torch.zeros(64)}]),
        (None, x),
    ):
        found = check(model, example, data)
        assert [layer.path for layer in found.layers] == ["bn1", "bn2"]
        assert not any("EK101" in u.codes or "EK306" in u.codes for u in found.unchecked)
    for wrong, what in (([], "no batch"), ([3.0], "float"), (["a"], "str")):
        with pytest.raises(ConfigError, match=what):
            check(model, one, wrong)
    with pytest.raises(ConfigError, match=r"takes a torch\.nn\.Module but got int"):
        check(3)


def test_one_sample_is_enough_for_the_structure():
    found = check(net(bias=True), images(1))
    assert found.of("EK101")
    assert not any("EK101" in u.codes for u in found.unchecked)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_wrapped_networks():
    model = net(bias=True)
    expected = [(f.code, f.path) for f in check(model, images())]
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert [(f.code, f.path) for f in check(wrapped, images())] == expected
    scripted = torch.jit.script(net())
    assert not check(scripted, images()).errors


def test_norms_without_values():
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    found = check(lazy, images())
    assert "1 norms have no values yet" in found.remarks[0]
    assert isinstance(lazy[1], nn.LazyBatchNorm2d)
    with torch.device("meta"):
        meta = Net(bias=True)
    found = check(meta, images())
    assert [f.code for f in found] == ["EK101"]
    assert "meta" in found.remarks[0]


def test_a_network_without_norms():
    found = check(nn.Conv2d(3, 4, 3), images())
    assert len(found) == 0
    assert found.remarks == ("the network has no norms",)
    assert check(nn.BatchNorm2d(3), images()).of("EK301")[0].place == "the network"


def test_the_observation_says_what_it_lacks():
    lacks = observe(net()).lacks
    assert set(lacks) == {"run", "data", "measure", "optimizer", "checkpoint"}
    assert "data" not in observe(net(), data=images(64)).lacks


@pytest.mark.gpu
@pytest.mark.parametrize("code", ["EK101", "EK104", "EK105", "EK306", "EK307", "EK310"])
def test_networks_on_a_gpu(code):
    """The same findings as on the CPU, with inputs that are still there."""
    plant = PLANTED[code](True)
    here = check(plant.model, **plant.given)
    there = check(copy.deepcopy(plant.model).cuda(), **plant.given)
    assert [(f.code, f.path) for f in here] == [(f.code, f.path) for f in there]
    for a, b in zip(here, there, strict=True):
        assert a.evidence == pytest.approx(b.evidence, rel=0.1)
