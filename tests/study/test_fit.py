"""Trainings: stopped anywhere and continued to the same bits, schedules, hostile state."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evenkeel.errors import ConfigError, FormatError, StudyError
from evenkeel.study import container
from evenkeel.study.arms import Data
from evenkeel.study.checkpoint import Epoch, load
from evenkeel.study.data import load as load_data
from evenkeel.study.fit import DivergedError, Fit, Step, read_state, state_path
from evenkeel.study.train import evaluate
from evenkeel.study.training import SCHEDULES, Training, training_for

from .helpers import CPU, tiny_dataset

DATA = tiny_dataset()  # 96 images: 4 steps of 24
DROPOUT = """
from torch import nn
def net(shape, classes):
    return nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
                         nn.Linear(4 * (shape[1] - 2) * (shape[2] - 2), classes))
"""


def wished(**wishes) -> Training:
    return training_for(
        Data(), **({"placement": "before-activation", "epochs": 3, "batch_size": 24} | wishes)
    )


def fresh(dataset=DATA, **wishes) -> Fit:
    return Fit(wished(**wishes), dataset, CPU)


def finished(fit: Fit) -> Fit:
    for _ in fit.run():
        pass
    return fit


def stopped_at(fit: Fit, events: int) -> Fit:
    """Takes so many events and leaves the training there."""
    run = fit.run()
    for _ in range(events):
        next(run)
    return fit


def saved(fit: Fit, path) -> bytes:
    fit.save(path)
    return path.read_bytes()


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "drops.py").write_text(DROPOUT)
    yield "drops:net"
    sys.modules.pop("drops", None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of the default training's model."""
    return saved(finished(fresh()), tmp_path_factory.mktemp("whole") / "m")


class TestRun:
    def test_steps_and_epochs_in_their_order(self):
        fit = fresh()
        kinds = "".join("s" if isinstance(event, Step) else "E" for event in fit.run())
        assert kinds == "ssssE" * 3
        assert fit.done == fit.total == 12
        assert fit.steps_per_epoch == 4

    def test_an_epoch_says_what_it_ended_with(self):
        fit, losses = fresh(), []
        for event in fit.run():
            if isinstance(event, Step):
                losses.append(event.loss)
            else:
                score = evaluate(fit.network.eval(), fit.feeder.test())
                assert event == Epoch(sum(losses) / 4, score.loss, score.accuracy)
                losses.clear()

    def test_it_learns(self):
        assert finished(fresh(epochs=20)).history[-1].accuracy > 0.9

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_learning_rates(self, schedule):
        fit = fresh(schedule=schedule, learning_rate=0.1)
        rates = []
        for event in fit.run():
            if isinstance(event, Step):
                rates += [group["lr"] for group in fit._optimizer.param_groups[:1]]
        wanted = [0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(1, 13)]
        assert rates == pytest.approx(wanted if schedule == "cosine" else [0.1] * 12, abs=1e-15)

    def test_weight_decay_spares_gamma_and_beta(self):
        groups = fresh()._optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]

    def test_the_estimate_changes_nothing(self, tmp_path):
        plain = saved(finished(fresh()), tmp_path / "a")
        fit = fresh()
        before = torch.get_rng_state()
        assert fit.seconds_left() > 0
        assert torch.equal(torch.get_rng_state(), before)
        assert saved(finished(fit), tmp_path / "a") == plain

    def test_divergence_is_told(self):
        with pytest.raises(
            DivergedError, match=r"at step .* of 120: .* choose a learning rate below"
        ):
            finished(fresh(epochs=30, learning_rate=1e30, placement="none"))

    def test_a_batch_that_is_too_large(self):
        with pytest.raises(ConfigError, match="a batch of 97 is more than the 96 training images"):
            fresh(batch_size=97)

    def test_a_network_that_does_not_fit_the_images(self, own, tmp_path):
        (tmp_path / "drops.py").write_text(DROPOUT.replace("classes))", "1))"))
        with pytest.raises(
            ConfigError, match=r"'drops:net' cannot train on images of shape \(1, 8"
        ):
            fresh(model=own).seconds_left()

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
    def test_the_same_bits_on_cuda(self, tmp_path):
        device = torch.device("cuda")
        for name in ("a", "b"):
            finished(Fit(wished(), DATA, device)).save(tmp_path / name)
        stopped_at(Fit(wished(), DATA, device), 6).save_state(tmp_path / "s")
        finished(Fit.resume(read_state(tmp_path / "s"), DATA, device)).save(tmp_path / "c")
        one, two, three = ((tmp_path / name).read_bytes() for name in "abc")
        assert one == two == three


class TestResume:
    @pytest.mark.parametrize("events", range(15))
    def test_from_any_place_to_the_same_bytes(self, tmp_path, events, whole):
        stopped_at(fresh(), events).save_state(tmp_path / "state")
        torch.manual_seed(events)  # whatever the process did before
        fit = Fit.resume(read_state(tmp_path / "state"), DATA, CPU)
        assert fit.done == events - events // 5
        assert saved(finished(fit), tmp_path / "part") == whole

    @pytest.mark.parametrize(
        "wishes",
        [
            {"options": {"momentum": 0.0}},
            {"options": {"momentum": 0.9, "nesterov": True}},
            {"optimizer": "Adam", "options": {"betas": [0.8, 0.99], "amsgrad": True}},
            {"optimizer": "AdamW", "weight_decay": 0.1},
            {"optimizer": "RMSprop", "options": {"momentum": 0.5, "centered": True}},
            {"optimizer": "Adagrad"},
            {"optimizer": "Adadelta"},
            {"optimizer": "NAdam"},
            {"optimizer": "RAdam"},
            {"optimizer": "ASGD"},
            {"optimizer": "Rprop"},
            {"optimizer": "Adafactor"},
            {"schedule": "constant"},
            {"placement": "none"},
            {"statistics": "layer"},
            {"model": "paper", "activation": "sigmoid", "input_norm": False},
        ],
        ids=lambda wishes: " ".join(str(v) for v in wishes.values()),
    )
    def test_with_every_optimizer(self, tmp_path, wishes):
        whole = saved(finished(fresh(**wishes)), tmp_path / "whole")
        for events in (3, 8):
            stopped_at(fresh(**wishes), events).save_state(tmp_path / "state")
            fit = Fit.resume(read_state(tmp_path / "state"), DATA, CPU)
            assert saved(finished(fit), tmp_path / "part") == whole

    def test_random_numbers_of_dropout_go_on(self, tmp_path, own):
        whole = saved(finished(fresh(model=own)), tmp_path / "whole")
        stopped_at(fresh(model=own), 6).save_state(tmp_path / "state")
        torch.manual_seed(99)
        fit = Fit.resume(read_state(tmp_path / "state"), DATA, CPU, model=own)
        fit.save_state(tmp_path / "again")  # before its first step
        fit = Fit.resume(read_state(tmp_path / "again"), DATA, CPU, model=own)
        assert saved(finished(fit), tmp_path / "part") == whole

    def test_stopped_again_and_again(self, tmp_path, whole):
        fresh().save_state(tmp_path / "state")
        for _ in range(15):
            fit = Fit.resume(read_state(tmp_path / "state"), DATA, CPU)
            stopped_at(fit, 1).save_state(tmp_path / "state")
        fit = Fit.resume(read_state(tmp_path / "state"), DATA, CPU)
        assert saved(finished(fit), tmp_path / "part") == whole

    def test_a_finished_training_only_needs_saving(self, tmp_path):
        fit = finished(fresh())
        fit.save_state(tmp_path / "state")
        again = Fit.resume(read_state(tmp_path / "state"), DATA, CPU)
        assert list(again.run()) == []
        assert saved(again, tmp_path / "a") == saved(fit, tmp_path / "b")

    def test_the_name_of_the_state(self, tmp_path):
        assert state_path(tmp_path / "m.safetensors") == tmp_path / "m.state.safetensors"
        assert state_path(tmp_path / "m.bin") == tmp_path / "m.bin.state.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "state"
    stopped_at(fresh(), 7).save_state(path)  # six steps, the second epoch half done
    return path.read_bytes()


@pytest.fixture
def path(tmp_path, good):
    target = tmp_path / "state"
    target.write_bytes(good)
    return target


def resumed(path, dataset=DATA) -> Fit:
    return Fit.resume(read_state(path), dataset, CPU)


def set_progress(key, value):
    return lambda config, tensors: config["progress"].update({key: value})


class TestHostile:
    @settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_flipped_bit_is_noticed(self, path, good, data):
        at = data.draw(st.integers(0, 8 * len(good) - 1))
        raw = bytearray(good)
        raw[at // 8] ^= 1 << at % 8
        path.write_bytes(raw)
        with pytest.raises(FormatError, match=re.escape(str(path))):
            read_state(path)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda c, t: c.pop("progress"), "does not say how far the training got"),
            (lambda c, t: c.update(progress=3), "does not say how far the training got"),
            (set_progress("more", 1), "does not say how far the training got"),
            (set_progress("done", 6.0), "'done' is 6.0, which is no int"),
            (set_progress("done", True), "'done' is True, which is no int"),
            (set_progress("done", -1), "-1 steps done do not fit 1 epochs"),
            (set_progress("done", 3), "3 steps done do not fit 1 epochs"),
            (set_progress("done", 9), "9 steps done do not fit 1 epochs"),
            (set_progress("done", 10**30), "steps done do not fit 1 epochs"),
            (set_progress("loss_sum", "x"), "'loss_sum' is 'x', which is no float"),
            (set_progress("plain", {"0.x": 1}), "the optimizer's state does not fit SGD"),
            (set_progress("plain", {"x": 1}), "the optimizer's state does not fit SGD"),
            (lambda c, t: c.update(history=[]), "6 steps done do not fit 0 epochs"),
            (lambda c, t: c.update(shift=[0.0]), "does not agree with its data or its network"),
            (lambda c, t: c.update(classes=["a", "b", "c"]), "does not agree with its data or"),
            (lambda c, t: c.update(data="0"), "fingerprint 0, but this data has"),
            (lambda c, t: c["training"]["arm"].update(optimizer="Adam"), "Adam refused"),
            (lambda c, t: c["training"]["arm"].update(options={}), "does not fit SGD"),
            (lambda c, t: t.pop("network.fc2.bias"), "weights, but only|no tensor 'fc2.bias'"),
            (lambda c, t: t["network.fc2.bias"].fill_(math.nan), "has a value that is not finite"),
            (lambda c, t: t.pop("optimizer.0.momentum_buffer"), "state does not fit SGD"),
            (
                lambda c, t: t.update({"optimizer.0.momentum_buffer": torch.ones(1)}),
                "the optimizer's state does not fit SGD for this network",
            ),
            (lambda c, t: t.update({"optimizer.9": torch.ones(1)}), "state does not fit SGD"),
        ],
    )
    def test_a_state_that_does_not_fit(self, path, change, match):
        config, tensors = container.read(path, "training")
        change(config, tensors)
        container.write(path, "training", config, tensors)
        with pytest.raises((FormatError, ConfigError), match=match):
            resumed(path)

    @pytest.mark.parametrize("random", [{}, {"cpu": torch.ones(3)}, {"cpu": torch.ones(3).byte()}])
    def test_random_numbers_that_are_none(self, path, random):
        state = read_state(path)
        kept = {n: v for n, v in state.tensors.items() if not n.startswith("random.")}
        kept |= {f"random.{name}": value for name, value in random.items()}
        with pytest.raises(FormatError, match="the state of the random numbers cannot be used"):
            Fit.resume(replace(state, tensors=kept), DATA, CPU)

    def test_a_model_is_no_state(self, path):
        finished(fresh()).save(path)
        with pytest.raises(
            FormatError, match="holds a trained network, not a training that is not"
        ):
            read_state(path)

    def test_other_data(self, path):
        with pytest.raises(FormatError, match="give the same data, or train anew"):
            resumed(path, tiny_dataset(train=120))

    def test_your_own_network_must_be_named(self, tmp_path, own):
        stopped_at(fresh(model=own), 2).save_state(tmp_path / "state")
        state = read_state(tmp_path / "state")
        with pytest.raises(ConfigError, match="say --model drops:net if you trust it"):
            Fit.resume(state, DATA, CPU)
        (tmp_path / "drops.py").write_text(DROPOUT.replace("0.3", "0.4"))
        sys.modules.pop("drops")
        with pytest.raises(FormatError, match="does not agree with its data or its network"):
            Fit.resume(state, DATA, CPU, model=own)

    def test_a_full_disk_leaves_the_old_state(self, path, good, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(StudyError, match="No space left on device"):
            stopped_at(fresh(), 9).save_state(path)
        assert path.read_bytes() == good


class TestTraining:
    @pytest.mark.parametrize(
        ("wishes", "match"),
        [
            ({"epochs": 10**9}, "epochs must be a number from 1 to 1,000,000 but is"),
            ({"seed": -1}, "seed must be a number from 0 to 4,294,967,295 but is -1"),
            ({"schedule": "cosin"}, "unknown schedule 'cosin'; choose one of cosine, constant"),
            ({"model": "vgg"}, "unknown model 'vgg'"),
            ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ],
    )
    def test_mistakes(self, wishes, match):
        with pytest.raises(ConfigError, match=match):
            wished(**wishes)

    def test_defaults(self):
        training = training_for(Data("mnist"))
        assert (training.epochs, training.schedule, training.arm.batch_size) == (4, "cosine", 64)
        assert training.arm.options == {"momentum": 0.9}
        assert training.arm.weight_decay == 5e-4
        adam = training_for(Data("mnist"), optimizer="Adam").arm
        assert (adam.learning_rate, adam.weight_decay, adam.options) == (1e-3, 0.0, {})

    def test_an_option_is_added_to_the_momentum(self):
        assert wished(options={"nesterov": True}).arm.options == {"momentum": 0.9, "nesterov": True}

    def test_no_such_optimizer(self):
        with pytest.raises(ConfigError, match=r"torch\.optim has no optimizer 'Adamm'"):
            fresh(optimizer="Adamm")


def test_the_embedded_digits_in_seconds(tmp_path):
    fit = finished(Fit(wished(epochs=4, batch_size=32), load_data("digits"), CPU))
    fit.save(tmp_path / "m")
    assert load(tmp_path / "m", CPU)[1].history[-1].accuracy > 0.96
