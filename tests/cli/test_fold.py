"""``evenkeel fold``: what it prints, what it writes, what it refuses, and docs/fold.md."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import evenkeel
from evenkeel.cli import app
from evenkeel.study.checkpoint import load

from ..surgery.nets import images, randomized

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.bn2 = nn.BatchNorm2d(8)
        self.bn3 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        print("the network talks")
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.tanh(self.bn2(self.conv2(x)))
        return self.fc(torch.tanh(self.bn3(x)).mean((2, 3)))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.words = nn.Embedding(10, 4)

    def forward(self, image, word):
        return self.bn(self.conv(image)).mean((2, 3)) + self.words(word)

def net(shape, classes):
    return Net(shape[0], classes)

def whole(shape):
    return nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.BatchNorm2d(4), nn.Flatten())

def two():
    return Two()

def branches():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return Branches()

def broken():
    net = whole((3, 8, 8))
    net[1].running_var.fill_(float("nan"))
    return net
"""
INPUT = ("--input", "2,3,8,8")
DOCUMENT = Path(__file__).parents[2] / "docs" / "fold.md"


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module with networks where commands run."""
    (tmp_path / "foldednets.py").write_text(NETS)
    monkeypatch.delitem(sys.modules, "foldednets", raising=False)
    return "foldednets"


@pytest.fixture
def weighted(nets, tmp_path, monkeypatch):
    """A network with random weights and statistics, and the file that they are in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import foldednets

    network = randomized(foldednets.net((3, 8, 8), 10)).eval()
    save_file(network.state_dict(), "w.safetensors")
    return network


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    from evenkeel.study.arms import Data
    from evenkeel.study.data import load as load_data
    from evenkeel.study.fit import Fit
    from evenkeel.study.training import training_for

    path = tmp_path_factory.mktemp("trained") / "digits.safetensors"
    wishes = {"placement": "before-activation", "epochs": 1}
    fit = Fit(training_for(Data(), **wishes), load_data("digits"), torch.device("cpu"))
    for _ in fit.run():
        pass
    fit.save(path)
    return path.read_bytes()


@pytest.fixture
def trained(tmp_path, once):
    (tmp_path / "digits.safetensors").write_bytes(once)
    return "digits.safetensors"


def flat(text: str) -> str:
    return " ".join(text.split())


def names() -> set[str]:
    return {path.name for path in Path.cwd().iterdir()} - {"__pycache__"}


def run(path: str, x: torch.Tensor) -> torch.Tensor:
    """What a written network computes."""
    if path.endswith(".pt2"):
        return torch.export.load(path).module()(x)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


class TestFormats:
    @pytest.mark.parametrize("out", ["out.pt2", "out.onnx"])
    def test_a_program_computes_what_the_network_does(self, command, weighted, out):
        words = ("fold", "foldednets:net", "--weights", "w.safetensors", *INPUT, "-o", out)
        code, said, err = command(*words)
        assert code == 0, err
        x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(run(out, x), weighted(x), rtol=1e-4, atol=1e-5)
        assert f"Kept in {out} (" in flat(said)
        assert "any batch size): run by " in flat(said)

    def test_weights_are_those_of_the_folded_network(self, command, weighted):
        words = ("fold", "foldednets:net", "--weights", "w.safetensors", *INPUT)
        code, said, err = command(*words, "-o", "out.safetensors")
        assert code == 0, err
        x = torch.randn(5, 3, 8, 8)
        folded, _ = evenkeel.fold(weighted, x)
        again, _ = evenkeel.fold(randomized(weighted, seed=3), x)
        again.load_state_dict(load_file("out.safetensors"))
        assert torch.equal(again(x), folded(x))
        with safe_open("out.safetensors", "pt") as file:
            about = json.loads(file.metadata()["evenkeel.fold"])
        assert (about["network"], about["weights"]) == ("foldednets:net", "w.safetensors")
        assert about["inputs"] == [{"name": "x", "shape": [2, 3, 8, 8], "dtype": "float32"}]
        assert [one["norm"] for one in about["fold"]["folded"]] == ["bn1", "bn2"]
        assert "the same bits" in flat(said)

    def test_a_fixed_batch_and_an_opset(self, command, nets):
        words = ("fold", f"{nets}:whole", *INPUT, "-o", "o.onnx", "--fixed-batch", "--opset", "18")
        code, said, err = command(*words)
        assert code == 0, err
        assert "opset 18, batches of 2 alone" in flat(said)
        assert run("o.onnx", torch.randn(2, 3, 8, 8)).shape == (2, 144)

    @pytest.mark.parametrize("suffix", ["pt", "pth"])
    def test_weights_of_torch(self, command, weighted, suffix):
        torch.save({"state_dict": weighted.state_dict()}, f"w.{suffix}")
        words = ("fold", "foldednets:net", *INPUT, "--weights", f"w.{suffix}", "-o", "o.pt2")
        assert command(*words)[0] == 0
        x = torch.randn(1, 3, 8, 8)
        torch.testing.assert_close(run("o.pt2", x), weighted(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("out", ["digits.onnx", "digits.pt2"])
    def test_a_network_of_evenkeel_train(self, command, trained, out):
        code, said, err = command("fold", trained, "-o", out)
        assert code == 0, err
        network, card = load(Path(trained), torch.device("cpu"))
        torch.testing.assert_close(run(out, images(3)), network(images(3)), rtol=1e-4, atol=1e-5)
        assert "3 norms folded" in said
        assert "random images of the size that it was trained on" in said
        extra = {"evenkeel.fold": ""}
        if out.endswith(".pt2"):
            torch.export.load(out, extra_files=extra)
            about = json.loads(extra["evenkeel.fold"])
            assert about["classes"] == list(card.classes)
            assert about["images"]["shift"] == list(card.shift)

    def test_one_of_your_own(self, command, nets):
        words = ("--model", f"{nets}:whole", "--placement", "none", "--epochs", "1", "--out", "m")
        assert command("train", *words)[0] == 0
        assert command("fold", "m", "-o", "o.pt2")[0] == 2
        code, said, err = command("fold", "m", "--model", f"{nets}:whole", "-o", "o.pt2")
        assert code == 0, err
        assert "1 norm folded" in said


class TestInputs:
    def test_several(self, command, nets):
        two = ("--input", "2,1,8,8", "--input", "2", "--dtype", "float32", "--dtype", "int64")
        assert command("fold", f"{nets}:two", *two)[0] == 2  # an axis is missing
        x, word = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 9])
        save_file({"image": x, "word": word}, "x.safetensors")
        code, said, err = command(
            "fold", f"{nets}:two", "--example", "x.safetensors", "-o", "o.pt2"
        )
        assert code == 0, err
        assert "Proving it on the inputs in x.safetensors" in said
        assert "1 norm folded" in said
        loaded = torch.export.load("o.pt2").module()
        assert loaded(image=x[:2], word=word[:2]).shape == (2, 4)

    def test_types_of_each(self, command, nets, tmp_path):
        (tmp_path / "twoinputs.py").write_text(
            "from torch import nn\n"
            "class Two(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.conv, self.words = nn.Conv2d(1, 4, 3), nn.Embedding(10, 4)\n"
            "        self.bn = nn.BatchNorm2d(4)\n"
            "    def forward(self, image, word):\n"
            "        return self.bn(self.conv(image)).mean((2, 3)) + self.words(word).mean(1)\n"
        )
        two = ("--input", "2,1,8,8", "--input", "2x3", "--dtype", "float32", "--dtype", "int64")
        code, said, err = command("fold", "twoinputs:Two", *two, "-o", "o.onnx")
        sys.modules.pop("twoinputs")
        assert code == 0, err
        assert "random 2x1x8x8 float32 and 2x3 int64" in flat(said)

    def test_an_array(self, command, nets):
        np.save("x.npy", np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32))
        code, _, err = command("fold", f"{nets}:net", "--example", "x.npy", "-o", "o.pt2")
        assert code == 0, err
        assert np.load("x.npy").tobytes()[:64] not in Path("o.pt2").read_bytes()


class TestWhatItSays:
    def test_what_it_will_do_then_a_table_then_the_proof(self, command, weighted, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        words = ("fold", "foldednets:net", "--weights", "w.safetensors", *INPUT, "-o", "out.pt2")
        code, out, err = command(*words)
        assert code == 0
        assert max(map(len, out.splitlines())) <= 80
        lines = out.splitlines()
        assert lines[:3] == [
            "Folding foldednets:net with the weights in w.safetensors",
            "Proving it on random 2x3x8x8 float32, on cpu",
            "Writing out.pt2 for any batch size",
        ]
        assert lines[4].split() == [
            "norm", "folded", "into,", "or", "why", "it", "stays", "difference",
        ]  # fmt: skip
        assert re.match(r"bn1 +conv1 +\d\.\de-\d\d$", lines[5])
        assert re.match(r"bn2 +conv2 +\d\.\de-\d\d$", lines[6])
        assert re.match(r"bn3 +stays: ", lines[7])
        rest = flat("\n".join(lines[8:]))
        assert "'tanh'" in rest
        assert "2 norms folded, 1 left" in rest
        assert re.search(r"Largest output difference \S+ of \S+ \(budget 1e-05 relative", rest)
        assert err.count("the network talks") > 0
        assert "the network talks" not in out

    def test_json(self, command, weighted):
        words = ("fold", "foldednets:net", "--weights", "w.safetensors", *INPUT, "-o", "o.onnx")
        code, out, _ = command(*words, "--json")
        assert code == 0
        found = json.loads(out)
        assert found["network"] == "foldednets:net"
        assert [one["into"] for one in found["fold"]["folded"]] == [["conv1"], ["conv2"]]
        assert [norm for norm, _ in found["fold"]["left"]] == ["bn3"]
        assert found["fold"]["difference"] <= found["fold"]["budget"] * found["fold"]["scale"]
        assert found["file"]["bytes"] == Path("o.onnx").stat().st_size
        assert (found["file"]["format"], found["file"]["batch"]) == (".onnx", "any")

    def test_without_a_file(self, command, nets):
        code, out, _ = command("fold", f"{nets}:whole", *INPUT)
        assert code == 0
        assert "Writing" not in out
        assert "Kept" not in out
        assert names() == {"foldednets.py"}
        assert json.loads(command("fold", f"{nets}:whole", *INPUT, "--json")[1])["file"] is None

    def test_strict(self, command, nets):
        words = ("--strict", *INPUT, "-o", "o.pt2")
        code, out, err = command("fold", f"{nets}:net", *words)
        assert code == 1
        assert "1 norm left, so nothing was written (--strict)" in flat(err)
        assert "bn3" in out
        assert names() == {"foldednets.py"}
        assert command("fold", f"{nets}:whole", *words)[0] == 0
        assert "o.pt2" in names()
        code, out, _ = command("fold", f"{nets}:net", *words, "--json", "--overwrite")
        assert (code, json.loads(out)["file"]) == (1, None)

    def test_by_a_runner(self, nets, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        done = CliRunner().invoke(app, ["fold", f"{nets}:whole", *INPUT, "-o", "o.pt2"])
        assert done.exit_code == 0
        assert "1 norm folded" in done.stdout
        assert "-o" in CliRunner().invoke(app, ["fold", "--help"]).stdout

    def test_as_a_program(self, start, nets):
        program = start("fold", f"{nets}:whole", *INPUT, "-o", "o.onnx")
        out, err = program.communicate(timeout=300)
        assert program.returncode == 0, err
        assert err == ""
        assert "1 norm folded" in out
        assert "Kept in o.onnx" in out


class TestNothingHalfWritten:
    @pytest.mark.parametrize("out", ["o.pt2", "o.onnx", "o.safetensors"])
    def test_ctrl_c(self, command, nets, monkeypatch, out):
        monkeypatch.setattr("os.fsync", lambda number: signal.raise_signal(signal.SIGINT))
        code, _, err = command("fold", f"{nets}:whole", *INPUT, "-o", out)
        assert code == 130
        assert "Traceback" not in err
        assert names() == {"foldednets.py"}

    def test_a_proof_that_fails(self, command, nets, monkeypatch):
        Path("o.pt2").write_text("the old one")
        monkeypatch.setattr("evenkeel.surgery.export.BUDGETS", {".pt2": -1.0})
        code, _, err = command("fold", f"{nets}:whole", *INPUT, "-o", "o.pt2", "--overwrite")
        assert code == 2
        assert "differs from the network by" in flat(err)
        assert Path("o.pt2").read_text() == "the old one"
        assert names() == {"foldednets.py", "o.pt2"}


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ("-o", "o.onxx"),
                "'.onxx' (did you mean '.onnx'?); choose .pt2, .onnx, .cfg, .safetensors",
            ),
            (("-o", "."), "--out . is a folder; name a file in it"),
            (("-o", "a/b.onnx"), "there is no folder a; make it first"),
            (("-o", "old.pt2"), "old.pt2 is there already; replace it with --overwrite"),
            (("-o", "o.pt2", "--opset", "18"), "an opset belongs to .onnx"),
            (("--opset", "18"), "--opset belongs to a file"),
            (("--dtype", "float23"), "unknown --dtype 'float23' (did you mean 'float32'?)"),
            (("--dtype", "int64", "--dtype", "bool"), "--dtype is given 2 times and --input 1"),
            (("--example", "x.npy"), "leave out --input and --dtype"),
            (("--model", "a:b"), "--model is for a file of 'evenkeel train'"),
            (("--weights", "none.safetensors"), "none.safetensors: there is no such file"),
            (("--weights", "foldednets.py"), "foldednets.py: it is no file of tensors"),
            (("--device", "gpu"), "unknown device 'gpu'"),
            (("--device", "meta"), "unknown device 'meta'"),
            (("--input", "9999999999,9999999999"), "is too large for the memory here (Stor"),
            (("--input", "2,3"), "foldednets:net cannot run random inputs of 2x3x8x8 and 2x3: "),
        ],
    )
    def test_one_clear_line(self, command, nets, words, message):
        Path("old.pt2").write_text("old")
        code, _, err = command("fold", f"{nets}:net", *INPUT, *words)
        assert code == 2
        assert message in flat(err)
        assert "Traceback" not in err
        assert names() == {"foldednets.py", "old.pt2"}

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("foldednets:none", *INPUT), "has no 'none'"),
            (("nowhere:net", *INPUT), "cannot be imported"),
            (("digit.safetensors", *INPUT), "digit.safetensors: there is no such file"),
            (
                (".", *INPUT),
                ".: is a folder, not a file; give what 'evenkeel train' wrote, package",
            ),
            (("foldednets:net",), "give its shape, --input 1,3,224,224 say, or --example"),
            (("foldednets:net", "--input", "3"), "--input 3 is no shape"),
            (("foldednets:net", "--input", "2,4,8"), "net cannot run random inputs of 2x4x8: "),
            (("foldednets:net", "--example", "x.npy"), "x.npy: there is no such file"),
            (("foldednets:net", "--example", "."), ".: is a folder, not a file"),
            (("foldednets:net", "--example", "foldednets.py"), "inputs are read from .npy"),
            (("foldednets:net", "--example", "bad.npy"), "bad.npy: there are no inputs in it"),
            (("foldednets:branches", *INPUT), "cannot be traced by torch.fx"),
            (("foldednets.py",), "is no safetensors file"),
            (("digits.safetensors", "--weights", "x"), "leave out --weights and --classes"),
            (("digits.safetensors", "--input", "2,3,8,8"), "trained on images of (1, 8, 8)"),
            (("digits.safetensors", "-o", "digits.safetensors"), "what the network is made of"),
            (("digits.safetensors", "--model", "a:b"), "holds the weights of 'standard'"),
        ],
    )
    def test_networks_and_inputs(self, command, nets, trained, words, message):
        Path("bad.npy").write_bytes(b"no array")
        code, _, err = command("fold", *words)
        assert code == 2
        assert message in flat(err)
        assert "Traceback" not in err

    def test_an_array_of_objects_is_not_unpickled(self, command, nets):
        np.save("x.npy", np.array([{"a": 1}]), allow_pickle=True)
        code, _, err = command("fold", f"{nets}:net", "--example", "x.npy")
        assert code == 2
        assert "allow_pickle=False" in err

    def test_weights_that_do_not_fit(self, command, weighted):
        words = ("fold", "foldednets:net", *INPUT, "-o", "o.pt2", "--weights", "other.safetensors")

        def refused(**changes: Any) -> str:
            state = dict(weighted.state_dict())
            for name, value in changes.items():
                state.pop(name.replace("__", "."), None)
                if value is not None:
                    state[name.replace("__", ".")] = value
            save_file(state, "other.safetensors")
            code, _, err = command(*words)
            assert code == 2
            assert "o.pt2" not in names()
            return flat(err)

        assert "it has no fc.weight; it is of another network" in refused(fc__weight=None)
        lacking = refused(
            bn1__running_mean=None, bn1__running_var=None, bn2__running_mean=None,
            bn2__running_var=None,
        )  # fmt: skip
        assert (
            "it has no bn1.running_mean, bn1.running_var, bn2.running_mean and 1 more, and a"
            in (lacking)
        )
        extra = refused(conv1__bias=torch.zeros(8), head__weight=torch.zeros(1))
        assert "it has conv1.bias, head.weight, which the network does not have" in extra
        assert "fc.weight is (3, 8), but the network's is (10, 8)" in refused(
            fc__weight=torch.zeros(3, 8)
        )
        save_file({"model.a": torch.zeros(1)}, "other.safetensors")
        assert "it has no conv1.weight, bn1.weight, bn1.bias and" in flat(command(*words)[2])

    def test_a_file_of_averaged_weights_too(self, command, weighted):
        state = weighted.state_dict()
        torch.save({"model": state, "ema": state}, "w.pt")
        code, _, err = command("fold", "foldednets:net", *INPUT, "--weights", "w.pt")
        assert code == 0
        assert "averaged weights (EMA or SWA) too; those were not taken" in flat(err)

    def test_statistics_that_are_no_numbers_stay(self, command, nets):
        """What NaN gives cannot be proved, so it is not written."""
        code, _, err = command("fold", f"{nets}:broken", *INPUT, "-o", "o.pt2")
        assert code == 2
        assert "not finite" in err
        assert names() == {"foldednets.py"}

    @pytest.mark.parametrize("package", ["onnx", "onnxscript"])
    def test_a_package_that_is_missing(self, command, nets, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)
        code, out, err = command("fold", f"{nets}:net", *INPUT, "-o", "o.onnx")
        assert (code, out) == (2, "")
        assert f"takes {package}, not installed here; pip install 'evenkeel[onnx]'" in flat(err)


class TestDocument:
    """The command of docs/fold.md whose output is shown there."""

    def test_shown_commands_say_what_is_shown(self, command, weighted, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        (shown,) = re.findall(r"^```text\n\$ (.*?)^```", DOCUMENT.read_text(), re.M | re.S)
        typed, _, said = shown.partition("\n")
        Path("mynets.py").write_text(NETS)
        save_file(weighted.state_dict(), "W.safetensors")
        code, out, err = command(*shlex.split(typed)[1:])
        sys.modules.pop("mynets")
        assert code == 0, err

        def without_numbers(text: str) -> list[str]:
            return re.sub(r"\d[\d.e+-]*", "#", flat(text)).split()

        assert without_numbers(out) == without_numbers(said)
