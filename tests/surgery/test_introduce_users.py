"""What `introduce` makes of residual nets and of networks as users write them, and its refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evenkeel.errors import ConfigError, SurgeryError
from evenkeel.surgery.graph import is_activation, is_norm
from evenkeel.surgery.introduce import PLACEMENTS, introduce

from .nets import (
    Branches,
    Dropping,
    Functional,
    Nested,
    TwoFaced,
    Undecided,
    built,
    images,
    norm_places,
    state,
)

# Residual blocks, against networks written by hand


def normed(x):
    """A fresh batch norm in training."""
    return F.batch_norm(x, None, None, training=True)


def layer(model, name, x):
    module = model.get_submodule(name)
    if isinstance(module, nn.Identity):
        return x
    return F.conv2d(x, module.weight, module.bias, module.stride, module.padding)


def tail(model, x):
    return model.fc(x.mean((2, 3)))


def before_the_addition(model, x):
    x = F.relu(normed(layer(model, "stem", x)))
    for block in ("block1", "block2", "block3"):
        branch = F.relu(normed(layer(model, f"{block}.conv1", x)))
        branch = normed(layer(model, f"{block}.conv2", branch))
        short = layer(model, f"{block}.shortcut", x)
        x = F.relu(branch + (normed(short) if block == "block2" else short))
    return tail(model, x)


def after_the_addition(model, x):
    x = F.relu(normed(layer(model, "stem", x)))
    for block in ("block1", "block2", "block3"):
        branch = F.relu(normed(layer(model, f"{block}.conv1", x)))
        branch = layer(model, f"{block}.conv2", branch)
        x = F.relu(normed(branch + layer(model, f"{block}.shortcut", x)))
    return tail(model, x)


def full_pre_activation(model, x):
    x = layer(model, "stem", x)
    for block in ("block1", "block2", "block3"):
        branch = layer(model, f"{block}.conv1", F.relu(normed(x)))
        branch = layer(model, f"{block}.conv2", F.relu(normed(branch)))
        x = branch + layer(model, f"{block}.shortcut", x)
    return tail(model, F.relu(normed(x)))


def after_the_activation(model, x):
    x = normed(F.relu(layer(model, "stem", x)))
    for block in ("block1", "block2", "block3"):
        branch = normed(F.relu(layer(model, f"{block}.conv1", x)))
        branch = layer(model, f"{block}.conv2", branch)
        x = normed(F.relu(branch + layer(model, f"{block}.shortcut", x)))
    return tail(model, x)


@pytest.mark.parametrize(
    ("name", "placement", "by_hand"),
    [
        ("residual", "before-activation", before_the_addition),
        ("residual", "after-addition", after_the_addition),
        ("residual-pre", "after-addition", full_pre_activation),
        ("residual", "after-activation", after_the_activation),
    ],
)
def test_residual_blocks_are_those_of_the_papers(name, placement, by_hand):
    model = built(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.uniform_(-1, 1)
    network, report = introduce(model, images(2), placement)
    x = images(16)
    torch.testing.assert_close(network(x), by_hand(model, x), atol=3e-5, rtol=1e-4)
    others = {before_the_addition, after_the_addition, full_pre_activation, after_the_activation}
    for other in others - {by_hand}:
        assert (network(x) - other(model, x)).abs().max() > 1e-2
    expected = {
        ("residual", "before-activation"): 8,
        ("residual", "after-addition"): 4,
        ("residual-pre", "after-addition"): 3,
        ("residual", "after-activation"): 0,
    }
    assert len(report.dropped_biases) == expected[name, placement]


# Networks as users write them


def test_functional_networks_are_served_too():
    network, report = introduce(Functional(), images(2))
    assert norm_places(network, is_norm) == {
        f"{n}_norm": n for n in ("conv1", "conv2", "conv3", "fc1")
    }
    assert len(report.dropped_biases) == 4
    network, _ = introduce(Functional(), images(2), "after-activation")
    assert norm_places(network, is_norm) == {
        "relu_norm": "relu", "relu_1_norm": "relu_1", "relu_2_norm": "relu_2", "tanh_norm": "tanh",
    }  # fmt: skip
    network, _ = introduce(Functional(), images(2), "after-pooling")
    assert list(norm_places(network, is_norm).values()) == ["max_pool2d", "avg_pool2d"]
    network, _ = introduce(Functional(), images(2), "on-input")
    assert norm_places(network, is_norm)["conv2_input_norm"] == "max_pool2d"
    network, _ = introduce(Functional(), images(2), "after-addition")
    assert norm_places(network, is_norm)["tanh_input_norm"] == "fc1"


def test_functional_layers_get_norms():
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 1, 3, 3))
            self.bias = nn.Parameter(torch.randn(4))
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            x = F.conv2d(x, self.weight, self.bias).relu()
            return self.fc(x.mean((2, 3)))

    network, report = introduce(Weights(), images(2))
    assert norm_places(network, is_norm) == {"conv2d_norm": "conv2d"}
    assert report.dropped_biases == ()
    assert network(images()).shape == (6, 2)


def test_one_activation_object_in_many_places_gets_a_norm_for_each():
    network, report = introduce(Nested(), images(2), "after-activation")
    assert [name for name, _ in report.norms] == ["act_norm", "act_norm2", "act_norm3"]
    assert len({id(network.get_submodule(name)) for name, _ in report.norms}) == 3
    network, report = introduce(Nested(), images(2))
    assert [n for n, _ in report.norms] == [
        "body.first.0_norm",
        "body.second.0.0_norm",
        "head.1_norm",
    ]
    assert network(images()).shape == (6, 3)


def test_logits_are_never_normalized():
    """Not by the activation behind them, not in two heads."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Sigmoid())
    for placement in ("before-activation", "after-activation", "after-addition"):
        network, report = introduce(model, torch.zeros(2, 4), placement)
        assert len(report.norms) == 1
        assert type(network.get_submodule("3")) is nn.Sigmoid
    convolutional = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    )
    for placement in ("before-activation", "after-activation", "after-addition"):
        network, report = introduce(convolutional, images(2), placement)
        assert len(report.norms) == 1
    with pytest.raises(SurgeryError, match="no place for 'after-pooling'"):
        introduce(convolutional, images(2), "after-pooling")
    network, _ = introduce(Branches(), images(2), "after-activation")
    assert norm_places(network, is_norm) == {"relu_norm": "relu"}


def test_functional_dropout_sleeps_in_inference():
    network, _ = introduce(Dropping(), images(2))
    assert not torch.equal(network(images()), network(images()))
    network.eval()
    assert torch.equal(network(images()), network(images()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_have_the_networks_dtype_but_never_less_than_float32(dtype):
    network, _ = introduce(built("standard").to(dtype), images(2).to(dtype))
    assert network(images().to(dtype)).dtype == dtype
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert network.conv1_norm.weight.dtype == wanted
    assert network.conv1_norm.running_mean.dtype == wanted


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training):
    network, _ = introduce(built("standard").train(training), images(2))
    assert {m.training for m in network.modules()} == {training}


# Activations in place


class Residual(nn.Module):
    """A pre-activation block whose ReLU writes over what the shortcut reads, as many do."""

    def __init__(self, write) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.write, self.fc = nn.ReLU(inplace=True), write, nn.Linear(4, 3)
        self.none = nn.Identity()

    def forward(self, x):
        x = self.stem(x)
        y = self.conv(self.write(self, x))
        return self.fc((x + y).mean((2, 3)))


IN_PLACE = {
    "module": (lambda m, x: m.act(x), True),
    "function": (lambda m, x: F.relu(x, inplace=True), True),
    "function, by position": (lambda m, x: F.relu(x, True), True),
    "underscore": (lambda m, x: torch.relu_(x), True),
    "method": (lambda m, x: x.relu_(), True),
    "behind an identity": (lambda m, x: m.act(m.none(x)), True),
    "twice": (lambda m, x: m.act(x) + x.tanh_(), True),
    "behind a sum in place": (lambda m, x: (x.add_(1), torch.relu(x))[1], False),
    "in front of another name": (lambda m, x: (x.mul_(2), m.act(x))[1], True),
    "not at all": (lambda m, x: F.relu(x), False),
    "a builtin": (lambda m, x: torch.relu(x), False),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_what_an_activation_overwrites_is_overwritten_for_its_later_readers(case):
    """Norms that hand on what they are given change nothing, wherever they are."""
    write, overwrites = IN_PLACE[case]
    torch.manual_seed(0)
    model = Residual(write).eval()
    network, report = introduce(model, images(2), "after-addition")
    assert len(report.norms) == (2 if case == "twice" else 1)
    wanted = model(images())
    for name, _ in report.norms:
        network.set_submodule(name, nn.Identity())
    network.stem.bias = copy.deepcopy(model.stem.bias)
    torch.testing.assert_close(network(images()), wanted)
    shortcut = next(n for n in network.graph.nodes if n.name == "mean").args[0].args[0]
    assert is_activation(shortcut) == overwrites


# What comes of it


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_network_trains_copies_pickles_and_loads(placement, tmp_path):
    network, _ = introduce(built("standard", "sigmoid"), images(2), placement)
    second, _ = introduce(built("standard", "sigmoid"), images(2), placement)
    x, labels = images(32), torch.arange(32) % 10
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.9
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    network.eval()
    wanted = network(x)
    assert torch.equal(copy.deepcopy(network)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), wanted)
    torch.save(network, tmp_path / "network.pt")
    assert torch.equal(torch.load(tmp_path / "network.pt", weights_only=False)(x), wanted)
    second.load_state_dict(network.state_dict())
    assert torch.equal(second.eval()(x), wanted)


def test_a_network_with_activations_in_place_trains():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3)
    )
    for placement in ("before-activation", "after-activation", "on-input"):
        network, _ = introduce(model, images(2), placement)
        network(images()).sum().backward()
        assert network.get_submodule("0").weight.grad.abs().sum() > 0


def test_the_report_says_what_was_done():
    network, report = introduce(built("standard"), images(2), layers="conv", every=2)
    assert str(report) == (
        f"1 norms introduced\n  conv1_norm: {network.conv1_norm} on the output of conv1\n"
        "  redundant biases dropped: conv1"
    )
    fresh = dict.fromkeys(("batches", "difference", "scale", "budget", "exact"))
    assert report.to_dict() == {
        "norms": report.norms, "dropped_biases": ("conv1",), "left": (), "placeholders": False,
        **fresh,
    }  # fmt: skip
    _, report = introduce(built("standard"), images(2), "on-input")
    assert report.norms[0][1].endswith("on the input of conv1")
    assert "biases" not in str(report)


def test_introducing_twice_gives_the_same_names_and_bits():
    first, one = introduce(built("residual"), images(2))
    second, two = introduce(built("residual"), images(5))
    assert one == two
    assert list(first.state_dict()) == list(second.state_dict())
    assert torch.equal(first(images()), second(images()))


# The model that was given


REFUSED = [
    (built("standard"), images(2), {"placement": "before"}, ConfigError,
     "unknown placement 'before'; choose one of before-activation"),
    (built("standard"), images(2), {"layers": "convs"}, ConfigError,
     "unknown layers 'convs'; choose one of all, conv, dense"),
    (built("standard"), images(2), {"every": 0}, ConfigError, "every is 0; give 1"),
    (built("standard"), images(2), {"every": -1}, ConfigError, "every is -1; give 1"),
    (built("standard"), images(2), {"statistics": "batch"}, ConfigError,
     r"unknown statistics 'batch' for a value of shape \(2, 16, 8, 8\); choose one of spatial"),
    (built("standard"), images(2), {"dense_statistics": "per-location"}, ConfigError,
     r"unknown statistics 'per-location' for a value of shape \(2, 64\)"),
    (built("standard"), images(2), {"statistics": "n c l -> c"}, ConfigError,
     r"'n c l -> c' describes 3 dimensions .* \(asked for on a value of shape \(2, 16, 8, 8\)\)"),
    (built("standard"), images(2), {"statistics": "n c h w -> d"}, ConfigError,
     "axis 'd' on the right of 'n c h w -> d' .*asked for on a value"),
    (built("standard"), images(2), {"statistics": "n (g c) h w -> g"}, ConfigError,
     r"splits a dimension of size 16 into \(g c\)"),
    (built("standard"), images(2), {"statistics": "n c ... -> c ..."}, ConfigError,
     "whose sizes cannot be given"),
    (built("standard"), images(2, 3), {}, SurgeryError,
     r"Sequential cannot run an input of shape \(2, 3, 8, 8\)"),
    (built("standard"), images(2), {"placement": "after-pooling", "layers": "dense"}, SurgeryError,
     "Sequential has no place for 'after-pooling' on dense layers; 'after-pooling' goes on the"),
    (nn.Sequential(nn.Linear(4, 2)), torch.zeros(2, 4), {}, SurgeryError,
     "no place for 'before-activation' on all layers"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GroupNorm(1, 2)), images(2), {},
     SurgeryError, r"Sequential has norms already \(1, 2\); give the network without .* by where="),
    (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(2, 5, 4), {},
     SurgeryError, r"'0' of Sequential gives values of shape \(2, 5, 3\), whose second axis is"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)), torch.zeros(1, 8, 8), {},
     SurgeryError, r"shape \(2, 6, 6\), whose second axis is not its channels; 4 axes"),
    (built("standard"), images(2), {"pattern": "n c h w -> c", "statistics": "layer"}, ConfigError,
     "pattern='n c h w -> c' and statistics='layer' contradict each other; give one"),
    (built("standard"), images(2), {"pattern": "spatial"}, ConfigError,
     "pattern='spatial' has no '->'; write one such as 'n c h w -> c', or give statistics="),
    (built("standard"), images(2), {"pattern": "n c -> c"}, ConfigError,
     r"'n c -> c' describes 2 dimensions .* \(asked for on a value of shape \(2, 16, 8, 8\)\)"),
    (built("standard"), images(2), {"forward": lambda model, batch: None}, ConfigError,
     "forward= runs the batches of calibrate=, but there are none; give both"),
    (Undecided(), images(2), {}, SurgeryError, "Undecided cannot be traced by torch.fx"),
    (TwoFaced(), torch.zeros(2, 4), {}, SurgeryError, "TwoFaced does something else in training"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "example", "options", "kind", "match"), REFUSED)
def test_a_refusal_names_the_reason_and_touches_nothing(model, example, options, kind, match):
    before = state(model)
    with pytest.raises(kind, match=match):
        introduce(model, example, **options)
    assert state(model) == before


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("training", [True, False])
def test_the_given_model_is_byte_for_byte_untouched(placement, training):
    model = built("residual").train(training)
    model.block1.eval()
    model.stem.register_forward_hook(lambda module, args, output: None)
    model(images()).sum().backward()
    before = state(model)
    network, _ = introduce(model, images(2), placement)
    assert state(model) == before
    network(images()).sum().backward()
    torch.optim.SGD(network.parameters(), 0.1).step()
    assert state(model) == before


def test_the_state_that_is_compared_sees_what_surgery_could_do():
    def changed(do) -> bool:
        model = built("standard")
        before = state(model)
        do(model)
        return state(model) != before

    assert not changed(lambda m: m(images()))
    assert changed(lambda m: m.conv1.weight.data[0, 0, 0, 0].add_(1e-7))
    assert changed(lambda m: m.conv1.register_parameter("bias", None))
    assert changed(lambda m: m.act1.eval())
    assert changed(lambda m: m.act1.register_forward_pre_hook(lambda module, args: None))
    assert changed(lambda m: m.add_module("new", nn.ReLU()))
    assert changed(lambda m: setattr(m.conv1, "stride", (2, 2)))
    assert changed(lambda m: m(images()).sum().backward())


def test_the_random_numbers_of_the_user_are_left_alone():
    model = Dropping()
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    introduce(model, images(2))
    assert torch.equal(torch.rand(1), wanted)
