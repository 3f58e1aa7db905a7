"""Batches, optimizers and the loop."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import nn

from evenkeel.errors import ConfigError
from evenkeel.study.arms import Arm, Data
from evenkeel.study.train import (
    Feeder,
    evaluate,
    make_network,
    make_optimizer,
    repeatable,
    train,
)  # fmt: skip

from .helpers import CPU, tiny_dataset

DATA = tiny_dataset()
NORMED = Arm("normed", placement="before-activation", weight_decay=0.1)


def feeder(dataset=DATA, *, input_norm=True, **data) -> Feeder:
    return Feeder(dataset, Data(**data), input_norm, CPU)


def all_of(batches, count):
    pairs = list(islice(batches, count))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def test_cudnn_is_asked_for_a_fixed_order_and_keeps_its_other_settings():
    import torch.testing._internal.common_utils  # from here on cuDNN's attributes are fixed

    cudnn = torch.backends.cudnn
    network, seen = make_network(NORMED, feeder(), 10, 0), []

    def note(*_) -> None:
        seen.append((cudnn.enabled, cudnn.benchmark, cudnn.deterministic))

    network.register_forward_hook(note)
    batches = feeder().batches(8, 0)
    with cudnn.flags(enabled=True, benchmark=True):
        train(network, make_optimizer(network, NORMED), batches, range(2), lambda *_: None)
        evaluate(network.eval(), feeder().test())
        assert set(seen) == {(True, False, True)}
        assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
        with pytest.raises(ZeroDivisionError, match="by zero"), repeatable():
            raise ZeroDivisionError("by zero")
        assert cudnn.benchmark


class TestFeeder:
    def test_no_test_batch_is_a_single_image(self):
        sizes = [len(labels) for _, labels in feeder().test(31, size=10)]
        assert sizes == [8, 8, 8, 7]

    def test_raw_images_are_between_zero_and_one(self):
        x, _ = all_of(feeder(input_norm=False).test(), 1)
        assert torch.equal(x, DATA.test.images.float() / 255)

    def test_normalized_by_the_training_set_per_channel(self):
        dataset = tiny_dataset(channels=3)
        feed = feeder(dataset)
        raw = dataset.train.images.double() / 255
        mean = raw.mean((0, 2, 3), keepdim=True)
        std = raw.std((0, 2, 3), unbiased=False, keepdim=True)
        wanted = (dataset.test.images.double() / 255 - mean) / std
        x, _ = all_of(feed.test(), 1)
        torch.testing.assert_close(x.double(), wanted, rtol=1e-5, atol=1e-6)

    def test_statistics_are_merged_exactly_from_chunks(self):
        dataset = tiny_dataset(train=9000)
        x, _ = all_of(feeder(dataset).batches(9000, seed=0), 1)
        assert abs(float(x.double().mean())) < 1e-6
        assert abs(float(x.double().std(unbiased=False)) - 1) < 1e-6

    def test_a_constant_channel_stays_finite(self):
        dataset = tiny_dataset()
        dataset.train.images.fill_(7)
        x, _ = all_of(feeder(dataset).test(), 1)
        assert torch.isfinite(x).all()

    def test_large_data_stays_bytes_and_gives_the_same_batches(self, monkeypatch):
        small = all_of(feeder().batches(16, seed=3), 4)
        monkeypatch.setattr("evenkeel.study.train._EAGER_PIXELS", 0)
        large = all_of(feeder().batches(16, seed=3), 4)
        assert all(torch.equal(a, b) for a, b in zip(small, large, strict=True))

    def test_binary_images_are_zeros_and_ones(self):
        x, _ = all_of(feeder(input_norm=False, binary=True).test(), 1)
        assert torch.equal(x, (DATA.test.images > 127).float())

    def test_the_order_depends_on_the_seed_alone(self):
        first = all_of(feeder().batches(10, seed=1), 20)
        assert torch.equal(first[1], all_of(feeder(input_norm=False).batches(10, seed=1), 20)[1])
        assert not torch.equal(first[1], all_of(feeder().batches(10, seed=2), 20)[1])

    def test_an_epoch_has_every_image_at_most_once_and_only_whole_batches(self):
        batches = list(islice(feeder(input_norm=False).batches(20, seed=0), 8))
        assert {len(labels) for _, labels in batches} == {20}
        rows = torch.cat([x for x, _ in batches[:4]]).flatten(1)
        assert len(rows.unique(dim=0)) == 80  # of 96: the last 16 do not fill a batch
        later = torch.cat([x for x, _ in batches[4:]]).flatten(1)
        assert not torch.equal(rows, later)

    @pytest.mark.parametrize("start", [0, 1, 3, 4, 5, 9])
    def test_batches_may_start_anywhere(self, start):
        whole = all_of(feeder().batches(20, seed=0), 12)
        part = all_of(feeder().batches(20, seed=0, start=start), 12 - start)
        assert torch.equal(part[0], whole[0][20 * start :])
        assert torch.equal(part[1], whole[1][20 * start :])

    def test_a_batch_larger_than_the_data_is_refused(self):
        with pytest.raises(ConfigError, match="a batch of 97 is more than the 96 training images"):
            next(feeder().batches(97, seed=0))

    def test_a_limit_keeps_the_first_images(self):
        _, labels = all_of(feeder(train_limit=30).batches(30, seed=0), 1)
        assert torch.equal(labels.sort().values, DATA.train.labels[:30].sort().values)

    def test_the_test_images_come_whole_or_limited(self):
        assert torch.equal(all_of(feeder().test(size=7), 99)[1], DATA.test.labels)
        assert torch.equal(all_of(feeder().test(limit=9, size=7), 99)[1], DATA.test.labels[:9])


def test_initial_weights_are_the_same_in_every_arm():
    arms = [replace(NORMED, placement=p) for p in ("none", "before-activation", "on-input")]
    nets = [make_network(arm, feeder(), 3, seed=4) for arm in arms]
    for net in nets[1:]:
        for name in ("conv1", "conv2", "fc1", "fc2"):
            ours, theirs = net.get_submodule(name), nets[0].get_submodule(name)
            assert torch.equal(ours.weight, theirs.weight)


class TestOptimizer:
    def groups(self, arm):
        network = make_network(arm, feeder(), 3, seed=0)
        names = {id(p): name for name, p in network.named_parameters()}
        return [
            ({names[id(p)] for p in group["params"]}, group["weight_decay"])
            for group in make_optimizer(network, arm).param_groups
        ]

    def test_gamma_and_beta_are_not_decayed(self):
        (weights, decay), (norms, spared) = self.groups(NORMED)
        assert (decay, spared) == (0.1, 0.0)
        assert norms == {
            f"{n}_norm.{v}" for n in ("conv1", "conv2", "fc1") for v in ("weight", "bias")
        }
        assert {"conv1.weight", "fc2.weight", "fc2.bias"} <= weights

    def test_unless_asked(self):
        ((everything, decay),) = self.groups(replace(NORMED, decay_norm=True))
        assert decay == 0.1
        assert "conv1_norm.weight" in everything

    def test_every_parameter_is_in_one_group(self):
        network = make_network(NORMED, feeder(), 3, seed=0)
        groups = make_optimizer(network, NORMED).param_groups
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in network.parameters())

    @pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam"])
    def test_optimizers_of_torch(self, name):
        arm = replace(NORMED, optimizer=name)
        network = make_network(arm, feeder(), 3, seed=0)
        before = network.fc2.weight.detach().clone()
        batches = feeder().batches(16, seed=0)
        train(network, make_optimizer(network, arm), batches, range(2), lambda *_: None)
        assert not torch.equal(network.fc2.weight, before)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"optimizer": "Sgd"}, "torch.optim has no optimizer 'Sgd' for this loop"),
            ({"optimizer": "LBFGS"}, "steps without a closure"),
            ({"optimizer": "lr_scheduler"}, "has no optimizer 'lr_scheduler'"),
            ({"options": {"moment": 0.9}}, "SGD refused: .*moment"),
            ({"options": {"momentum": -1}}, "SGD refused: .*momentum"),
        ],
    )
    def test_what_is_wrong_is_named(self, changes, message):
        arm = replace(NORMED, **changes)
        with pytest.raises(ConfigError, match=message):
            make_optimizer(nn.Linear(2, 2), arm)


def test_training_learns_and_repeats():
    def run():
        network = make_network(replace(NORMED, weight_decay=0.0), feeder(), 3, seed=0)
        optimizer = make_optimizer(network, NORMED)
        losses = []
        train(network, optimizer, feeder().batches(16, 0), range(30), lambda _, v: losses.append(v))
        network.eval()
        return losses, evaluate(network, feeder().test())

    losses, score = run()
    assert losses[-1] < losses[0] / 2
    assert score.accuracy > 0.9
    assert run() == (losses, score)


def test_training_stops_where_the_loss_is_not_finite():
    arm = replace(NORMED, placement="none", learning_rate=1e20)
    network = make_network(arm, feeder(), 3, seed=0)
    seen = []
    last = train(
        network, make_optimizer(network, arm), feeder().batches(16, 0), range(50),
        lambda step, loss: seen.append(step),
    )  # fmt: skip
    assert last == seen[-1] < 50


def test_a_score_is_over_all_images_whatever_the_batches():
    network = make_network(NORMED, feeder(), 3, seed=0).eval()
    one, many = (evaluate(network, feeder().test(size=size)) for size in (40, 7))
    assert one.accuracy == many.accuracy
    assert abs(one.loss - many.loss) < 1e-6
    logits = network(all_of(feeder().test(), 1)[0])
    assert one.accuracy == float((logits.argmax(1) == DATA.test.labels).double().mean())
