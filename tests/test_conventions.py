"""Conventions against the frameworks that are here, and the maps between them against loops."""

import inspect
import math

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenkeel.conventions import (
    CONVENTIONS,
    Convention,
    convert_variance,
    decay_from_momentum,
    inside_epsilon,
    lookup,
    momentum_from_decay,
)
from evenkeel.errors import ConfigError, ShapeError

DECIMALS = st.decimals(0, 1, places=12).map(float)


def running_update(
    convention: Convention, old: float, batch: np.ndarray, weight: float
) -> tuple[float, float]:
    """(running mean, running variance) after one batch, for running values that were ``old``."""
    mean = sum(batch) / len(batch)
    squares = sum((value - mean) ** 2 for value in batch)
    var = squares / (len(batch) - (convention.remembers == "unbiased"))
    new = 1 - weight if convention.form == "decay" else weight
    return (1 - new) * old + new * mean, (1 - new) * old + new * var


def test_the_table_has_every_system_once() -> None:
    assert list(CONVENTIONS) == [
        *("torch", "cudnn", "paper", "tensorflow-op"),
        *("keras3", "keras2", "keras2-fused", "flax"),
        *("darknet-cpu", "darknet-gpu", "darknet-cudnn"),
        *("alexeyab-cpu", "alexeyab-gpu", "alexeyab-cudnn"),
        *("caffe", "mxnet", "mxnet-cudnn", "onnx", "paddle", "paddle-cudnn"),
    ]


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        CONVENTIONS["torch"] = CONVENTIONS["onnx"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        CONVENTIONS["torch"].eps = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("entry", CONVENTIONS.values(), ids=lambda entry: entry.name)
def test_rows_are_whole(entry: Convention) -> None:
    assert lookup(entry.name) is entry
    assert entry.eps_place in ("inside", "outside")
    assert entry.form in ("momentum", "decay")
    assert {entry.normalizes_with, entry.remembers} <= {"biased", "unbiased"}
    roles = [ours for _, ours in entry.vectors]
    assert len(set(roles)) == len(roles)
    assert {"weight", "bias", "running_mean", "running_var"} <= set(roles)
    assert set(roles) <= {
        *("weight", "bias", "running_mean", "running_var"),
        *("num_batches_tracked", "factor"),
    }
    assert entry.channel_axis in (1, -1)
    assert entry.source
    if entry.momentum is not None:
        assert entry.decay is not None
        assert entry.momentum + entry.decay == 1
        assert 0 < entry.momentum <= 1
        assert entry.momentum < 0.5 or entry.name == "tensorflow-op"


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ConfigError, match=r"no convention is called 'theano'; known are torch, c"):
        lookup("theano")


def test_torch_row_is_what_torch_does() -> None:
    row = lookup("torch")
    module = torch.nn.BatchNorm2d(1).double()
    assert (module.eps, module.momentum) == (row.eps, row.momentum)
    assert [theirs for theirs, _ in row.vectors] == list(module.state_dict())
    assert float(module.running_var) == row.initial_var
    x = torch.tensor([1.0, 2.0, 4.0, 9.0]).double()
    y = module(x.reshape(4, 1, 1, 1)).detach()
    var = float(x.var(unbiased=row.normalizes_with == "unbiased"))
    assert float(y.max()) == pytest.approx((9 - 4) / math.sqrt(var + module.eps), rel=1e-12)
    _, running = running_update(row, 1.0, x.numpy(), row.update_weight or math.nan)
    assert float(module.running_var) == pytest.approx(running, rel=1e-12)


def test_onnx_row_is_what_onnx_does() -> None:
    row = lookup("onnx")
    schema = onnx.defs.get_schema("BatchNormalization")
    assert schema.attributes["epsilon"].default_value.f == np.float32(row.eps)
    assert schema.attributes["momentum"].default_value.f == np.float32(row.update_weight)
    assert [item.name for item in schema.inputs[1:]] == [theirs for theirs, _ in row.vectors]
    node = onnx.helper.make_node(
        "BatchNormalization", list("xsbmv"), ["y", "rm", "rv"], training_mode=1
    )
    x = np.array([1.0, 2.0, 4.0, 9.0])
    one, zero = np.ones(1), np.zeros(1)
    _, mean, var = onnx.reference.ReferenceEvaluator(node).run(
        None, dict(zip("xsbmv", (x.reshape(4, 1, 1, 1), one, zero, one, one), strict=True))
    )
    wanted = running_update(row, 1.0, x, row.update_weight or math.nan)
    assert (float(mean[0]), float(var[0])) == pytest.approx(wanted, rel=1e-6)


def test_the_facts_that_bite() -> None:
    assert [n for n, c in CONVENTIONS.items() if c.eps_place == "outside"] == ["darknet-cpu"]
    assert [n for n, c in CONVENTIONS.items() if c.normalizes_with == "unbiased"] == [
        *("darknet-cpu", "darknet-gpu", "alexeyab-cpu")
    ]
    assert [n for n, c in CONVENTIONS.items() if c.initial_var == 0] == [
        *(n for n in CONVENTIONS if n.startswith(("darknet", "alexeyab"))),
        "caffe",
    ]
    assert [n for n, c in CONVENTIONS.items() if c.remembers == "biased"] == [
        *("keras3", "keras2", "flax", "alexeyab-gpu", "mxnet", "onnx", "paddle")
    ]
    assert [n for n, c in CONVENTIONS.items() if c.channel_axis == -1] == [
        *("tensorflow-op", "keras3", "keras2", "keras2-fused", "flax")
    ]
    assert dict(lookup("darknet-cpu").vectors)["biases"] == "bias"
    assert lookup("darknet-cpu").vectors[0][0] == "biases"
    assert lookup("keras3").vectors[0] == ("gamma", "weight")


@pytest.mark.parametrize(
    ("decay", "momentum"), [(0.99, 0.01), (0.9, 0.1), (0.999, 0.001), (0.95, 0.05), (0, 1), (1, 0)]
)
def test_momentum_is_exact_in_decimals(decay: float, momentum: float) -> None:
    assert momentum_from_decay(decay) == momentum
    assert decay_from_momentum(momentum) == decay


@given(DECIMALS)
def test_momentum_and_decay_are_inverse(weight: float) -> None:
    assert decay_from_momentum(momentum_from_decay(weight)) == weight
    assert momentum_from_decay(weight) == pytest.approx(1 - weight, abs=1e-15)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan, math.inf])
def test_weights_outside_zero_and_one_are_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match=rf"momentum must be between 0 and 1 but is {weight}"):
        decay_from_momentum(weight)
    with pytest.raises(ConfigError, match="decay must be between 0 and 1"):
        momentum_from_decay(weight)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_variance_kinds_by_definition(values: list[float]) -> None:
    biased, unbiased, count = np.var(values), np.var(values, ddof=1), len(values)
    up = convert_variance(biased, count, given="biased", wanted="unbiased")
    down = convert_variance(unbiased, count, given="unbiased", wanted="biased")
    assert up == pytest.approx(unbiased, rel=1e-14)
    assert down == pytest.approx(biased, rel=1e-14)


def test_variance_of_any_container_keeps_its_kind() -> None:
    tensor = convert_variance(torch.ones(3), 5, given="unbiased", wanted="biased")
    array = convert_variance(np.ones(3, np.float32), 5, given="unbiased", wanted="biased")
    assert torch.equal(tensor, torch.full((3,), 0.8))
    assert array.dtype == np.float32
    number = convert_variance(20.0, 20, given="biased", wanted="unbiased")
    assert number == pytest.approx(21.052631578947368, rel=1e-15)


def test_equal_kinds_need_no_count() -> None:
    var = torch.rand(3)
    assert convert_variance(var, 1, given="biased", wanted="biased") is var


@pytest.mark.parametrize("count", [1, 0, -3])
def test_no_kind_can_be_changed_for_fewer_than_two_values(count: int) -> None:
    with pytest.raises(ShapeError, match=rf"unbiased variance into a biased one for {count} value"):
        convert_variance(1.0, count, given="unbiased", wanted="biased")


def test_a_training_run_converts_exactly() -> None:
    """Ten batches of one size, remembered by Keras and by torch: the map holds at the end."""
    rng = np.random.default_rng(0)
    keras, torch_row = lookup("keras3"), lookup("torch")
    biased = unbiased = 0.0  # the share of the initial value converts like the rest only from zero
    for _ in range(10):
        batch = rng.normal(3, 2, 6)
        _, biased = running_update(keras, biased, batch, 0.99)
        _, unbiased = running_update(torch_row, unbiased, batch, momentum_from_decay(0.99))
    moved = convert_variance(biased, 6, given=keras.remembers, wanted=torch_row.remembers)
    assert moved == pytest.approx(unbiased, rel=1e-13)


@pytest.mark.parametrize("container", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=8), st.sampled_from([1e-6, 1e-5, 1e-3]))
def test_epsilon_moves_inside_exactly(container, variances: list[float], eps: float) -> None:
    var = np.array(variances)
    moved, inside = inside_epsilon(container(var), eps, 1e-5)
    assert 0 < inside <= 1e-5
    assert type(moved) is type(container(var))
    assert float(moved.min()) >= 0
    roots = np.sqrt(np.asarray(moved) + inside)
    np.testing.assert_allclose(roots, np.sqrt(var) + eps, rtol=1e-14)


def test_epsilon_stays_as_wanted_unless_a_variance_is_too_small() -> None:
    _, kept = inside_epsilon(np.array([1.0, 0.5]), 1e-6, 1e-5)
    moved, dropped = inside_epsilon(np.array([1.0, 0.0]), 1e-6, 1e-5)
    assert (kept, dropped) == (1e-5, 1e-6**2)
    np.testing.assert_array_equal(moved, [(1 + 1e-6) ** 2 - 1e-6**2, 0.0])


def test_an_unmoved_epsilon_would_be_wrong() -> None:
    """Taking Darknet's 1e-6 for one inside the root is an error that the test above can see."""
    var = np.array([1e-4])
    wrong = np.sqrt(var + 1e-6)
    assert abs(wrong / (np.sqrt(var) + 1e-6) - 1) > 1e-3


def test_it_is_a_leaf() -> None:
    """It knows numbers and names only, so that a converter can use it without a framework."""
    module = inspect.getmodule(lookup)
    assert module is not None
    words = inspect.getsource(module)
    assert "import torch" not in words
    assert "import numpy" not in words
