"""A folded network has its norms again, computes what it did, and trains."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch import nn

from evenkeel.errors import ConfigError, SurgeryError
from evenkeel.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from evenkeel.surgery.fold import fold, skip_norms
from evenkeel.surgery.graph import is_norm
from evenkeel.surgery.unfold import unfold

from . import architectures
from .architectures import NORMED
from .nets import Functional, Twice, images, norm_places, randomized, state
from .test_introduce_calibrated import BUDGET, data, learns, norms_of, relative, trained


class Entry(NamedTuple):
    """What a fold's report says of a norm."""

    norm: str
    into: tuple[str, ...]
    direction: str = "backward"


@dataclass
class Report:
    folded: tuple[Entry, ...] = field(default_factory=tuple)


BIAS_FREE = [
    "resnet", "bottlenecks", "mobilenet", "squeeze-excite", "shufflenet", "generator", "volumes",
]  # fmt: skip
"""Architectures whose layers before a norm have no bias, and whose norms all go into layers."""


def folded(name: str):
    model = randomized(NORMED[name]()).eval()
    return model, *fold(model, architectures.images(name))


@pytest.mark.parametrize("name", BIAS_FREE)
def test_norms_are_back_under_their_names_and_load_what_was_there(name):
    model, small, report = folded(name)
    before = state(small)
    network, back = unfold(small, architectures.images(name), report)
    assert state(small) == before
    x = architectures.images(name, 5, seed=3)
    assert relative(small(x), network(x)) <= BUDGET
    assert (back.budget, back.left) == (BUDGET, ())
    assert back.difference <= BUDGET * back.scale
    assert {name for name, _ in back.norms} == {entry.norm for entry in report.folded}
    assert sorted(network.state_dict()) == sorted(model.state_dict())
    network.load_state_dict(model.state_dict())
    assert relative(model(x), network(x)) <= BUDGET
    learns(network, x)


@pytest.mark.parametrize("name", [*BIAS_FREE, "vgg", "u-net", "sequence", "inception"])
def test_with_data_the_statistics_are_the_datas(name):
    _, small, report = folded(name)
    batches = [architectures.images(name, n, seed) for seed, n in enumerate((4, 3, 5), start=1)]
    network, back = unfold(small, batches[0], report, calibrate=batches)
    assert (back.batches, back.placeholders) == (3, False)
    x = architectures.images(name, 5, seed=9)
    assert relative(small(x), network(x)) <= BUDGET
    for norm in norms_of(network).values():
        wanted = (norm.running_var + norm.eps).sqrt()
        torch.testing.assert_close(norm.weight.detach(), wanted)
        assert int(norm.num_batches_tracked) == 3
        assert not torch.equal(norm.running_var, torch.ones_like(norm.running_var))
    again, _ = fold(network, batches[0])
    assert relative(small(x), again(x)) <= BUDGET
    learns(network, x)


def test_without_names_every_layer_but_the_logits_has_a_norm():
    model = trained()
    network, report = unfold(model, images(2))
    assert norm_places(network, is_norm) == {
        "conv1_norm": "conv1", "conv2_norm": "conv2", "fc1_norm": "fc1",
    }  # fmt: skip
    assert report.dropped_biases == ("conv1", "conv2", "fc1")
    assert relative(model(images()), network(images())) <= BUDGET
    network, _ = unfold(Functional().eval(), images(2))
    assert [*norms_of(network)] == ["conv1_norm", "conv2_norm", "conv3_norm", "fc1_norm"]


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_without_data_a_norm_hands_on_what_it_is_given(eps):
    model = trained()
    network, report = unfold(model, images(2), {"bn1": "conv1"}, eps=eps, momentum=0.3)
    norm = network.bn1
    assert type(norm) is BatchNorm2d
    assert (norm.eps, norm.momentum) == (eps, 0.3)
    assert torch.equal(norm.running_mean, -model.conv1.bias)
    assert torch.equal(norm.running_var, torch.ones(16))
    torch.testing.assert_close(norm.weight.detach(), torch.full((16,), math.sqrt(1 + eps)))
    assert torch.equal(norm.bias, torch.zeros(16))
    assert int(norm.num_batches_tracked) == 0
    assert relative(model(images()), network(images())) <= BUDGET
    assert report.placeholders
    assert report.batches is None
    assert "running statistics are placeholders" in str(report)
    assert "recalibrate" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["placeholders"] is True


def test_ranks_have_their_own_classes_and_names_any_depth():
    model = nn.Sequential(
        nn.Conv3d(1, 4, 2), nn.ReLU(), nn.Flatten(2), nn.Conv1d(4, 2, 1), nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()  # fmt: skip
    norms = {"deep.er.bn": "0", "bn": "3", "0.bn": "5"}
    network, report = unfold(model, torch.randn(2, 1, 3, 3, 3), norms)
    assert [name for name, _ in report.norms] == [*norms]
    kinds = [type(network.get_submodule(name)) for name in norms]
    assert kinds == [BatchNorm3d, BatchNorm1d, BatchNorm1d]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training):
    model = trained().train(training)
    network, _ = unfold(model, images(2), {"bn1": "conv1"})
    assert {module.training for module in network.modules()} == {training}


# Norms that were folded into several layers, or into those behind them


class Ways(nn.Module):
    """Two layers that read one value, two whose values meet, and one that meets nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.side, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        both = torch.cat([self.left(x) * 2, self.right(x)], 1)
        side = self.side(x)
        return self.fc(torch.relu(both).mean((2, 3))) + side.mean() + side.sum()


def ways(*entries: Entry, **options):
    torch.manual_seed(0)
    model = Ways().eval()
    network, report = unfold(model, images(2), Report(entries), **options)
    assert relative(model(images()), network(images())) <= BUDGET
    return network, report


@pytest.mark.parametrize("options", [{}, {"calibrate": data()}], ids=["plain", "calibrated"])
def test_a_norm_that_was_folded_forward_is_on_the_input_of_its_layers(options):
    network, report = ways(Entry("bn", ("left", "right", "side"), "forward"), **options)
    assert norm_places(network, is_norm) == {"bn": "relu"}
    assert report.norms[0][1].endswith("on the input of left, right, side")
    assert report.dropped_biases == ()
    assert {node.target for node in network.graph.nodes if node.op == "call_module"} >= {"bn"}
    network, _ = ways(Entry("bn", ("left", "side"), "forward"), **options)
    readers = {node.name for n in network.graph.nodes if is_norm(n) for node in n.users}
    assert readers == {"left", "side"}


@pytest.mark.parametrize("options", [{}, {"calibrate": data()}], ids=["plain", "calibrated"])
def test_a_norm_that_was_folded_into_several_layers_is_where_they_meet(options):
    network, report = ways(Entry("bn", ("left", "right")), **options)
    assert norm_places(network, is_norm) == {"bn": "cat"}
    assert network.bn.num_features == 8
    assert report.dropped_biases == ()


def test_what_has_no_place_is_left_with_the_reason():
    bn = Entry("bn", ("stem",))
    _, report = ways(
        bn,
        Entry("apart", ("left", "side")),
        Entry("mixed", ("left", "fc"), "forward"),
        Entry("nothing", ()),
        Entry("elsewhere", ("relu",)),
    )
    assert [name for name, _ in report.norms] == ["bn"]
    assert report.left == (
        ("apart", "left, side have no place in common"),
        ("mixed", "left, fc have no place in common"),
        ("nothing", "it did nothing when it was folded"),
        ("elsewhere", "'relu', which it was folded into, is no conv or dense layer"),
    )
    assert "nothing at apart: left, side have no place in common" in str(report)


def test_norms_that_are_there_still_are_left_alone():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 3),
    ).eval()  # fmt: skip
    network, report = unfold(model, images(2))
    assert [name for name, _ in report.norms] == ["3_norm"]
    assert report.left == (("0", "the norm '1' is there"),)
    assert relative(model(images()), network(images())) <= BUDGET


def test_an_identity_in_a_norms_place_makes_room():
    """Other tools fold, and leave these."""
    model = randomized(NORMED["resnet"]()).eval()
    bare = skip_norms(model)
    network, _ = unfold(bare, architectures.images("resnet"), {"bn1": "conv1"})
    assert norm_places(network, is_norm) == {"bn1": "conv1"}
    assert not any(node.target == "bn1" and not is_norm(node) for node in network.graph.nodes)
    x = architectures.images("resnet", 4)
    assert relative(bare(x), network(x)) <= BUDGET


# Refusals

REFUSED = [
    (trained(), {"norms": {"bn": "cnv1"}}, SurgeryError,
     r"Sequential has no conv or dense layer 'cnv1' \(did you mean 'conv1'\?\) for 'bn'; give"),
    (trained(), {"norms": {"bn": "act1"}}, SurgeryError,
     "no norm to put back into Sequential; 'bn': 'act1', which it was folded into, is no conv"),
    (trained(), {"norms": {"fc1": "conv1"}}, SurgeryError,
     "'fc1' of Sequential is a Linear, so no norm can have its name; give the norm another"),
    (trained(), {"norms": Report()}, SurgeryError, "there is no norm to put back into Sequential$"),
    (trained(), {"norms": {}}, SurgeryError, "there is no norm to put back"),
    (trained(), {"forward": lambda model, batch: None}, ConfigError, "forward= runs the batches"),
    (trained(), {"calibrate": []}, SurgeryError, "calibrate= gave no batch"),
    (Twice(ends=False).eval(), {"norms": {"bn": "conv"}}, SurgeryError,
     "'conv' of Twice is called 2 times, so 'bn' cannot be behind it"),
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval(), {}, SurgeryError, "has no place for"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "options", "kind", "match"), REFUSED)
def test_a_refusal_names_the_reason_and_touches_nothing(model, options, kind, match):
    before = state(model)
    with pytest.raises(kind, match=match):
        unfold(model, images(2), **options)
    assert state(model) == before


def test_a_wrong_norm_is_seen(monkeypatch):
    """The proof holds without data, too."""
    monkeypatch.setattr("evenkeel.surgery.introduce.settle", lambda network, values: None)
    model = trained()
    with pytest.raises(SurgeryError, match="would change what the network computes"):
        unfold(model, images(2), {"bn1": "conv1"})
