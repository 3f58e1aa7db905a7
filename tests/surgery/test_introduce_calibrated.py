"""With data to calibrate with, a trained network computes what it did, wherever norms are put."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from evenkeel.errors import SurgeryError
from evenkeel.nn import Norm
from evenkeel.surgery.introduce import PLACEMENTS, introduce
from evenkeel.surgery.introducing import calibrate as calibrating

from . import architectures
from .architectures import BARE
from .nets import Twice, built, images, outputs_of, state

NORMS = (nn.modules.batchnorm._BatchNorm, Norm)
BUDGET = 1e-5
NO_POOLING = {"pre-activation", "squeeze-excite", "generator", "squeezenet"}


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, of the largest value."""
    wide = a.detach().double()
    return float((wide - b.detach().double()).abs().max() / wide.abs().max())


def trained(name: str = "standard", seed: int = 0) -> nn.Module:
    """A network with biases of some size, in eval mode."""
    model = built(name).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def norms_of(network: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in network.named_modules() if isinstance(module, NORMS)}


def data(sizes=(5, 3, 4), **options) -> list[Tensor]:
    return [images(n, seed=seed, **options) for seed, n in enumerate(sizes, start=1)]


class Named(nn.Module):
    """Gives its output by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(144, 3)

    def forward(self, image):
        return {"logits": self.fc(torch.relu(self.conv(image)).flatten(1))}


class Two(Named):
    """Takes two inputs."""

    def forward(self, image, shift):
        return {"logits": self.fc(torch.relu(self.conv(image)).flatten(1) + shift)}


# The promise


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", BARE)
def test_every_architecture_computes_what_it_did_and_trains_on(name, placement):
    model, example = BARE[name]().eval(), architectures.images(name)
    batches = [architectures.images(name, n, seed) for seed, n in enumerate((4, 3, 5), start=1)]
    if placement == "after-pooling" and name in NO_POOLING:
        with pytest.raises(SurgeryError, match="no place for 'after-pooling'"):
            introduce(model, example, placement, calibrate=batches)
        return
    before = state(model)
    network, report = introduce(model, example, placement, calibrate=batches)
    assert state(model) == before
    for x in (example, *batches, architectures.images(name, 6, seed=9)):
        assert relative(model(x), network(x)) <= BUDGET
    assert report.budget == BUDGET
    assert report.difference <= BUDGET * report.scale
    assert report.batches == 3
    learns(network, batches[2])


def learns(network: fx.GraphModule, x: Tensor) -> None:
    """A step of training reaches every parameter and moves every running statistic."""
    norms = norms_of(network)
    # Between two norms with nothing but sums between them the mean stays: the first fixes it.
    variances = {name: norm.running_var.clone() for name, norm in norms.items()}
    counts = {name: int(norm.num_batches_tracked) for name, norm in norms.items()}
    optimizer = torch.optim.SGD(network.train().parameters(), 1e-2)
    out = network(x)
    torch.nn.functional.mse_loss(out, torch.randn_like(out)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert all(norm.weight.grad.abs().sum() + norm.bias.grad.abs().sum() for norm in norms.values())
    weights = {name: norm.weight.detach().clone() for name, norm in norms.items()}
    optimizer.step()
    for name, norm in norms.items():
        assert not torch.equal(norm.running_var, variances[name]), name
        assert int(norm.num_batches_tracked) == counts[name] + 1
    assert any(not torch.equal(norm.weight, weights[name]) for name, norm in norms.items())


def test_what_compares_sees_a_small_change():
    model = trained()
    network, _ = introduce(model, images(2), calibrate=data())
    assert relative(model(images()), network(images())) <= BUDGET
    with torch.no_grad():
        network.conv1_norm.bias[0] += 1e-2
    assert relative(model(images()), network(images())) > BUDGET
    network.conv1_norm.momentum = 0.0
    with pytest.raises(AssertionError, match="conv1_norm"):
        learns(network, images())


@pytest.mark.parametrize(
    "pattern",
    ["n c h w -> c", "n c h w -> c h w", "n c h w -> h w", "n c h w -> c w", "n c h w ->"],
)
@pytest.mark.parametrize("placement", ["before-activation", "on-input", "after-addition"])
def test_every_pattern_that_averages_the_batch_keeps_the_function(pattern, placement):
    model = trained()
    network, report = introduce(model, images(2), placement, pattern=pattern, calibrate=data())
    assert relative(model(images()), network(images())) <= BUDGET
    for name, norm in norms_of(network).items():
        assert norm.weight.shape == norm.bias.shape == norm.running_var.shape, name
    if placement == "before-activation":
        owns_channels = pattern.rpartition("-> ")[2].startswith("c")
        assert report.dropped_biases == (("conv1", "conv2") if owns_channels else ()) + ("fc1",)


@pytest.mark.parametrize("statistics", ["spatial", "per-activation", "per-location"])
@pytest.mark.parametrize("placement", ["before-activation", "after-activation"])
def test_statistics_are_those_of_the_original_network_over_all_data(statistics, placement):
    """By definition: of all values at once, though batches have different sizes."""
    model, batches = trained(), data((5, 1, 7))
    network, _ = introduce(model, images(2), placement, statistics=statistics, calibrate=batches)
    original = fx.symbolic_trace(model)
    values = {node.name: value for node, value in outputs_of(original, torch.cat(batches)).items()}
    axes = {"spatial": (0, 2, 3), "per-activation": (0,), "per-location": (0, 1)}[statistics]
    for name, norm in norms_of(network).items():
        of = values[name.removesuffix("_norm")].double()
        var, mean = torch.var_mean(of, axes if of.dim() > 2 else (0,))
        bias = 0.0
        if name.removesuffix("_norm") in ("conv1", "conv2", "fc1"):
            layer, dropped = (m.get_submodule(name[:-5]) for m in (model, network))
            bias = layer.bias.double() if dropped.bias is None else 0.0
            assert (dropped.bias is None) == (statistics != "per-location" or name == "fc1_norm")
        if statistics == "per-activation" and of.dim() > 2 and placement == "before-activation":
            bias = bias[:, None, None]
        near = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(norm.running_mean.double(), mean - bias, **near)
        torch.testing.assert_close(norm.running_var.double(), var, **near)
        torch.testing.assert_close(norm.weight.double(), (var + norm.eps).sqrt(), **near)
        torch.testing.assert_close(norm.bias.double(), mean, **near)
        assert int(norm.num_batches_tracked) == 3


def test_biases_are_absorbed_by_every_norm_behind_a_layer_that_is_called_twice():
    model = Twice(ends=False).eval()
    with torch.no_grad():
        model.conv.bias.fill_(3.0)
    network, report = introduce(model, images(2), calibrate=data())
    assert report.dropped_biases == ("first", "conv")
    for name in ("conv_norm", "conv_norm2"):
        norm = network.get_submodule(name)
        torch.testing.assert_close(norm.bias - norm.running_mean, torch.full((4,), 3.0))
    assert relative(model(images()), network(images())) <= BUDGET


def test_a_mean_far_above_the_deviation():
    """1000 and 0.01: of E[x^2] - E[x]^2 nothing would be left in single precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).eval()
    with torch.no_grad():
        model[0].weight.fill_(0.01)
        model[0].bias.fill_(1000.0)
    network, report = introduce(model, images(2), "after-activation", calibrate=data((64, 64)))
    norm = network.get_submodule("1_norm")
    values = F.relu(model[0](torch.cat(data((64, 64))))).double()
    torch.testing.assert_close(norm.running_var.double(), values.var((0, 2, 3)), rtol=1e-4, atol=0)
    assert report.difference <= BUDGET * report.scale
    network, _ = introduce(model, images(2), calibrate=data((64, 64)))
    exact = torch.cat(data((64, 64))).double().var() * 1e-4
    found = network.get_submodule("0_norm").running_var.double()
    torch.testing.assert_close(found, exact.expand(4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("placement", ["before-activation", "after-activation"])
def test_channels_that_never_vary(placement):
    """A dead ReLU and a weight of zero: gamma is sqrt(eps), and the value stays what it was."""
    model = trained()
    with torch.no_grad():
        model.conv1.weight[0], model.conv1.bias[0] = 0.0, -5.0
        model.conv1.weight[1], model.conv1.bias[1] = 0.0, 7.0
    network, _ = introduce(model, images(2), placement, calibrate=data())
    norm = next(iter(norms_of(network).values()))
    wanted = [-5.0, 7.0] if placement == "before-activation" else [0.0, 7.0]
    torch.testing.assert_close(norm.bias[:2].detach(), torch.tensor(wanted))
    assert torch.equal(norm.running_var[:2], torch.zeros(2))
    torch.testing.assert_close(norm.weight[:2].detach(), torch.full((2,), math.sqrt(norm.eps)))
    assert relative(model(images()), network(images())) <= BUDGET


class Raised(Named):
    """Writes over a value before its activation reads it."""

    def forward(self, image):
        x = self.conv(image)
        x.add_(100.0)
        return {"logits": self.fc(torch.relu(x).flatten(1))}


def test_a_norm_in_front_of_an_activation_is_given_what_the_activation_is():
    torch.manual_seed(0)
    model = Raised().eval()
    network, _ = introduce(model, images(2), "after-addition", calibrate=data())
    assert (network.relu_input_norm.bias > 90).all()
    assert relative(model(images())["logits"], network(images())["logits"]) <= BUDGET


def test_a_network_in_double_precision_is_held_to_more():
    model = trained().double()
    batches = [batch.double() for batch in data()]
    network, report = introduce(model, images(2).double(), calibrate=batches)
    assert report.budget == 1e-9
    assert relative(model(batches[0]), network(batches[0])) < 1e-12


def test_eps_and_momentum_reach_the_norms():
    model = trained()
    network, _ = introduce(model, images(2), calibrate=data(), eps=0.1, momentum=0.3)
    assert {(norm.eps, norm.momentum) for norm in norms_of(network).values()} == {(0.1, 0.3)}
    assert relative(model(images()), network(images())) <= BUDGET


def test_a_network_that_has_norms_keeps_them_and_their_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
        nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip
    model(images(16))
    model.eval()
    network, report = introduce(model, images(2), where="3", calibrate=data())
    assert [name for name, _ in report.norms] == ["3_norm"]
    for key, value in model[1].state_dict().items():
        assert torch.equal(network.state_dict()[f"1.{key}"], value)
    assert relative(model(images()), network(images())) <= BUDGET


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept_and_a_graph_module_will_do(training):
    model = fx.symbolic_trace(trained()).train(training)
    network, _ = introduce(model, images(2), calibrate=data())
    assert {module.training for module in network.modules()} == {training}
    assert relative(model.eval()(images()), network.eval()(images())) <= BUDGET


def test_logits_can_be_normalized_and_stay():
    model = trained()
    network, report = introduce(model, images(2), logits=True, calibrate=data())
    assert "fc2" in report.dropped_biases
    assert relative(model(images()), network(images())) <= BUDGET


# The data


def calling(model, batch):
    model(batch["picture"])  # and gives nothing


KINDS = {
    "tensor": (torch.cat, None),
    "list": (list, None),
    "tuples": (lambda parts: [(part, torch.zeros(len(part))) for part in parts], None),
    "lists": (lambda parts: [[part] for part in parts], None),
    "dicts": (lambda parts: [{"image": part} for part in parts], None),
    "generator": (lambda parts: (part for part in parts), None),
    "iterator": (iter, None),
    "loader": (lambda parts: DataLoader(TensorDataset(torch.cat(parts)), 5), None),
    "shuffled": (lambda parts: DataLoader(TensorDataset(torch.cat(parts)), 5, shuffle=True), None),
    "forward": (lambda parts: [{"picture": part} for part in parts], calling),
    "two calls": (
        lambda parts: [parts[:2], parts[2:]],
        lambda model, some: [model(part) for part in some],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_every_kind_give_the_same_statistics(kind):
    wrap, forward = KINDS[kind]
    torch.manual_seed(0)
    model, parts = Named().eval(), data()
    network, report = introduce(model, images(2), calibrate=wrap(parts), forward=forward)
    values = model.conv(torch.cat(parts)).double()
    mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3))
    torch.testing.assert_close(network.conv_norm.bias.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network.conv_norm.running_var.double(), var, rtol=1e-5, atol=1e-6)
    assert report.batches == {"tensor": 1, "two calls": 2}.get(kind, 3)
    assert relative(model(images())["logits"], network(images())["logits"]) <= BUDGET


def test_a_generator_is_read_once_and_its_first_batches_are_proved():
    read = []

    def batches():
        for number in range(20):
            read.append(number)
            yield images(2, seed=number)

    _, report = introduce(trained(), images(2), calibrate=batches())
    assert read == list(range(20))
    assert report.batches == 20
    kept = calibrating.Data(batches())
    assert [len(list(kept)), len(list(kept)), len(list(kept))] == [20, 8, 8]


def test_several_inputs_by_position_and_by_name():
    torch.manual_seed(0)
    model, pair = Two().eval(), (images(2), torch.ones(2, 144))
    batches = [{"image": batch, "shift": torch.ones(len(batch), 144)} for batch in data()]
    for example in (pair, dict(zip(("image", "shift"), pair, strict=True))):
        network, _ = introduce(model, example, "on-input", calibrate=batches)
        assert relative(model(*pair)["logits"], network(*pair)["logits"]) <= BUDGET


def test_batches_that_the_network_overwrites_are_still_the_users():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    example, batch = torch.randn(3, 4), torch.randn(8, 4)
    was = batch.clone()
    network, _ = introduce(model.eval(), example.clone(), calibrate=[batch])
    assert torch.equal(batch, was)
    torch.testing.assert_close(
        network.get_submodule("1_norm").bias.detach(), model[1](F.relu(was)).mean(0).detach()
    )


def test_random_numbers_go_on_as_if_nothing_had_been_drawn():
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    introduce(trained(), images(2), calibrate=data())
    assert torch.equal(torch.rand(1), wanted)


# The report


def test_the_report_says_what_was_measured_and_is_plain():
    _, report = introduce(trained(), images(2), calibrate=data(), layers="conv", every=2)
    lines = str(report).splitlines()
    assert lines[0] == "1 norms introduced"
    assert lines[3:] == [
        "  statistics are those of 3 batches",
        f"  largest output difference {report.difference:.2e} of {report.scale:.3g} "
        "(budget 1e-05 relative)",
    ]
    plain = report.to_dict()
    assert json.loads(json.dumps(plain))["difference"] == report.difference
    assert (plain["exact"], plain["placeholders"], plain["batches"]) == (None, False, 3)
