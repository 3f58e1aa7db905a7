"""Tracing: what is where, for training and inference, and the model left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evenkeel.errors import SurgeryError
from evenkeel.nn import BatchNorm2d, Norm
from evenkeel.surgery.graph import (
    add_module,
    is_activation,
    is_layer,
    is_norm,
    is_pooling,
    module_of,
    name_of,
    rank_expected,
    shape_of,
    trace,
)

from .nets import ALL, Dropping, Functional, Nested, TwoFaced, Undecided, built, images, state


class Calls(nn.Module):
    """A function as a network."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def only(model, x):
    """The one node of a network that computes something."""
    nodes = [n for n in trace(model, x).graph.nodes if n.op.startswith("call")]
    assert len(nodes) == 1
    return nodes[0]


ACTIVATIONS = [
    F.relu, torch.relu, torch.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu,
    F.celu, F.gelu, F.silu, F.mish, F.sigmoid, torch.sigmoid, F.tanh, torch.tanh, F.hardswish,
    F.hardsigmoid, F.hardtanh, F.hardtanh_, F.softplus, F.softsign, F.logsigmoid, F.rrelu,
    lambda x: x.relu(), lambda x: x.relu_(), lambda x: x.sigmoid(), lambda x: x.tanh(),
    lambda x: F.relu(x, inplace=True), lambda x: torch.relu(input=x),
    lambda x: F.prelu(x, torch.ones(3)),
]  # fmt: skip
MODULES = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.PReLU(), nn.ELU(), nn.GELU(),
    nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.Hardswish(), nn.Softplus(), nn.LogSigmoid(),
]  # fmt: skip


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_functional_activations_are_seen(function):
    nodes = trace(Calls(function), images(2, 3)).graph.nodes
    assert [is_activation(n) for n in nodes if n.op.startswith("call")] == [True]


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_activation_modules_are_seen(module):
    assert is_activation(only(nn.Sequential(module), images(2, 3)))


POOLINGS = [
    lambda x: F.max_pool2d(x, 2),
    lambda x: F.avg_pool2d(x, 2),
    lambda x: F.adaptive_avg_pool2d(x, 1),
    lambda x: F.adaptive_max_pool2d(x, 1),
    lambda x: torch.max_pool2d(x, 2),
    nn.MaxPool2d(2),
    nn.AvgPool2d(2),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveMaxPool2d(1),
    nn.LPPool2d(2, 2),
    nn.FractionalMaxPool2d(2, output_size=2),
]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings_are_seen(pooling):
    node = only(Calls(pooling), images(2, 3))
    assert is_pooling(node)
    assert not is_activation(node)


LAYERS = [
    (nn.Linear(8, 4), (2, 8), 2),
    (nn.Conv1d(3, 4, 3), (2, 3, 8), 3),
    (nn.Conv2d(3, 4, 3), (2, 3, 8, 8), 4),
    (nn.Conv3d(3, 4, 3), (2, 3, 8, 8, 8), 5),
    (nn.ConvTranspose2d(3, 4, 3), (2, 3, 8, 8), 4),
    (Calls(lambda x: F.linear(x, torch.ones(4, 8))), (2, 8), 2),
    (Calls(lambda x: F.conv1d(x, torch.ones(4, 3, 1))), (2, 3, 8), 3),
    (Calls(lambda x: F.conv2d(x, torch.ones(4, 3, 1, 1))), (2, 3, 8, 8), 4),
    (Calls(lambda x: torch.conv_transpose2d(x, torch.ones(3, 4, 1, 1))), (2, 3, 8, 8), 4),
]


@pytest.mark.parametrize(("layer", "shape", "rank"), LAYERS)
def test_layers_are_seen_with_their_rank(layer, shape, rank):
    traced = trace(nn.Sequential(layer), torch.zeros(shape))
    (node,) = [n for n in traced.graph.nodes if is_layer(n)]
    assert rank_expected(node) == rank == len(shape_of(node))
    assert shape_of(node)[:2] == (2, 4)


class WithActivation(nn.BatchNorm2d):
    """As timm has it: norm and activation in one."""

    def forward(self, x):
        return F.relu(super().forward(x))


NORMS = [
    nn.BatchNorm2d(3), BatchNorm2d(3), WithActivation(3), nn.SyncBatchNorm(3),
    nn.InstanceNorm2d(3), nn.LayerNorm([3, 8, 8]), nn.GroupNorm(1, 3), nn.RMSNorm([3, 8, 8]),
    Norm("n c h w -> h w", h=8, w=8),
    Calls(lambda x: F.layer_norm(x, [3, 8, 8])),
    Calls(lambda x: F.group_norm(x, 3)),
    Calls(lambda x: F.instance_norm(x)),
    Calls(lambda x: F.batch_norm(x, None, None, training=True)),
]  # fmt: skip


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: type(n).__name__)
def test_norms_are_seen_and_never_looked_into(norm):
    assert is_norm(only(nn.Sequential(norm).eval(), images(2, 3)))


@pytest.mark.parametrize("other", [nn.Flatten(), nn.Softmax(1), nn.Dropout(), nn.Identity()])
def test_other_modules_are_none_of_these(other):
    node = only(nn.Sequential(other), images(2, 3))
    assert not any(asks(node) for asks in (is_activation, is_pooling, is_layer, is_norm))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_a_traced_copy_computes_the_same(name, training):
    model = built(name).train(training)
    before = state(model)
    traced = trace(model, images(2))
    assert torch.equal(traced(images()), model(images()))
    assert traced.training is training
    assert {n: m.training for n, m in traced.named_modules()} == dict.fromkeys(
        dict(traced.named_modules()), training
    )
    assert state(model) == before
    shared = {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in traced.parameters()
    }
    assert not shared


def test_each_module_keeps_its_own_mode():
    model = built("residual")
    model.block1.eval()
    model.block2.conv1.eval()
    traced = trace(model, images(2))
    for name, module in traced.named_modules():
        if name:
            assert module.training == model.get_submodule(name).training, name
    assert not traced.block1.training
    assert traced.block2.training
    assert not traced.block2.conv1.training


def test_tracing_draws_no_running_statistics_from_the_example():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), BatchNorm2d(3), nn.BatchNorm2d(3))
    traced = trace(model, images() + 5)
    for index in (1, 2):
        norm = traced.get_submodule(str(index))
        assert norm.running_mean.abs().sum() == 0
        assert norm.num_batches_tracked == 0


def test_shapes_are_the_outputs_shapes():
    traced = trace(built("standard"), images(5))
    shapes = {node.name: shape_of(node) for node in traced.graph.nodes if node.op != "output"}
    assert shapes["x" if "x" in shapes else "input_1"] == (5, 1, 8, 8)
    assert shapes["conv1"] == (5, 16, 8, 8)
    assert shapes["pool1"] == (5, 16, 4, 4)
    assert shapes["flatten"] == (5, 128)
    assert shapes["fc2"] == (5, 10)


def test_a_node_without_one_tensor_has_no_shape():
    pool = Calls(lambda x: F.max_pool2d(x, 2, return_indices=True)[0])
    node = next(n for n in trace(pool, images(2)).graph.nodes if is_pooling(n))
    with pytest.raises(SurgeryError, match=r"'max_pool2d\w*' gives no single tensor"):
        shape_of(node)


def test_names_are_the_modules_own_or_the_functions():
    traced = trace(Nested(), images(2))
    names = [name_of(node) for node in traced.graph.nodes]
    assert "body.first.0" in names
    names = [name_of(node) for node in trace(Functional(), images(2)).graph.nodes]
    assert {"conv1", "relu", "relu_1", "relu_2", "max_pool2d", "tanh"} <= set(names)


def test_added_modules_have_names_of_their_own():
    traced = trace(Nested(), images(2))
    names = [add_module(traced, base, nn.ReLU()) for base in ("act", "body.new", "body.new", "new")]
    assert names == ["act2", "body.new", "body.new2", "new"]


def test_functional_dropout_follows_the_mode():
    model = Dropping()
    for given in (model.train(), model.eval()):
        traced = trace(given, images(2))
        dropouts = {n: m for n, m in traced.named_modules() if "Dropout" in type(m).__name__}
        assert {n: (type(m), m.p) for n, m in dropouts.items()} == {
            "dropout2d": (nn.Dropout2d, 0.25),
            "dropout": (nn.Dropout, 0.5),
        }
        assert all(m.training == given.training for m in dropouts.values())
    x = images()
    assert torch.equal(traced.eval()(x), model.eval()(x))
    torch.manual_seed(3)
    wanted = model.train()(x)
    torch.manual_seed(3)
    assert torch.equal(traced.train()(x), wanted)
    assert not torch.equal(traced(x), wanted)


def test_a_dropout_that_never_sleeps_is_left_as_it_is():
    traced = trace(Calls(lambda x: F.dropout(x, 0.5, training=True)), images(2))
    assert not torch.equal(traced.eval()(images()), images())


def test_another_forward_in_training_is_refused_unless_only_inference_counts():
    model = TwoFaced()
    before = state(model)
    with pytest.raises(SurgeryError, match=r"TwoFaced does something else in training .*'output'"):
        trace(model, torch.zeros(2, 4))
    assert state(model) == before
    traced = trace(model, torch.zeros(2, 4), inference=True)
    assert torch.equal(traced.eval()(torch.ones(2, 4)), model.eval()(torch.ones(2, 4)))


def test_constants_of_the_forward_are_no_difference_but_numbers_drawn_are():
    fixed = Calls(lambda x: F.linear(x, torch.ones(4, 8)) + torch.arange(4.0))
    assert torch.equal(trace(fixed, torch.ones(2, 8))(torch.ones(2, 8)), fixed(torch.ones(2, 8)))
    with pytest.raises(
        SurgeryError, match=r"Calls does something else .* at every call .*'_tensor"
    ):
        trace(Calls(lambda x: x + torch.rand(8)), torch.ones(2, 8))


def test_what_cannot_be_traced_is_refused():
    model = Undecided()
    before = state(model)
    with pytest.raises(SurgeryError, match=r"Undecided cannot be traced by torch.fx \(symbolic"):
        trace(model, images(2))
    assert state(model) == before


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 6, 8), (2, 64), ()])
def test_an_example_that_does_not_fit_is_refused(shape):
    model = built("standard")
    before = state(model)
    with pytest.raises(SurgeryError, match=r"Sequential cannot run an input of shape \(.*\): \w+"):
        trace(model, torch.zeros(shape))
    assert state(model) == before


def test_what_cannot_be_copied_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].kept = model[0].weight * 2
    with pytest.raises(
        SurgeryError, match="Sequential cannot be copied, so it is not edited: Only"
    ):
        trace(model, torch.zeros(2, 2))


def test_a_function_has_no_module():
    traced = trace(Functional(), images(2))
    by_name = {node.name: node for node in traced.graph.nodes}
    assert module_of(by_name["relu"]) is None
    assert module_of(by_name["conv1"]) is traced.conv1
