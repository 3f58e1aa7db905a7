"""``evenkeel predict``: pictures of every kind, and those that are none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evenkeel.study.arms import Data
from evenkeel.study.checkpoint import load
from evenkeel.study.data import load as load_data
from evenkeel.study.fit import Fit
from evenkeel.study.training import training_for

from ..study.helpers import tiny_dataset

CPU = torch.device("cpu")
DIGITS = load_data("digits")


def fitted(path, dataset, **wishes) -> None:
    fit = Fit(training_for(Data(), **wishes), dataset, CPU)
    for _ in fit.run():
        pass
    fit.save(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "digits.safetensors"
    fitted(path, DIGITS, placement="before-activation", epochs=4)
    return path


def pixels(index: int) -> np.ndarray:
    """A test digit with 8 bits a pixel."""
    image = DIGITS.test.images[index, 0].numpy().astype(np.float64)
    return np.round(image * 255 / 16).astype(np.uint8)


@pytest.fixture
def digits(tmp_path):
    """Pictures of test digits: light on black, dark on white, large, in colour, transparent."""
    gray = Image.fromarray(pixels(0))
    gray.save(tmp_path / "plain.png")
    Image.fromarray(255 - pixels(0)).save(tmp_path / "ink.png")
    gray.resize((64, 64), Image.Resampling.NEAREST).convert("RGB").save(tmp_path / "large.bmp")
    gray.resize((64, 64), Image.Resampling.NEAREST).save(tmp_path / "large.jpg", quality=95)
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.putalpha(gray)  # black ink on nothing
    clear.save(tmp_path / "clear.png")
    return tmp_path


def flat(text: str) -> str:
    return " ".join(text.split())


def told(out: str) -> dict[str, str]:
    """The class by picture."""
    lines = (line.rsplit(": ", 1) for line in out.splitlines())
    return {name: rest.split(" ")[0] for name, rest in lines}


class TestPredict:
    def test_what_the_network_itself_says(self, command, trained, digits):
        code, out, err = command("predict", trained, "plain.png", "--top", "10", "--json")
        assert (code, err) == (0, "")
        (entry,) = json.loads(out)
        assert entry["image"] == "plain.png"
        network, card = load(trained, CPU)
        with torch.no_grad():
            logits = network(card.inputs(torch.from_numpy(pixels(0))[None, None], 255))
        wanted = logits.double().softmax(1)[0]
        shares = {e["class"]: e["probability"] for e in entry["classes"]}
        assert [shares[str(d)] for d in range(10)] == pytest.approx(wanted.tolist(), abs=1e-6)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert entry["classes"][0]["class"] == str(int(DIGITS.test.labels[0]))

    def test_kinds_of_pictures(self, command, trained, digits):
        right = str(int(DIGITS.test.labels[0]))
        names = ("plain.png", "large.bmp", "large.jpg")
        code, out, err = command("predict", trained, *names)
        assert (code, err) == (0, "")
        assert told(out) == dict.fromkeys(names, right)

    def test_ink_on_paper(self, command, trained, digits):
        right = str(int(DIGITS.test.labels[0]))
        code, out, err = command("predict", trained, "--invert", "ink.png", "clear.png")
        assert (code, err) == (0, "")
        assert told(out) == {"ink.png": right, "clear.png": right}

    def test_ink_on_paper_is_noticed(self, command, trained, digits):
        code, _, err = command("predict", trained, "plain.png", "ink.png")
        assert code == 0
        assert "Note: 1 of 2 pictures are light at the edges" in flat(err)
        assert "try --invert" in err

    def test_most_are_right(self, command, trained, tmp_path):
        names = [f"{index}.png" for index in range(230)]  # more than one batch
        for index, name in enumerate(names):
            Image.fromarray(pixels(index)).save(tmp_path / name)
        code, out, _ = command("predict", trained, *names)
        assert code == 0
        found = told(out)
        assert list(found) == names
        labels = DIGITS.test.labels[:230].tolist()
        right = sum(int(a) == b for a, b in zip(found.values(), labels, strict=True))
        assert right > 215

    def test_more_classes(self, command, trained, digits):
        _, out, _ = command("predict", trained, "plain.png", "--top", "3")
        assert out.count("%") == 3
        _, out, _ = command("predict", trained, "plain.png", "--top", "99")
        assert out.count("%") == 10

    def test_colour(self, command, tmp_path):
        fitted(tmp_path / "m", tiny_dataset(channels=3), epochs=5, batch_size=24)
        image = tiny_dataset(channels=3).test.images[1].permute(1, 2, 0).numpy()
        Image.fromarray(image).save(tmp_path / "low.png")
        Image.fromarray(image).convert("L").save(tmp_path / "gray.png")
        code, out, _ = command("predict", "m", "low.png", "gray.png")
        assert code == 0
        assert told(out)["low.png"] == "middle"

    def test_channels_that_no_picture_has(self, command, tmp_path, digits):
        fitted(tmp_path / "m", tiny_dataset(channels=2), epochs=1, batch_size=24)
        code, _, err = command("predict", "m", "plain.png")
        assert code == 2
        assert "a picture has 1 or 3 channels, but 2 are wanted" in flat(err)


class TestMistakes:
    @pytest.fixture
    def broken(self, digits):
        (digits / "text.png").write_text("no picture")
        raw = (digits / "large.jpg").read_bytes()
        (digits / "cut.jpg").write_bytes(raw[:-40])
        return ("text.png", "cut.jpg", "missing.png", ".")

    def test_the_others_are_still_told(self, command, trained, broken):
        code, out, err = command("predict", trained, "plain.png", *broken, "large.bmp")
        assert code == 2
        assert list(told(out)) == ["plain.png", "large.bmp"]
        for name, reason in zip(
            broken,
            ("is no picture that can", "is a damaged pict", "does not exist", "is a folder, not a"),
            strict=True,
        ):
            assert f"error: {name}: {reason}" in flat(err)
        assert "Traceback" not in err

    def test_as_json(self, command, trained, broken):
        code, out, _ = command("predict", trained, *broken, "plain.png", "--json")
        assert code == 2
        entries = json.loads(out)
        assert [entry["image"] for entry in entries] == [*broken, "plain.png"]
        assert all("error" in entry for entry in entries[:4])
        assert entries[4]["classes"]

    def test_none_can_be_read(self, command, trained):
        code, out, err = command("predict", trained, "missing.png")
        assert (code, out) == (2, "")
        assert "error: missing.png: does not exist" in err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["no.safetensors", "plain.png"], "no.safetensors: there is no such file"),
            (["plain.png", "plain.png"], "plain.png: is no safetensors file that can be read"),
            (["MODEL"], "Missing argument"),
            (["MODEL", "plain.png", "--top", "0"], "Invalid value for '--top'"),
            (["MODEL", "plain.png", "--device", "tpu"], "unknown device 'tpu'"),
            (["MODEL", "plain.png", "--model", "a:b"], "but --model a:b was given"),
        ],
    )
    def test_one_clear_line(self, command, trained, digits, words, message):
        code, out, err = command(
            "predict", *(trained if word == "MODEL" else word for word in words)
        )
        assert (code, out) == (2, "")
        assert message in flat(err)
        assert "Traceback" not in err

    def test_weights_of_a_folded_network(self, command, trained, digits):
        assert command("fold", trained, "-o", "folded.safetensors")[0] == 0
        for words in (
            ("predict", "folded.safetensors", "plain.png"),
            ("evaluate", "folded.safetensors"),
        ):
            code, out, err = command(*words)
            assert (code, out) == (2, "")
            assert "folded.safetensors: holds weights alone, as 'evenkeel fold' and" in flat(err)
            assert "load them: folded.load_state_dict(safetensors.torch.load_file(path))" in flat(
                err
            )
