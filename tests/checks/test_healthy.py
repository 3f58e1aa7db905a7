"""No false alarms: on networks without a mistake, fresh or trained, nothing is above a note."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evenkeel import accelerate, check, freeze, recalibrate
from evenkeel.bench import nets
from evenkeel.checks import Findings
from evenkeel.study.arms import Arm, Data
from evenkeel.study.data import load
from evenkeel.study.train import Feeder, make_network, make_optimizer, train

from ..surgery.cnns import ZOO

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def feeder() -> Feeder:
    return Feeder(load("digits"), Data("digits"), True, CPU)


def as_rgb(x: Tensor, size: int = 8) -> Tensor:
    return F.interpolate(x, size=size).expand(-1, 3, -1, -1).contiguous()


def trained(model: nn.Module, feeder: Feeder, change=lambda x: x, steps: int = 80, **options):
    """The network and its optimizer, after a training whose learning rate falls to zero."""
    torch.manual_seed(0)
    arm = Arm("healthy", weight_decay=5e-4, options={"momentum": 0.9}, **options)
    optimizer = make_optimizer(model, arm)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = ((change(x), labels) for x, labels in feeder.batches(32, 0))
    done = train(model, optimizer, batches, range(steps), lambda step, loss: schedule.step())
    assert done == steps
    return model, optimizer


def unseen(feeder: Feeder, change=lambda x: x) -> list[Tensor]:
    """Batches of test images."""
    return [change(x) for x, _ in feeder.test(256, 64)]


def loud(found: Findings) -> list[str]:
    return [f"{f.code} {f.place}: {f.message}" for f in found if f.severity != "note"]


@pytest.mark.parametrize("name", ZOO)
def test_networks_as_people_write_them(name, feeder):
    torch.manual_seed(0)
    model = ZOO[name][0]()
    example = as_rgb(feeder.example())
    assert loud(check(model)) == []
    assert loud(check(model, example)) == []
    batches = unseen(feeder, as_rgb)
    assert loud(check(model, example, batches)) == []
    model = nn.Sequential(model, nn.Linear(5, 10))
    optimizer = trained(model, feeder, as_rgb)[1]
    for mode in (True, False):
        found = check(model.train(mode), example, batches, optimizer)
        assert loud(found) == []
    assert len(found.layers) >= 2


PLACES = [
    ("before-activation", "spatial"),
    ("after-activation", "spatial"),
    ("on-input", "spatial"),
    ("on-input", "per-activation"),
    ("before-activation", "per-location"),
    ("before-activation", "layer"),
]
MODELS = ["standard", "paper", "lenet5", "residual", "residual-pre"]
STUDIED = [
    (model, *PLACES[(place + shift) % 6])
    for place, model in enumerate(MODELS)
    for shift in (0, 1, 3)
]


@pytest.mark.parametrize(("model", "placement", "statistics"), STUDIED)
def test_networks_of_the_study(model, placement, statistics, feeder):
    arm = Arm("normed", model=model, placement=placement, statistics=statistics)
    network = make_network(arm, feeder, 10, 0)
    assert loud(check(network, feeder.example())) == []
    optimizer = trained(network, feeder)[1]
    found = check(network, feeder.example(), unseen(feeder), optimizer)
    assert loud(found) == []


@pytest.mark.slow
def test_a_network_of_the_benchmarks(feeder):
    model = nets.build("mobilenetv2", size=32, width=0.125)

    def change(x: Tensor) -> Tensor:
        return as_rgb(x, 32)

    assert loud(check(model, change(feeder.example()))) == []
    optimizer = trained(model, feeder, change, steps=60)[1]
    batches = [change(x) for x, _ in feeder.test(128, 64)]
    assert loud(check(model, batches[0][:4], batches, optimizer)) == []


def test_a_network_after_surgery(feeder):
    """Accelerated, frozen or recalibrated on purpose is no mistake."""
    network, optimizer = trained(
        make_network(Arm("normed", placement="before-activation"), feeder, 10, 0), feeder
    )
    batches = unseen(feeder)
    fast, _ = accelerate(network, batches[0])
    assert loud(check(fast, batches[0], batches)) == []
    recalibrate(network, batches)
    assert loud(check(network, batches[0], batches, optimizer)) == []
    freeze(network, affine=True)
    network.train()
    assert loud(check(network, batches[0], batches)) == []


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_scale_of_data_is_no_mistake(scale, feeder):
    """Not even one at which epsilon outweighs the variance, once the initial 1 is forgotten."""
    model = ZOO["vgg"][0]()
    model = nn.Sequential(model, nn.Linear(5, 10))

    def change(x: Tensor) -> Tensor:
        return as_rgb(x) * scale

    trained(model, feeder, change, steps=250)
    assert loud(check(model, data=unseen(feeder, change))) == []


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_other_momenta_are_no_mistake(momentum, feeder):
    network = make_network(Arm("normed", placement="before-activation"), feeder, 10, 0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum
    trained(network, feeder, steps=400, learning_rate=0.01)
    assert loud(check(network, data=unseen(feeder))) == []
