"""``evenkeel evaluate``: the four ways side by side, other data, and how mistakes end."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evenkeel.study import container
from evenkeel.study.arms import Data
from evenkeel.study.checkpoint import load
from evenkeel.study.data import load as load_data
from evenkeel.study.fit import Fit
from evenkeel.study.training import training_for

from ..study.data.makers import idx, idx_files, write
from ..study.helpers import tiny_dataset

CPU = torch.device("cpu")
OWN = """
from torch import nn
def net(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))
"""


def fitted(path: Path, dataset=None, **wishes) -> None:
    wishes = {"placement": "before-activation", "epochs": 3} | wishes
    fit = Fit(training_for(Data(), **wishes), dataset or load_data("digits"), CPU)
    for _ in fit.run():
        pass
    fit.save(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "digits.safetensors"
    fitted(path)
    return path


def flat(text: str) -> str:
    return " ".join(text.split())


class TestEvaluate:
    def test_what_the_training_ended_with(self, command, trained):
        accuracy = load(trained, CPU)[1].history[-1].accuracy
        code, out, err = command("evaluate", trained)
        assert (code, err) == (0, "")
        assert "standard, norms before-activation, on 450 test images of digits" in flat(out)
        assert f"running {100 * accuracy:.2f} 0." in flat(out)
        assert "class accuracy % 0 " in flat(out)

    def test_all_ways_side_by_side(self, command, trained):
        code, out, err = command("evaluate", trained, "--inference", "all", "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert (found["data"], found["images"], found["model"]) == ("digits", 450, "standard")
        assert found["fingerprint"] == found["trained_on"]
        ways = found["inference"]
        assert list(ways) == ["running", "batch", "skipped", "folded"]
        assert ways["running"]["difference"] == 0
        assert ways["running"]["accuracy"] - ways["skipped"]["accuracy"] > 0.05
        assert ways["folded"]["accuracy"] == ways["running"]["accuracy"]
        assert ways["folded"]["difference"] <= 1e-5 * ways["folded"]["scale"]
        assert len(ways["folded"]["fold"]["folded"]) == 3
        assert 0 < ways["batch"]["difference"] < ways["skipped"]["difference"]
        shares = ways["running"]["per_class"]
        assert list(shares) == [str(digit) for digit in range(10)]
        assert sum(shares.values()) / 10 == pytest.approx(ways["running"]["accuracy"], abs=0.01)

        code, out, _ = command("evaluate", trained, "--inference", "all")
        assert code == 0
        for way in ways:
            assert f"\n{way} " in out

    @pytest.mark.parametrize("way", ["running", "batch", "skipped", "folded"])
    def test_one_way(self, command, trained, way):
        code, out, _ = command("evaluate", trained, "--inference", way, "--json")
        assert code == 0
        assert list(json.loads(out)["inference"]) == [way]

    def test_norms_that_cannot_be_folded_are_named(self, command, tmp_path):
        fitted(tmp_path / "m", statistics="per-location", epochs=1)
        code, _, err = command("evaluate", "m", "--inference", "folded")
        assert code == 0
        assert "Note: conv1_norm is not folded: before it: it has more than one" in flat(err)

    def test_a_fold_that_fails_is_told_beside_the_others(self, command, trained, monkeypatch):
        monkeypatch.setattr("evenkeel.surgery.fold.BUDGET", -1.0)
        code, out, err = command("evaluate", trained, "--inference", "all", "--json")
        assert code == 0
        ways = json.loads(out)["inference"]
        assert "folding changed the output" in ways["folded"]["error"]
        assert ways["running"]["accuracy"] > 0.9
        code, out, err = command("evaluate", trained, "--inference", "all")
        assert (code, "folded - - -" in flat(out)) == (0, True)
        code, _, err = command("evaluate", trained, "--inference", "folded")
        assert code == 2
        assert "error: folding changed the output" in flat(err)

    def test_no_norms(self, command, tmp_path):
        fitted(tmp_path / "m", placement="none", epochs=1)
        assert command("evaluate", "m")[0] == 0
        code, _, err = command("evaluate", "m", "--inference", "all")
        assert code == 2
        assert "m has no norms, so there is nothing to skip or to fold" in flat(err)

    def test_your_own_network_and_code_that_has_changed(self, command, tmp_path):
        (tmp_path / "mine_to_test.py").write_text(OWN)
        command("train", "--model", "mine_to_test:net", "--epochs", "1")
        sys.modules.pop("mine_to_test")
        (tmp_path / "mine_to_test.py").write_text(OWN + "# a remark\n")
        code, _, err = command("evaluate", "model.safetensors")
        assert code == 2
        assert "say --model mine_to_test:net if you trust it" in flat(err)
        code, _, err = command("evaluate", "model.safetensors", "--model", "mine_to_test:net")
        sys.modules.pop("mine_to_test")
        assert code == 0
        assert "Note: the code of mine_to_test:net has changed since" in flat(err)


class TestData:
    def images(self, folder, size=8, classes=10) -> Path:
        """IDX files of random images."""
        random = np.random.RandomState(0)
        pixels, labels = random.bytes(40 * size * size), bytes(i % classes for i in range(40))
        images, names = idx((40, size, size), pixels), idx((40,), labels)
        files = {name: images if "images" in name else names for name in idx_files()}
        write(folder, files)
        return folder

    def test_other_data_of_the_same_kind(self, command, trained, tmp_path):
        folder = self.images(tmp_path / "idx")
        code, out, err = command("evaluate", trained, "--data", "idx", "--data-dir", folder)
        assert code == 0
        assert "on 40 test images of idx" in flat(out)
        assert "Note: this is not the data that the network was trained on" in flat(err)

    def test_another_size(self, command, trained, tmp_path):
        folder = self.images(tmp_path / "idx", size=9)
        code, _, err = command("evaluate", trained, "--data", "idx", "--data-dir", folder)
        assert code == 2
        assert "idx has images of 1x9x9, but the network was trained on 1x8x8" in flat(err)

    def test_other_classes(self, command, trained, tmp_path):
        folder = self.images(tmp_path / "idx", classes=3)
        code, _, err = command("evaluate", trained, "--data", "idx", "--data-dir", folder)
        assert code == 2
        assert "idx has other classes (0, 1, 2) than the network (0, 1, 2, 3 and 6 more)" in flat(
            err
        )

    def test_data_that_has_moved(self, command, tmp_path):
        folder = self.images(tmp_path / "idx")
        words = ("--data", "idx", "--epochs", "1", "--batch-size", "8")
        assert command("train", *words, "--data-dir", folder)[0] == 0
        shutil.move(folder, tmp_path / "moved")
        code, _, err = command("evaluate", "model.safetensors")
        assert code == 2
        assert "idx" in err
        assert command("evaluate", "model.safetensors", "--data-dir", "moved")[0] == 0

    def test_a_class_without_images(self, command, tmp_path, monkeypatch):
        tiny = tiny_dataset()
        tiny.test.labels.fill_(1)
        fitted(tmp_path / "m", tiny, batch_size=24)
        monkeypatch.setattr("evenkeel.study.data.load", lambda *_, **__: tiny)
        code, out, _ = command("evaluate", "m", "--json")
        assert code == 0
        assert json.loads(out)["inference"]["running"]["per_class"]["top"] is None
        assert "top no images" in flat(command("evaluate", "m")[1])


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["no.safetensors"], "no.safetensors: there is no such file"),
            (["."], "is not a file"),
            (["MODEL", "--inference", "runing"], "unknown --inference 'runing'; choose running, b"),
            (["MODEL", "--data", "mnits"], "unknown data set 'mnits'; choose one of digits"),
            (["MODEL", "--data", "mnist", "--data-dir", "no"], "no: 'mnist' needs train-images"),
            (["MODEL", "--device", "tpu"], "unknown device 'tpu'"),
            (["MODEL", "--model", "a:b"], "the weights of 'standard', but --model a:b was given"),
            ([], "Missing argument"),
        ],
    )
    def test_one_clear_line(self, command, trained, words, message):
        code, out, err = command(
            "evaluate", *(trained if word == "MODEL" else word for word in words)
        )
        assert (code, out) == (2, "")
        assert message in flat(err)
        assert "Traceback" not in err

    def test_a_damaged_file(self, command, trained):
        raw = bytearray(trained.read_bytes())
        raw[-1] ^= 1
        Path("m").write_bytes(raw)
        code, _, err = command("evaluate", "m")
        assert code == 2
        assert "error: m: is damaged: its contents do not match its checksum" in flat(err)

    def test_a_newer_file(self, command, trained, monkeypatch):
        monkeypatch.setattr(container, "_FORMAT", 0)
        code, _, err = command("evaluate", trained)
        assert code == 2
        assert "was written by a newer evenkeel (format 1, this one knows 0); upgrade" in flat(err)


def test_a_folder_of_pictures_is_read_at_the_size_of_the_network(command, tmp_path):
    """Trained on pictures of one size, tested on others of another."""
    random = np.random.RandomState(0)
    for root, size in (("small", 12), ("large", 24)):
        for name, level in (("dark", 40), ("light", 200)):
            folder = tmp_path / root / name
            folder.mkdir(parents=True)
            for index in range(8):
                pixels = (level + random.randint(0, 40, (size, size))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    words = ("--data", "folder", "--data-dir", "small", "--epochs", "2", "--batch-size", "4")
    assert command("train", *words)[0] == 0
    assert "on 4 test images of folder" in flat(command("evaluate", "model.safetensors")[1])
    code, out, err = command("evaluate", "model.safetensors", "--data-dir", "large")
    assert code == 0, err
    assert "on 4 test images of folder" in flat(out)
    code, out, _ = command("predict", "model.safetensors", "large/dark/0.png", "--top", "2")
    assert code == 0
    assert "dark (" in out
