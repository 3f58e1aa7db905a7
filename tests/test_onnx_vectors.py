"""The BatchNormalization vectors that the onnx package ships: inputs and outputs of others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import onnx.backend.test.case.node.batch_normalization  # registers its cases
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.backend.test.case import node as node_cases

from evenkeel.conventions import convert_variance, lookup, momentum_from_decay
from evenkeel.functional import batch_norm
from evenkeel.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d

Array = np.ndarray
ROW = lookup("onnx")
FOLDER = Path(onnx.backend.test.__file__).parent / "data" / "pytorch-converted"
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


@dataclass(frozen=True)
class Vector:
    """One node with its inputs and the outputs that another implementation gave."""

    name: str
    node: onnx.NodeProto
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]

    def attribute(self, name: str, default: float) -> float:
        found = {a.name: helper.get_attribute_value(a) for a in self.node.attribute}
        return float(found.get(name, default))

    @property
    def is_training(self) -> bool:
        return bool(self.attribute("training_mode", 0))


def generated() -> list[Vector]:
    """The node cases, made by ONNX's own formulas when its module was imported."""
    found = []
    for case in node_cases._NodeTestCases:  # collect_testcases() would generate every op's
        (node,) = case.model.graph.node
        if node.op_type == "BatchNormalization":
            for inputs, outputs in case.data_sets:
                found.append(Vector(case.name, node, tuple(inputs), tuple(outputs)))
    return found


def recorded() -> list[Vector]:
    """The files that an old PyTorch exported, with what it computed."""
    found = []
    for folder in sorted(FOLDER.glob("test_BatchNorm*")):
        graph = onnx.load(folder / "model.onnx").graph
        (node,) = graph.node
        weights = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
        for data in sorted(folder.glob("test_data_set_*")):
            x, y = (
                numpy_helper.to_array(onnx.load_tensor(data / f"{kind}_0.pb"))
                for kind in ("input", "output")
            )
            inputs = (x, *(weights[name] for name in node.input[1:]))
            found.append(Vector(folder.name, node, inputs, (y,)))
    return found


GENERATED, RECORDED = generated(), recorded()


def computed(vector: Vector) -> tuple[Array, ...]:
    """Ours: y and, in training, ONNX's running mean and variance."""
    x, scale, bias, mean, var = (torch.from_numpy(np.array(a)).double() for a in vector.inputs)
    eps = vector.attribute("epsilon", ROW.eps or 0)
    if not vector.is_training:
        return (batch_norm(x, scale, bias, mean, var, training=False, eps=eps).numpy(),)
    momentum = momentum_from_decay(vector.attribute("momentum", ROW.update_weight or 0))
    # Ours remembers the unbiased variance, ONNX the biased one: only the new share is converted.
    running_mean, new_var = mean.clone(), torch.zeros_like(var)
    y = batch_norm(
        *(x, scale, bias, running_mean, new_var), training=True, momentum=momentum, eps=eps
    )
    count = x.numel() // x.shape[1]
    share = convert_variance(new_var, count, given="unbiased", wanted=ROW.remembers)
    return y.numpy(), running_mean.numpy(), (var * (1 - momentum) + share).numpy()


def test_the_vectors_are_there() -> None:
    assert sorted(v.name for v in GENERATED) == [
        "test_batchnorm_epsilon",
        "test_batchnorm_epsilon_training_mode",
        "test_batchnorm_example",
        "test_batchnorm_example_training_mode",
    ]
    assert sum(v.is_training for v in GENERATED) == 2
    assert len(RECORDED) >= 5
    assert not any(v.is_training for v in RECORDED)


@pytest.mark.parametrize("vector", GENERATED + RECORDED, ids=lambda v: v.name)
def test_ours_gives_the_vector(vector: Vector) -> None:
    results = computed(vector)
    assert len(results) == len(vector.outputs)
    for got, wanted in zip(results, vector.outputs, strict=True):
        np.testing.assert_allclose(got, wanted, **CLOSE)


@pytest.mark.parametrize("vector", RECORDED, ids=lambda v: v.name)
def test_a_module_that_loads_the_vectors(vector: Vector) -> None:
    kinds = {3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
    x, *vectors = (torch.from_numpy(np.array(a)) for a in vector.inputs)
    decay = vector.attribute("momentum", ROW.update_weight or 0)
    module = kinds[x.dim()](
        x.shape[1], eps=vector.attribute("epsilon", 0), momentum=momentum_from_decay(decay)
    )
    state = dict(zip((ours for _, ours in ROW.vectors), vectors, strict=True))
    module.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
    y = module.eval()(x).detach().numpy()
    np.testing.assert_allclose(y, vector.outputs[0], **CLOSE)


@pytest.mark.parametrize("mistake", ["unbiased variance", "decay taken for momentum"])
def test_a_mistaken_convention_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = computed.__globals__
    if mistake == "unbiased variance":
        monkeypatch.setitem(names, "convert_variance", lambda var, *_, **__: var)
    else:
        monkeypatch.setitem(names, "momentum_from_decay", lambda decay: decay)
    for vector in (v for v in GENERATED if v.is_training):
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            test_ours_gives_the_vector(vector)


def test_a_mistaken_epsilon_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vector, "attribute", lambda self, name, default: default)
    by_name = {v.name: v for v in GENERATED}
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_ours_gives_the_vector(by_name["test_batchnorm_epsilon"])
    test_ours_gives_the_vector(by_name["test_batchnorm_example"])
