"""``evenkeel convert``, and Darknet's files given to ``fold`` and ``check``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from evenkeel.formats import darknet

from ..formats.samples import image, old_keras_file, text, weights_for, written
from .test_fold import flat, names, nets, once, trained  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")

SOURCE = text(
    (1, 8, 8),
    "convolutional batch_normalize=1 filters=4 size=3 pad=1 activation=leaky",
    "maxpool stride=2 size=2",
    "connected batch_normalize=1 output=6 activation=relu",
    "connected output=10 activation=linear",
    "softmax",
)


@pytest.fixture
def tiny(tmp_path):
    """A Darknet network, net.cfg and net.weights where commands run."""
    written(tmp_path, SOURCE, weights_for(SOURCE))
    return darknet.load(tmp_path / "net.cfg", tmp_path / "net.weights")


GIVEN = ("net.cfg", "--weights", "net.weights")


def test_to_onnx(command, tiny):
    code, said, err = command("convert", *GIVEN, "-o", "net.onnx")
    assert code == 0, err
    assert flat(said).startswith(
        "Converting net.cfg with the weights in net.weights to net.onnx Comparing on random images "
        "of the size that it was made for, on cpu Kept in net.onnx ("
    )
    x = image(1, 8, 8)
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    found = torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])
    torch.testing.assert_close(found, tiny(x), rtol=1e-4, atol=1e-5)


def test_to_torch_and_back(command, tiny):
    assert command("convert", *GIVEN, "-o", "state.safetensors")[0] == 0
    assert torch.equal(
        load_file("state.safetensors")["layers.0.norm.bias"], tiny.layers[0].norm.bias
    )
    code, said, err = command(
        "convert", "net.cfg", "--weights", "state.safetensors", "-o", "again.cfg", "--json"
    )
    assert (code, err) == (0, "")
    file = json.loads(said)["file"]
    assert (file["format"], file["cfg"], file["layers"]) == (".cfg", "again.cfg", 5)
    assert file["difference"] <= file["budget"] * file["scale"]
    header = 20  # in which the number of images seen is not a tensor
    one, other = (Path(name).read_bytes() for name in ("again.weights", "net.weights"))
    assert one[header:] == other[header:]


def test_a_trained_network_to_darknet(command, trained):  # noqa: F811
    code, said, err = command("convert", trained, "-o", "digits.cfg")
    assert code == 0, err
    assert "Kept in digits.cfg and digits.weights: " in flat(said)
    again = darknet.load("digits.cfg", "digits.weights")
    from evenkeel.study.checkpoint import load

    network, card = load(Path(trained), torch.device("cpu"))
    x = image(*card.shape)
    torch.testing.assert_close(again(x), network(x), rtol=1e-4, atol=1e-4)


def test_a_factorys_network_to_darknet(command, nets):  # noqa: F811
    code, _, err = command("convert", f"{nets}:whole", "--input", "2,3,8,8", "-o", "whole.cfg")
    assert code == 0, err
    assert len(darknet.load("whole.cfg", "whole.weights").layers) == 1


def test_a_file_in_capitals(command, tiny):
    Path("net.cfg").rename("NET.CFG")
    words = ("NET.CFG", "--weights", "net.weights", "-o", "new.CFG")
    assert command("convert", *words)[0] == 0
    assert Path("new.weights").read_bytes() == Path("net.weights").read_bytes()


def test_folding_keeps_the_options_for_training(command, tiny):
    Path("net.cfg").write_text(SOURCE.replace("[net]", "[net]\nlearning_rate=0.25"))
    assert command("fold", *GIVEN, "-o", "folded.cfg")[0] == 0
    assert "learning_rate=0.25" in Path("folded.cfg").read_text()


@pytest.mark.parametrize("out", ["folded.cfg", "folded.onnx"])
def test_folding(command, tiny, out):
    code, said, err = command("fold", *GIVEN, "-o", out)
    assert code == 0, err
    assert "2 norms folded" in said
    if out.endswith(".cfg"):
        assert "batch_normalize" not in Path(out).read_text()
        x = image(1, 8, 8)
        again = darknet.load(out, "folded.weights")
        torch.testing.assert_close(again(x), tiny(x), rtol=1e-4, atol=1e-5)


def test_checking(command, tiny):
    code, said, err = command("check", *GIVEN, "--data", "digits")
    assert code == 1, err  # for random statistics are not those of the data
    assert "EK306" in said
    assert "give data" not in said
    code, said, err = command("check", "net.cfg", "--format", "json")
    assert json.loads(said)["errors"] == 0
    assert "the random weights that training begins with" in flat(err)
    with torch.no_grad():
        tiny.layers[0].norm.running_var.zero_()
    darknet.save(tiny, "net.cfg", "net.weights")
    save_file(tiny.state_dict(), "state.safetensors")
    for weights in ("net.weights", "state.safetensors"):
        assert "layers.0.norm" in command("check", "net.cfg", "--weights", weights)[1]


def test_the_build_is_heeded(command, tiny):
    for build in ("darknet-cpu", "darknet-gpu"):
        words = ("--convention", build, "-o", f"{build}.safetensors")
        assert command("convert", *GIVEN, *words)[0] == 0
    one, other = (load_file(f"darknet-{end}.safetensors") for end in ("cpu", "gpu"))
    assert not torch.equal(one["layers.0.norm.running_var"], other["layers.0.norm.running_var"])


@pytest.mark.parametrize("out", ["model.onnx", "model.cfg"])
def test_keras(command, tmp_path, out):
    wanted = old_keras_file(tmp_path / "model.h5")
    code, said, err = command("convert", "model.h5", "-o", out)
    assert code == 0, err
    assert f"Kept in {out} " in flat(said)
    if out == "model.cfg":
        x = torch.from_numpy(np.load("model.npy")).permute(0, 3, 1, 2)
        found = darknet.load(out, "model.weights")(x).permute(0, 2, 3, 1)
        torch.testing.assert_close(
            found.double(), torch.from_numpy(wanted).double(), atol=1e-5, rtol=1e-4
        )
    code, said, err = command("fold", "model.h5")
    assert (code, "1 norm folded" in said) == (0, True)
    assert command("check", "model.h5")[0] == 0
    code, _, err = command("convert", "model.h5", "--convention", "darknet-cpu", "-o", "x.onnx")
    assert "model.h5 has all in it; leave out --convention" in flat(err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("net.cfg", "--weights", "none.weights", "-o", "a.onnx"),
            "none.weights: there is no such",
        ),
        (("none.cfg", "-o", "a.onnx"), "none.cfg: there is no such file"),
        ((*GIVEN, "-o", "a.tflite"), "'.tflite'; choose .pt2, .onnx, .cfg, .safetensors"),
        ((*GIVEN, "-o", "a.weights"), "a network is not written as '.weights'"),
        (("net.weights", "-o", "a.onnx"), "give its .cfg, and it as --weights"),
        ((*GIVEN, "-o", "net.cfg"), "net.cfg is what the network is made of"),
        ((*GIVEN, "-o", "x/a.cfg"), "there is no folder x"),
        ((*GIVEN, "-o", "a.cfg", "--opset", "18"), "--opset is ONNX's"),
        ((*GIVEN, "-o", "a.cfg", "--classes", "3"), "says how many classes it has"),
        ((*GIVEN, "-o", "a.cfg", "--input", "1,3,8,8"), "net.cfg cannot run random inputs"),
        ((*GIVEN, "-o", "a.cfg", "--convention", "darknet"), "'darknet' is no build of Darknet"),
        (("cfg", "-o", "a.cfg"), "a Darknet .cfg or a Keras file"),
    ],
)
def test_mistakes(command, tiny, words, message):
    code, _, err = command("convert", *words)
    assert code == 2
    assert message in flat(err)
    assert names() == {"net.cfg", "net.weights"}


def test_nothing_is_replaced_unasked(command, tiny):
    Path("a.weights").write_text("mine")
    code, _, err = command("convert", *GIVEN, "-o", "a.cfg")
    assert (code, Path("a.weights").read_text()) == (2, "mine")
    assert "a.weights is there already" in flat(err)
    assert command("convert", *GIVEN, "-o", "a.cfg", "--overwrite")[0] == 0
