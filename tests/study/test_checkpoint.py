"""Trained networks in files: round trips, and files that mean harm."""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as parse

from evenkeel.errors import ConfigError, FormatError
from evenkeel.study import container
from evenkeel.study.arms import Data
from evenkeel.study.checkpoint import Card, load, save
from evenkeel.study.fit import Fit
from evenkeel.study.training import training_for

from .helpers import CPU, tiny_dataset

DATA = tiny_dataset()
OWN = """
from pathlib import Path
from torch import nn
Path("imported").touch()
def net(shape, classes):
    return nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * (shape[1] - 2) * (shape[2] - 2), classes))
"""


def fitted(dataset=DATA, **wishes) -> Fit:
    """A network after one epoch on tiny images."""
    binary = wishes.pop("binary", False)
    wishes = {"placement": "before-activation", "epochs": 1, "batch_size": 24} | wishes
    fit = Fit(training_for(Data(binary=binary), **wishes), dataset, CPU)
    for _ in fit.run():
        pass
    return fit


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file, as bytes; reading it back is what most tests here do."""
    path = tmp_path_factory.mktemp("good") / "model.safetensors"
    fitted().save(path)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path, good):
    target = tmp_path / "model.safetensors"
    target.write_bytes(good)
    return target


class TestRoundTrip:
    @pytest.mark.parametrize(
        "wishes",
        [
            {},
            {"placement": "none"},
            {"placement": "on-input", "statistics": "per-activation"},
            {"placement": "after-pooling", "statistics": "n c h w -> c w"},
            {"statistics": "layer"},
            {"statistics": "per-location", "dense_statistics": "n c ->"},
            {"model": "paper", "activation": "sigmoid", "binary": True, "input_norm": False},
            {"model": "lenet5", "activation": "leaky_relu", "every": 2},
            {"model": "residual", "placement": "after-addition", "layers": "conv"},
            {"model": "residual-pre", "affine": False, "eps": 1e-3, "bn_momentum": 0.5},
        ],
        ids=lambda wishes: " ".join(str(v) for v in wishes.values()) or "defaults",
    )
    def test_the_same_outputs_and_the_same_card(self, tmp_path, wishes):
        fit = fitted(**wishes)
        fit.save(tmp_path / "m.safetensors")
        network, card = load(tmp_path / "m.safetensors", CPU)
        assert card == fit.card
        x = next(fit.feeder.test())[0]
        with torch.no_grad():
            assert torch.equal(network(x), fit.network.eval()(x))
        assert not network.training

    def test_the_card_turns_bytes_into_the_inputs_of_the_training(self, tmp_path):
        for wishes in ({}, {"binary": True}, {"input_norm": False}):
            fit = fitted(**wishes)
            x = next(fit.feeder.test())[0]
            assert torch.equal(fit.card.inputs(DATA.test.images, 255), x)

    def test_the_same_training_gives_the_same_bytes(self, tmp_path):
        for name in ("a", "b"):
            fitted().save(tmp_path / name)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_another_seed_gives_others(self, tmp_path, good):
        fitted(seed=1).save(tmp_path / "a")
        assert (tmp_path / "a").read_bytes() != good

    def test_colour(self, tmp_path):
        fit = fitted(tiny_dataset(channels=3), model="lenet5")
        fit.save(tmp_path / "m")
        assert load(tmp_path / "m", CPU)[1].shape == (3, 8, 8)

    def test_other_programs_can_read_the_weights(self, path):
        tensors = parse(path.read_bytes())
        assert tensors["conv1.weight"].shape == (16, 1, 3, 3)
        assert tensors["conv1_norm.running_var"].shape == (16,)

    def test_what_the_file_says_is_json(self, path):
        config, _ = container.read(path, "model")
        assert config["training"]["arm"]["placement"] == "before-activation"
        assert config["classes"] == ["top", "middle", "low"]
        assert len(config["history"]) == 1


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_noticed(path, good, data):
    at = data.draw(st.integers(0, 8 * len(good) - 1))
    raw = bytearray(good)
    raw[at // 8] ^= 1 << at % 8
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=re.escape(str(path))):
        load(path, CPU)


def test_a_training_that_is_not_finished(path):
    fitted().save_state(path)
    with pytest.raises(FormatError, match="holds a training that is not finished, not a trained"):
        load(path, CPU)


def changed(path, change=lambda config: None, tensors=lambda tensors: None) -> None:
    """Rewrites a file with a right checksum: what somebody would do who means harm."""
    config, values = container.read(path, "model")
    change(config)
    tensors(values)
    container.write(path, "model", config, values)


def setter(*keys, value):
    def change(config):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


class TestConfig:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda c: c.pop("shape"), "keys are missing or unknown: shape"),
            (setter("more", value=1), "keys are missing or unknown: more"),
            (lambda c: c["training"].pop("data"), "'data' is missing"),
            (setter("training", "arm", "name", value=3), "name must be str but is 3"),
            (setter("training", "arm", "modle", value="x"), "unexpected keyword argument 'modle'"),
            (setter("training", "arm", "model", value="vgg16"), "unknown model 'vgg16'"),
            (setter("training", "arm", "placement", value="up"), "unknown placement 'up'"),
            (setter("training", "arm", "statistics", value="n c -> x"), "axis 'x'"),
            (setter("training", "arm", "eps", value=-1), "eps is -1; give 0 or more"),
            (setter("training", "arm", value=[1]), "must be a mapping"),
            (setter("training", value="x"), "its config cannot be used"),
            (setter("training", "epochs", value=0), "epochs must be a number from 1 to"),
            (setter("training", "seed", value=2**70), "seed must be a number from 0 to"),
            (setter("training", "seed", value=True), "seed must be a number from 0 to"),
            (setter("training", "schedule", value="up"), "unknown schedule 'up'"),
            (setter("training", "data", "name", value="x"), "unknown data 'x'"),
            (setter("training", "data", "binary", value="x"), "binary must be bool"),
            (setter("shape", value=[1, 8]), r"an image has the shape \(c, h, w\)"),
            (setter("shape", value=[1, 8, -8]), r"an image has the shape \(c, h, w\)"),
            (setter("shape", value=[1, 8, "8"]), r"an image has the shape \(c, h, w\)"),
            (setter("shape", value=5), "its config cannot be used"),
            (setter("shape", value=None), "its config cannot be used"),
            (setter("shape", value=[1, 60000, 60000]), "have more than 4,194,304 values"),
            (setter("shape", value=[1, 2000, 2000]), "weights, but only .* are in it"),
            (setter("shape", value=[1, 1, 1]), "its network cannot be built"),
            (setter("shape", value=[2, 8, 8]), "must have a number for each of 2 channels"),
            (setter("classes", value=[]), "there must be classes, each with a name"),
            (setter("classes", value=[1, 2, 3]), "there must be classes, each with a name"),
            (setter("classes", value=["a", "b", "a"]), "two classes have the same name"),
            (setter("classes", value=["a", "b"]), r"'fc2.weight' must be .*\(2, 64\) but is"),
            (setter("scale", value=None), "there must be shift and scale, or neither"),
            (setter("shift", value=["x"]), "shift must have a number for each of 1 channels"),
            (setter("shift", value=[True]), "shift must have a number for each of 1 channels"),
            (setter("data", value=None), "data must be text but is None"),
            (setter("history", value=[[1, 2]]), "its config cannot be used"),
            (setter("history", value=[["a", "b", "c"]]), "an epoch must have three numbers"),
            (setter("history", value=3), "its config cannot be used"),
        ],
    )
    def test_hostile(self, path, change, match):
        changed(path, change)
        with pytest.raises(FormatError, match=match) as caught:
            load(path, CPU)
        assert str(path) in str(caught.value)

    @settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_value_anywhere_loads_or_is_a_format_error(self, path, good, data):
        path.write_bytes(good)
        config, tensors = container.read(path, "model")
        values = st.one_of(
            st.none(), st.booleans(), st.integers(-3, 2000), st.text(max_size=5),
            st.floats(allow_nan=False, allow_infinity=False), st.just([]), st.just({}),
            st.sampled_from(["none", "layer", "paper", "residual", "on-input", "n c h w -> n c"]),
        )  # fmt: skip
        at, key = config, data.draw(st.sampled_from(list(config)))
        while isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
            at = at[key]
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = data.draw(st.sampled_from(keys))
        at[key] = value = data.draw(values)
        container.write(path, "model", config, tensors)
        names_code = key == "model" and ":" in str(value)
        with suppress(FormatError, *([ConfigError] if names_code else [])):
            load(path, CPU)


class TestTensors:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda t: t.pop("fc1.weight"), "weights, but only|has no tensor 'fc1.weight', which"),
            (lambda t: t.pop("conv1_norm.weight"), "has no tensor 'conv1_norm.weight', which its"),
            (lambda t: t.update(more=torch.ones(3)), "has a tensor 'more', which its network does"),
            (
                lambda t: t.update({"fc2.bias": torch.ones(4)}),
                r"'fc2.bias' must be torch.float32 \(3,\) but is torch.float32 \(4,\)",
            ),
            (
                lambda t: t.update({"fc2.bias": torch.ones(3).half()}),
                r"'fc2.bias' must be torch.float32 \(3,\) but is torch.float16 \(3,\)",
            ),
            (
                lambda t: t.update({"fc2.bias": torch.tensor([1.0, float("nan"), 2.0])}),
                "'fc2.bias' has a value that is not finite",
            ),
            (
                lambda t: t["fc1_norm.running_mean"].fill_(float("inf")),
                "'fc1_norm.running_mean' has a value that is not finite",
            ),
            (
                lambda t: t["fc1_norm.running_var"].fill_(-1e-3),
                "'fc1_norm.running_var' has a variance below zero",
            ),
        ],
    )
    def test_hostile(self, path, change, match):
        changed(path, tensors=change)
        with pytest.raises(FormatError, match=match):
            load(path, CPU)

    def test_a_weight_that_was_changed_alone(self, path):
        config, tensors = container.read(path, "model")
        raw = path.read_bytes()
        bias = tensors["fc2.bias"].numpy().tobytes()
        assert raw.count(bias) == 1
        path.write_bytes(raw.replace(bias, torch.zeros(3).numpy().tobytes()))
        with pytest.raises(FormatError, match="is damaged: its contents do not match its checksum"):
            load(path, CPU)
        assert config["training"]["seed"] == 0


class TestOwnNetwork:
    """The file names code; nobody's code runs because a file says so."""

    @pytest.fixture
    def own(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine.py").write_text(OWN)
        monkeypatch.syspath_prepend(tmp_path)
        path = tmp_path / "own.safetensors"
        fitted(model="mine:net").save(path)
        self.forget(tmp_path)
        yield path
        sys.modules.pop("mine", None)

    @staticmethod
    def forget(folder):
        sys.modules.pop("mine")
        (folder / "imported").unlink()

    def test_it_is_not_imported_unless_named(self, own):
        with pytest.raises(ConfigError, match="of 'mine:net', whose code is not in the file; say"):
            load(own, CPU)
        with pytest.raises(ConfigError, match="--model other:net was given"):
            load(own, CPU, model="other:net")
        assert not (own.parent / "imported").exists()

    def test_named(self, own):
        network, card = load(own, CPU, model="mine:net")
        assert card.source
        assert network(card.inputs(DATA.test.images[:7], 255)).shape == (7, 3)

    def test_code_that_has_changed_its_shape(self, own):
        changed = OWN.replace("4", "5") + "\n"  # of another size, or its bytecode would still do
        (own.parent / "mine.py").write_text(changed)
        with pytest.raises(FormatError, match=r"must be torch.float32 \(5, 1, 3, 3\) but is"):
            load(own, CPU, model="mine:net")

    def test_code_that_is_gone(self, own):
        (own.parent / "mine.py").unlink()
        with pytest.raises(ConfigError, match="'mine' of model 'mine:net' cannot be imported"):
            load(own, CPU, model="mine:net")

    def test_a_built_in_network_is_no_other(self, path):
        with pytest.raises(
            ConfigError, match="the weights of 'standard', but --model mine:net was"
        ):
            load(path, CPU, model="mine:net")

    def test_a_config_that_calls_for_code(self, path, tmp_path):
        changed(path, setter("training", "arm", "model", value="os:abort"))
        with pytest.raises(ConfigError, match="say --model os:abort if you trust it"):
            load(path, CPU)

    def test_what_is_no_tensor_cannot_be_kept(self, tmp_path):
        class Odd(torch.nn.Linear):
            def get_extra_state(self):
                return {"calls": 3}

        with pytest.raises(ConfigError, match="keeps '_extra_state', of type dict, which is not a"):
            save(tmp_path / "m", Odd(2, 2), fitted().card)
        assert not (tmp_path / "m").exists()


def test_cards_survive_text():
    card = fitted(options={"nesterov": True}).card
    again = Card.from_dict(json.loads(json.dumps(card.to_dict())))
    assert again == card
    assert replace(card, version="0.0.1") != card
