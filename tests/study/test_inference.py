"""The four ways of inference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from evenkeel.errors import EvenkeelError, ShapeError
from evenkeel.nn import BatchNorm1d, BatchNorm2d
from evenkeel.study.data import Split
from evenkeel.study.inference import WAYS, by_batch, compare, has_norms, images_in_batches
from evenkeel.study.inputs import Inputs

from .helpers import CPU, tiny_dataset

DATA = tiny_dataset()


def network() -> nn.Module:
    """Conv, norm with statistics of its own, dropout, dense."""
    torch.manual_seed(0)
    norm = BatchNorm2d(4)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.1, 3)
    flat = nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3))
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, *flat).eval()


def batches(count=40, most=500):
    split = Split(DATA.test.images[:count], DATA.test.labels[:count])
    return images_in_batches(split, 255, Inputs(), CPU, most)


class TestBatches:
    @pytest.mark.parametrize(
        ("count", "most", "sizes"),
        [(40, 500, [40]), (40, 40, [40]), (40, 39, [20, 20]), (40, 15, [14, 13, 13]), (1, 5, [1])],
    )
    def test_no_batch_is_much_smaller_than_another(self, count, most, sizes):
        assert [len(labels) for _, labels in batches(count, most)] == sizes

    def test_all_images_in_their_order(self):
        pairs = list(batches(most=7))
        assert torch.equal(torch.cat([x for x, _ in pairs]), DATA.test.images.float() / 255)
        assert torch.equal(torch.cat([labels for _, labels in pairs]), DATA.test.labels)


class TestByBatch:
    def test_norms_take_the_batch_and_nothing_else_trains(self):
        model = network()
        own = by_batch(model)
        x = next(batches())[0]
        value = model[0](x)
        mean = value.mean((0, 2, 3), keepdim=True)
        variance = value.var((0, 2, 3), unbiased=False, keepdim=True)
        wanted = model[2:]((value - mean) / (variance + 1e-5).sqrt())
        torch.testing.assert_close(own(x), wanted, rtol=1e-4, atol=1e-5)

    def test_the_given_network_is_not_touched(self):
        model = network()
        before = copy.deepcopy(model.state_dict())
        by_batch(model)(next(batches())[0])
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert not any(module.training for module in model.modules())


class TestCompare:
    def test_every_way(self):
        model = network()
        found = dict(compare(model, batches, DATA.classes))
        assert list(found) == list(WAYS)
        x, labels = next(batches())
        logits = model(x).detach()
        assert found["running"].accuracy == float((logits.argmax(1) == labels).double().mean())
        loss = nn.functional.cross_entropy(logits.double(), labels)
        assert found["running"].loss == pytest.approx(float(loss), rel=1e-6)
        assert found["running"].difference == 0
        assert found["running"].scale == float(logits.abs().max())
        assert found["folded"].difference <= 1e-5 * found["folded"].scale
        assert [one[:2] for one in found["folded"].fold.folded] == [("1", ("0",))]
        skipped = nn.Sequential(model[0], *model[2:])(x)
        assert found["skipped"].difference == float((skipped.detach() - logits).abs().max())

    def test_accuracy_of_each_class(self):
        result = dict(compare(network(), batches, DATA.classes, ("running",)))["running"]
        x, labels = next(batches())
        right = network()(x).argmax(1) == labels
        for index, name in enumerate(DATA.classes):
            wanted = float(right[labels == index].double().mean())
            assert result.per_class[name] == pytest.approx(wanted)

    def test_batches_do_not_matter_to_running_statistics(self):
        whole = dict(compare(network(), batches, DATA.classes, ("running",)))["running"]
        parts = dict(compare(network(), lambda: batches(most=7), DATA.classes, ("running",)))
        assert parts["running"].accuracy == whole.accuracy
        assert parts["running"].loss == pytest.approx(whole.loss, rel=1e-6)

    def test_a_way_that_fails_gives_its_reason_and_the_others_go_on(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), BatchNorm1d(3)).eval()
        found = dict(compare(model, lambda: batches(1), DATA.classes))
        assert isinstance(found["batch"], ShapeError)
        ways = [way for way, result in found.items() if not isinstance(result, EvenkeelError)]
        assert ways == ["running", "skipped", "folded"]


def test_has_norms():
    assert has_norms(network())
    assert not has_norms(nn.Linear(2, 2))
