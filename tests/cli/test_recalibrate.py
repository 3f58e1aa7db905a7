"""``evenkeel recalibrate``: the statistics of all training images, in a new file."""

from __future__ import annotations

import io
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from evenkeel.study import inference
from evenkeel.study.arms import Data
from evenkeel.study.checkpoint import load
from evenkeel.study.data import load as load_data
from evenkeel.study.fit import Fit
from evenkeel.study.training import training_for

from ..study.data.makers import idx, idx_files, write

CPU = torch.device("cpu")
NEW = "digits-recalibrated.safetensors"
OWN = """
from torch import nn
def net(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))
"""


def fitted(path: Path, **wishes) -> Path:
    wishes = {"placement": "before-activation", "epochs": 2} | wishes
    fit = Fit(training_for(Data(), **wishes), load_data("digits"), CPU)
    for _ in fit.run():
        pass
    fit.save(path)
    return path


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("trained") / "digits.safetensors").read_bytes()


@pytest.fixture
def trained(tmp_path, once):
    """A trained network where commands run."""
    (tmp_path / "digits.safetensors").write_bytes(once)
    return "digits.safetensors"


def flat(text: str) -> str:
    return " ".join(text.split())


def first_norm(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """What the first norm of the network is given by all training images, by NumPy."""
    network, card = load(Path(path), CPU)
    dataset = load_data("digits")
    x = card.inputs(dataset.train.images, dataset.white)
    with torch.no_grad():
        y = network.get_submodule("conv1")(x).double().numpy()
    return y.mean((0, 2, 3)), y.var((0, 2, 3), ddof=1)


class TestRecalibrate:
    @pytest.mark.parametrize("propagate", ["batch", "population"])
    def test_a_new_file_with_the_statistics_of_all_training_images(
        self, command, trained, once, propagate
    ):
        code, out, err = command("recalibrate", trained, "--propagate", propagate)
        assert (code, err) == (0, "")
        assert Path(trained).read_bytes() == once
        old, old_card = load(Path(trained), CPU)
        new, card = load(Path(NEW), CPU)
        assert card == old_card
        changed = {
            k for k, v in old.state_dict().items() if not torch.equal(v, new.state_dict()[k])
        }
        norms = ("conv1_norm", "conv2_norm", "fc1_norm")
        keys = ("running_mean", "running_var", "num_batches_tracked")
        assert changed == {f"{norm}.{key}" for norm in norms for key in keys}
        mean, var = first_norm(trained)
        norm = new.get_submodule("conv1_norm")
        np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(norm.running_var, var, rtol=1e-5)
        assert norm.num_batches_tracked == 43
        assert "norms before-activation; 43 batches of up to 32 of the 1,347 training" in flat(out)
        assert "conv1_norm 86,208 up to" in flat(out)
        assert f"Kept in {NEW}" in out

    def test_the_accuracy_before_and_after(self, command, trained):
        def accuracy(path: str) -> float:
            _, out, _ = command("evaluate", path, "--json")
            return json.loads(out)["inference"]["running"]["accuracy"]

        code, out, _ = command("recalibrate", trained, "--json", "--out", "b.safetensors")
        assert code == 0
        found = json.loads(out)
        assert found["before"]["accuracy"] == accuracy(trained)
        assert found["after"]["accuracy"] == accuracy("b.safetensors")
        assert found["before"]["loss"] != found["after"]["loss"]
        assert (found["network"], found["out"]) == (trained, "b.safetensors")
        assert (found["batch_size"], found["batches"], found["test_images"]) == (32, 43, 450)
        assert found["left"] == []
        assert [change["values"] for change in found["changes"]] == [86208, 21552, 1347]
        for side in ("before", "after"):
            score = f"{side} {100 * found[side]['accuracy']:.2f} {found[side]['loss']:.4f}"
            assert score in flat(command("recalibrate", trained, "--overwrite")[1])

    def test_a_broken_network_is_mended(self, command, trained):
        """Statistics that are nobody's, as behind pruning."""
        from evenkeel.study.checkpoint import save

        network, card = load(Path(trained), CPU)
        network.get_submodule("conv1_norm").running_var.fill_(40.0)
        save(Path("broken"), network, card)
        found = json.loads(command("recalibrate", "broken", "--out", "mended", "--json")[1])
        assert found["after"]["accuracy"] - found["before"]["accuracy"] > 0.1
        assert found["after"]["accuracy"] > 0.95

    def test_batches_are_mixed(self, command, trained, monkeypatch):
        """A batch of one class would normalize by the statistics of that class."""
        dataset = load_data("digits")
        order = dataset.train.labels.argsort()
        dataset.train.images.copy_(dataset.train.images[order])
        dataset.train.labels.copy_(dataset.train.labels[order])
        monkeypatch.setattr("evenkeel.study.data.load", lambda *_, **__: dataset)
        words = ("recalibrate", trained, "--json", "--overwrite", "--propagate")
        ways = [json.loads(command(*words, way)[1]) for way in ("batch", "population")]
        pairs = zip(*(way["changes"] for way in ways), strict=True)
        for one, other in pairs:
            assert one["variance_times"] == pytest.approx(other["variance_times"], rel=0.1)

    def test_fewer_and_larger_batches(self, command, trained):
        words = ("recalibrate", trained, "--batch-size", "100", "--steps", "3", "--json")
        found = json.loads(command(*words)[1])
        assert (found["batches"], found["batch_size"]) == (3, 100)
        assert 260 < found["changes"][2]["values"] <= 300

    def test_other_data(self, command, trained, tmp_path):
        random = np.random.RandomState(0)
        pixels, labels = random.bytes(40 * 64), bytes(i % 10 for i in range(40))
        files = {
            name: idx((40, 8, 8), pixels) if "images" in name else idx((40,), labels)
            for name in idx_files()
        }
        write(tmp_path / "idx", files)
        words = ("recalibrate", trained, "--data", "idx", "--data-dir", tmp_path / "idx")
        code, out, err = command(*words)
        assert code == 0, err
        assert "2 batches of up to 32 of the 40 training images of idx" in flat(out)
        assert "Note: this is not the data that the network was trained on" in flat(err)

    def test_your_own_network(self, command, tmp_path):
        (tmp_path / "mine_to_care.py").write_text(OWN)
        words = ("--model", "mine_to_care:net", "--epochs", "1", "--out", "mine")
        assert command("train", *words)[0] == 0
        assert command("recalibrate", "mine")[0] == 2
        code, out, _ = command("recalibrate", "mine", "--model", "mine_to_care:net")
        sys.modules.pop("mine_to_care")
        assert code == 0
        assert "Kept in mine-recalibrated.safetensors" in out

    def test_a_bar_follows_every_pass(self, command, trained, monkeypatch):
        shown = io.StringIO()
        terminal = Console(file=shown, force_terminal=True, width=100, highlight=False)
        monkeypatch.setattr(sys.modules["evenkeel.cli.recalibrate"], "console", terminal)
        assert command("recalibrate", trained, "--propagate", "population")[0] == 0
        assert "Measuring" in shown.getvalue()
        assert "129/129" in shown.getvalue()


class TestNothingHalfWritten:
    @pytest.mark.parametrize("words", [(), ("--overwrite", "--out", "digits.safetensors")])
    def test_ctrl_c(self, command, trained, once, monkeypatch, words):
        gives = inference.images_in_batches

        def some(split, *rest):
            for number, batch in enumerate(gives(split, *rest)):
                if number == 5:
                    signal.raise_signal(signal.SIGINT)
                yield batch

        monkeypatch.setattr(inference, "images_in_batches", some)
        code, out, err = command("recalibrate", trained, *words)
        assert (code, out) == (130, "")
        assert "Traceback" not in err
        assert Path(trained).read_bytes() == once
        assert [path.name for path in Path.cwd().iterdir()] == [trained]

    def test_a_full_disk(self, command, trained, once, monkeypatch):
        def full(number: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        code, _, err = command("recalibrate", trained, "--overwrite", "--out", trained)
        assert code == 2
        assert "cannot be written (No space left on device)" in flat(err)
        assert Path(trained).read_bytes() == once
        assert [path.name for path in Path.cwd().iterdir()] == [trained]


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["no.safetensors"], "no.safetensors: there is no such file"),
            (["."], "is not a file"),
            (["digits.safetensors", "--out", "digits.safetensors"], "is there already; replace it"),
            (["digits.safetensors", "--out", "."], "--out . is a folder; name a file in it"),
            (["digits.safetensors", "--out", "a/b"], "there is no folder a; make it first"),
            (
                ["digits.safetensors", "--propagate", "both"],
                "'batch' or 'population' but is 'both'",
            ),
            (["digits.safetensors", "--batch-size", "1"], "Invalid value for '--batch-size'"),
            (["digits.safetensors", "--data", "mnits"], "unknown data set 'mnits'"),
            ([], "Missing argument"),
        ],
    )
    def test_one_clear_line(self, command, trained, words, message):
        code, out, err = command("recalibrate", *words)
        assert (code, out) == (2, "")
        assert message in flat(err)
        assert "Traceback" not in err

    @pytest.mark.parametrize("wishes", [{"placement": "none"}, {"statistics": "layer"}])
    def test_nothing_to_recalibrate(self, command, tmp_path, wishes):
        fitted(tmp_path / "m", epochs=1, **wishes)
        code, _, err = command("recalibrate", "m")
        assert code == 2
        assert "has no batch norm to recalibrate" in flat(err)
