"""Norms stand where they were promised, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evenkeel.errors import ConfigError, SurgeryError
from evenkeel.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Norm, PerActivationBatchNorm
from evenkeel.study.models import ACTIVATIONS
from evenkeel.surgery.graph import is_activation, is_layer, is_norm, is_pooling
from evenkeel.surgery.introduce import PLACEMENTS, introduce

from .nets import (
    ALL,
    Branches,
    Twice,
    built,
    images,
    norm_places,
    outputs_of,
)

NORMS = (nn.modules.batchnorm._NormBase, Norm)

STANDARD = {
    "before-activation": {"conv1_norm": "conv1", "conv2_norm": "conv2", "fc1_norm": "fc1"},
    "after-activation": {"act1_norm": "act1", "act2_norm": "act2", "act3_norm": "act3"},
    "on-input": {
        "conv1_input_norm": "input_1",
        "conv2_input_norm": "pool1",
        "fc1_input_norm": "flatten",
        "fc2_input_norm": "act3",
    },
    "after-pooling": {"pool1_norm": "pool1", "pool2_norm": "pool2"},
    "after-addition": {
        "act1_input_norm": "conv1",
        "act2_input_norm": "conv2",
        "act3_input_norm": "fc1",
    },
}
RESIDUAL = {
    "before-activation": {
        f"{name.replace('_', '.', 1) if 'block' in name else name}_norm": name
        for name in (
            "stem", "block1_conv1", "block1_conv2", "block2_conv1", "block2_conv2",
            "block2_shortcut", "block3_conv1", "block3_conv2",
        )
    },
    "after-addition": {
        "act_input_norm": "stem",
        "block1.act1_input_norm": "block1_conv1",
        "block1.act2_input_norm": "add",
        "block2.act1_input_norm": "block2_conv1",
        "block2.act2_input_norm": "add_1",
        "block3.act1_input_norm": "block3_conv1",
        "block3.act2_input_norm": "add_2",
    },
    "after-pooling": {"pool_norm": "pool"},
}  # fmt: skip


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_standard_network_has_norms_exactly_there(placement):
    network, report = introduce(built("standard"), images(2), placement)
    assert norm_places(network, is_norm) == STANDARD[placement]
    assert [name for name, _ in report.norms] == list(STANDARD[placement])


@pytest.mark.parametrize("placement", RESIDUAL)
def test_the_residual_network_has_norms_exactly_there(placement):
    network, _ = introduce(built("residual"), images(2), placement)
    assert norm_places(network, is_norm) == RESIDUAL[placement]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ALL)
def test_every_promise_on_every_network(name, placement, activation):
    model = built(name, activation)
    if placement == "after-pooling" and name == "paper":
        with pytest.raises(
            SurgeryError, match=r"no place for 'after-pooling' on all layers; .*each p"
        ):
            introduce(model, images(2), placement)
        return
    network, report = introduce(model, images(2), placement)
    nodes = list(network.graph.nodes)
    layers = [n for n in nodes if is_layer(n)]
    inputs = {
        "before-activation": lambda n: is_layer(n) and n is not layers[-1],
        "after-activation": is_activation,
        "after-pooling": is_pooling,
    }
    if placement in inputs:
        for node in nodes:
            followed = {is_norm(user) for user in node.users} == {True}
            assert followed == bool(inputs[placement](node)), node
            assert len(node.users) == 1 or not followed
    else:
        wanted = is_layer if placement == "on-input" else is_activation
        for node in nodes:
            if wanted(node):
                assert is_norm(node.all_input_nodes[0]), node
            elif node.op != "output":
                assert not any(map(is_norm, node.all_input_nodes)), node
    assert not any(is_norm(user) for user in layers[-1].users)
    assert len(report.norms) == sum(map(is_norm, nodes))
    assert network.training


@pytest.mark.parametrize("name", ["standard", "paper", "lenet5"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_gets_mean_0_and_variance_1(name, activation):
    network, _ = introduce(built(name, activation), images(2))
    values = outputs_of(network, images(64))
    acts = [node for node in network.graph.nodes if is_activation(node)]
    assert len(acts) == len([n for n in network.graph.nodes if is_layer(n)]) - 1
    for act in acts:
        value = values[act.all_input_nodes[0]].double()
        axes = [axis for axis in range(value.dim()) if axis != 1]
        var, mean = torch.var_mean(value, axes, correction=0)
        before = values[act.all_input_nodes[0].all_input_nodes[0]].double()
        wanted = before.var(axes, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
        torch.testing.assert_close(var, wanted / (wanted + 1e-5), atol=1e-4, rtol=1e-4)
        assert (wanted > 1e-4).any()


@pytest.mark.parametrize(
    ("statistics", "axes"),
    [
        ("spatial", (0, 2, 3)),
        ("per-activation", (0,)),
        ("per-location", (0, 1)),
        ("layer", (1, 2, 3)),
        ("n c h w -> c w", (0, 2)),
        ("n c h w ->", (0, 1, 2, 3)),
        ("n k ... -> k", (0, 2, 3)),
    ],
)
def test_statistics_are_taken_over_the_promised_axes(statistics, axes):
    network, _ = introduce(built("standard"), images(2), statistics=statistics)
    values = outputs_of(network, images(32))
    by_name = {node.name: values[node] for node in values}
    for name in ("conv1", "conv2"):
        before, after = by_name[name].double(), by_name[f"{name}_norm"].double()
        var, mean = torch.var_mean(before, axes, correction=0, keepdim=True)
        torch.testing.assert_close(after, (before - mean) / (var + 1e-5).sqrt(), atol=1e-4, rtol=0)
    dense, normed = by_name["fc1"].double(), by_name["fc1_norm"].double()
    axis = 1 if statistics == "layer" else 0
    var, mean = torch.var_mean(dense, axis, correction=0, keepdim=True)
    torch.testing.assert_close(normed, (dense - mean) / (var + 1e-5).sqrt(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("statistics", "dense", "kind", "pattern"),
    [
        ("spatial", None, BatchNorm1d, None),
        ("spatial", "spatial", BatchNorm1d, None),
        ("layer", None, Norm, "n c -> n"),
        ("layer", "spatial", BatchNorm1d, None),
        ("spatial", "layer", Norm, "n c -> n"),
        ("spatial", "per-activation", PerActivationBatchNorm, "n c -> c"),
        ("spatial", "n c -> ", Norm, "n c ->"),
        ("spatial", "n c -> c", Norm, "n c -> c"),
    ],
)
def test_dense_layers_have_statistics_of_their_own(statistics, dense, kind, pattern):
    network, _ = introduce(
        built("standard"), images(2), statistics=statistics, dense_statistics=dense
    )
    assert type(network.fc1_norm) is kind
    assert pattern is None or str(network.fc1_norm.spec) == pattern
    assert type(network.conv1_norm) is (Norm if statistics == "layer" else BatchNorm2d)


def test_one_statistic_for_all_units_is_one():
    network, report = introduce(built("paper"), images(2), dense_statistics="n c ->")
    value = outputs_of(network, images(16))
    by_name = {node.name: value[node] for node in value}
    assert network.fc1_norm.running_mean.shape == ()
    normed = by_name["fc1_norm"]
    torch.testing.assert_close(normed.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert normed.mean(0).abs().max() > 0.1
    assert report.dropped_biases == ()


@pytest.mark.parametrize(
    ("layers", "placement", "names"),
    [
        ("conv", "before-activation", ["conv1_norm", "conv2_norm"]),
        ("dense", "before-activation", ["fc1_norm"]),
        ("conv", "after-activation", ["act1_norm", "act2_norm"]),
        ("dense", "after-activation", ["act3_norm"]),
        ("conv", "on-input", ["conv1_input_norm", "conv2_input_norm"]),
        ("dense", "on-input", ["fc1_input_norm", "fc2_input_norm"]),
        ("conv", "after-pooling", ["pool1_norm", "pool2_norm"]),
        ("conv", "after-addition", ["act1_input_norm", "act2_input_norm"]),
    ],
)
def test_layers_choose_among_the_places(layers, placement, names):
    _, report = introduce(built("standard"), images(2), placement, layers=layers)
    assert [name for name, _ in report.norms] == names


@pytest.mark.parametrize(
    ("every", "names"),
    [
        (1, ["conv1", "conv2", "fc1", "fc2"]),
        (2, ["conv1", "fc1"]),
        (3, ["conv1", "fc2"]),
        (9, ["conv1"]),
    ],
)
def test_every_other_place(every, names):
    _, report = introduce(built("lenet5"), images(2), every=every)
    assert [name.removesuffix("_norm") for name, _ in report.norms] == names


@pytest.mark.parametrize("statistics", ["spatial", "per-activation", "per-location", "layer"])
def test_settings_reach_every_norm(statistics):
    network, _ = introduce(
        built("standard"), images(2), statistics=statistics, affine=False, eps=1e-3, momentum=0.3
    )
    norms = [m for m in network.modules() if isinstance(m, NORMS)]
    assert len(norms) == 3
    for norm in norms:
        assert (norm.eps, norm.momentum) == (1e-3, 0.3)
        assert norm.weight is None
        assert norm.bias is None
    network, _ = introduce(built("standard"), images(2), statistics=statistics)
    for norm in (m for m in network.modules() if isinstance(m, NORMS)):
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.equal(norm.bias, torch.zeros_like(norm.bias))


def test_ranks_have_their_own_classes():
    one = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 1))
    three = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Conv3d(4, 3, 1))
    assert type(introduce(one, torch.zeros(2, 2, 8))[0].get_submodule("0_norm")) is BatchNorm1d
    cube = torch.zeros(2, 2, 5, 5, 5)
    assert type(introduce(three, cube)[0].get_submodule("0_norm")) is BatchNorm3d
    for statistics in ("per-activation", "per-location", "layer"):
        network, _ = introduce(three, cube, statistics=statistics)
        assert network(torch.randn(4, 2, 5, 5, 5)).shape == (4, 3, 3, 3, 3)


def test_a_pattern_is_another_way_to_say_statistics():
    text = "n c h w -> c w"
    _, one = introduce(built("standard"), images(2), pattern=text)
    _, two = introduce(built("standard"), images(2), statistics=text)
    _, three = introduce(built("standard"), images(2), pattern=text, statistics=text)
    assert one == two == three
    assert f"Norm('{text}'" in one.norms[0][1]


def test_a_pattern_of_two_axes_is_for_dense_values():
    network, _ = introduce(built("paper"), images(2), pattern="n c ->")
    assert str(network.fc1_norm.spec) == "n c ->"
    network, _ = introduce(built("paper"), images(2), pattern="n c ->", dense_statistics="layer")
    assert str(network.fc1_norm.spec) == "n c -> n"
    network, _ = introduce(built("standard"), images(2), pattern="n c -> c", layers="dense")
    assert type(network.fc1_norm) is Norm
    with pytest.raises(ConfigError, match=r"describes 2 dimensions but got 4"):
        introduce(built("standard"), images(2), pattern="n c -> c")


# Chosen places


class Blocks(nn.Module):
    """Blocks of modules and functions, some with a norm; the last layer gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.normed = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.free = nn.Sequential(nn.Conv2d(4, 4, 1), Activated(), nn.Conv2d(4, 4, 1))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.free(self.normed(torch.tanh(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


class Activated(nn.Module):
    def forward(self, x):
        return F.silu(x)


BEFORE, AFTER, ADDED = "before-activation", "after-activation", "after-addition"


@pytest.mark.parametrize(
    ("placement", "where", "names"),
    [
        (BEFORE, "stem", ["stem_norm"]),
        (BEFORE, "free", ["free.0_norm", "free.2_norm"]),
        (BEFORE, "free.2", ["free.2_norm"]),
        (BEFORE, ["free.2", "stem"], ["stem_norm", "free.2_norm"]),
        (BEFORE, ("free", "free.0"), ["free.0_norm", "free.2_norm"]),
        (BEFORE, lambda name, module: module.kernel_size == (3, 3), ["stem_norm"]),
        (AFTER, "tanh", ["tanh_norm"]),
        (AFTER, "free", ["silu_norm"]),
        (AFTER, "free.1", ["silu_norm"]),
        (AFTER, ["relu", "normed"], ["normed.2_norm", "relu_norm"]),
        (AFTER, lambda name, module: module is None, ["tanh_norm", "silu_norm", "relu_norm"]),
        (ADDED, ["silu"], ["silu_input_norm"]),
        ("on-input", "fc", ["fc_input_norm"]),
        ("on-input", lambda name, _: name.startswith("f"),
         ["free.0_input_norm", "free.2_input_norm", "fc_input_norm"]),
    ],
)  # fmt: skip
def test_where_chooses_places_in_a_network_that_has_norms(placement, where, names):
    network, report = introduce(Blocks(), images(2), placement, where=where)
    assert [name for name, _ in report.norms] == names
    assert network(images()).shape == (6, 3)
    for node in network.graph.nodes:
        assert not (is_norm(node) and any(map(is_norm, node.users))), "two norms in a row"


def test_places_beside_a_norm_are_left_with_the_reason():
    _, report = introduce(Blocks(), images(2), where=lambda name, module: True)
    assert [name for name, _ in report.norms] == ["stem_norm", "free.0_norm", "free.2_norm"]
    assert report.left == (("normed.0", "the norm 'normed.1' is there"),)
    assert "nothing at normed.0: the norm 'normed.1' is there" in str(report)
    _, report = introduce(Blocks(), images(2), ADDED, where=lambda name, module: True)
    assert [place for place, _ in report.left] == ["normed.2"]


def test_where_and_the_other_choices_go_together():
    _, report = introduce(built("standard"), images(2), where=["conv1", "conv2", "fc1"], every=2)
    assert [name for name, _ in report.norms] == ["conv1_norm", "fc1_norm"]
    _, report = introduce(
        built("standard"), images(2), where=lambda name, _: name != "conv1", layers="conv"
    )
    assert [name for name, _ in report.norms] == ["conv2_norm"]


def test_each_call_of_a_layer_has_a_name():
    network, report = introduce(Twice(ends=False), images(2), where="conv_1")
    assert norm_places(network, is_norm) == {"conv_norm": "conv_1"}
    assert report.dropped_biases == ()


def test_biases_in_front_of_norms_that_were_there_stay():
    model = Blocks()
    network, report = introduce(model, images(2), where="stem")
    assert report.dropped_biases == ("stem",)
    assert torch.equal(network.get_submodule("normed.0").bias, model.normed[0].bias)


def test_a_hook_keeps_the_bias():
    model = built("standard")
    model.conv1.register_forward_hook(lambda module, args, output: output * output)
    assert introduce(model, images(2))[1].dropped_biases == ("conv2", "fc1")


@pytest.mark.parametrize(
    ("placement", "options", "match"),
    [
        (BEFORE, {"where": "stm"}, r"Blocks has no module and no node 'stm' \(did you mean 'stem'"),
        (BEFORE, {"where": ["stem", "fre"]}, r"where='fre': .*mean '(free.*|relu)'\?\); places"),
        (BEFORE, {"where": "tanh"}, "'tanh' of Blocks is no place for 'before-activation' on all"),
        (BEFORE, {"where": "fc"}, "'fc' gives the logits of Blocks, .* unless logits=True; places"),
        (BEFORE, {"where": "fc", "layers": "conv"}, "'fc' of Blocks is no place for .* conv"),
        (BEFORE, {"where": "normed"}, r"'normed': every place .* \('normed.0': the norm"),
        (BEFORE, {"where": "normed.0"}, r"where='normed.0': every place there has a norm already"),
        (ADDED, {"where": "normed.2"}, r"\('normed.2': the norm 'normed.1' is there\); leave it"),
        (BEFORE, {"where": []}, "where= is empty"),
        (BEFORE, {"where": lambda name, module: False},
         "where= chose none of the places of Blocks for 'before-activation' on all layers; they "
         r"are stem, normed.0, free.0, free.2"),
        (BEFORE, {"where": lambda name, module: name == "normed.0"}, "that all have a norm alrea"),
        (BEFORE, {}, r"Blocks has norms already \(normed.1\); .*or say by where= which"),
    ],
)  # fmt: skip
def test_where_that_means_no_place_says_what_there_is(placement, options, match):
    with pytest.raises(SurgeryError, match=match):
        introduce(Blocks(), images(2), placement, **options)


def test_logits_are_normalized_if_asked():
    _, report = introduce(built("standard"), images(2), logits=True)
    assert [name for name, _ in report.norms][-2:] == ["fc1_norm", "fc2_norm"]
    assert report.dropped_biases == ("conv1", "conv2", "fc1", "fc2")
    _, report = introduce(built("standard"), images(2), logits=True, where="fc2")
    assert [name for name, _ in report.norms] == ["fc2_norm"]
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Sigmoid())
    _, report = introduce(model, torch.zeros(2, 4), "after-activation", logits=True)
    assert [name for name, _ in report.norms] == ["1_norm", "3_norm"]


# Biases


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        ({}, ("conv1", "conv2", "fc1")),
        ({"statistics": "per-activation"}, ("conv1", "conv2", "fc1")),
        ({"statistics": "per-location"}, ("fc1",)),
        ({"statistics": "layer"}, ()),
        ({"statistics": "n c h w -> c w"}, ("conv1", "conv2", "fc1")),
        ({"statistics": "n k h w -> k"}, ("conv1", "conv2", "fc1")),
        ({"statistics": "n h c w -> c"}, ("fc1",)),  # 'c' is the height here
        ({"statistics": "n c h w -> n c"}, ("conv1", "conv2", "fc1")),
        ({"statistics": "n ... ->", "dense_statistics": "n c ->"}, ()),
        ({"every": 2}, ("conv1", "fc1")),
        ({"layers": "conv"}, ("conv1", "conv2")),
        ({"placement": "after-addition"}, ("conv1", "conv2", "fc1")),
        ({"placement": "after-activation"}, ()),
        ({"placement": "after-pooling"}, ()),
        ({"placement": "on-input"}, ()),
    ],
)
def test_biases_go_where_the_norm_subtracts_them_and_nothing_changes(options, dropped):
    model = built("standard")
    with torch.no_grad():
        for layer in (model.conv1, model.conv2, model.fc1):
            layer.bias.uniform_(-2, 2)
    network, report = introduce(model, images(2), **options)
    assert report.dropped_biases == dropped
    for name in ("conv1", "conv2", "fc1", "fc2"):
        assert (network.get_submodule(name).bias is None) == (name in dropped)
    with_biases = copy.deepcopy(network)
    for name in dropped:
        layer = with_biases.get_submodule(name)
        layer.bias = nn.Parameter(model.get_submodule(name).bias.detach().clone())
    x = images(16)
    torch.testing.assert_close(network(x), with_biases(x), atol=2e-5, rtol=1e-5)


def test_a_bias_that_the_norm_keeps_does_matter():
    """The test above can fail: with layer norm a lost bias shows."""
    model = built("standard")
    nn.init.uniform_(model.conv1.bias, -2, 2)
    network, _ = introduce(model, images(2), statistics="layer")
    wanted = network(images(16))
    network.conv1.bias = None
    assert (network(images(16)) - wanted).abs().max() > 1e-2


def test_a_bias_of_a_layer_with_other_readers_stays():
    network, report = introduce(Branches(), images(2), "after-addition")
    assert norm_places(network, is_norm) == {"relu_input_norm": "conv"}
    assert report.dropped_biases == ()
    network, report = introduce(Branches(), images(2))
    assert norm_places(network, is_norm) == {"conv_norm": "conv", "side_norm": "side"}
    assert report.dropped_biases == ("conv", "side")


def test_a_layer_called_twice_keeps_a_bias_that_one_call_needs():
    """Every call must lose it in a norm: the last call's output is the logits here."""
    x = images(8)
    network, report = introduce(Twice(ends=True), images(2))
    assert norm_places(network, is_norm) == {"first_norm": "first", "conv_norm": "conv"}
    assert report.dropped_biases == ("first",)
    network, report = introduce(Twice(ends=False), images(2))
    assert norm_places(network, is_norm) == {
        "first_norm": "first",
        "conv_norm": "conv",
        "conv_norm2": "conv_1",
    }
    assert report.dropped_biases == ("first", "conv")
    assert network.conv_norm is not network.conv_norm2
    network(x)
    assert not torch.equal(network.conv_norm.running_mean, network.conv_norm2.running_mean)


class Tied(nn.Module):
    """A weight and a bias that are read in another way, too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x))) + self.fc1.bias.sum()


def test_a_bias_that_is_read_elsewhere_stays():
    network, report = introduce(Tied(), torch.zeros(2, 4))
    assert report.dropped_biases == ()
    assert network.fc1.bias is not None
    assert network(torch.randn(4, 4)).shape == (4, 2)
