"""``evenkeel check``: exit codes, formats, data, weights, --fix, silence."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

NETWORKS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels, classes, momentum):
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3)
        self.bn = nn.BatchNorm2d(8, momentum=momentum)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        print("the network talks")
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))

def good(shape, classes):
    return Net(shape[0], classes, 0.1)

def odd():
    return Net(3, 10, 0.99)  # evenkeel: ignore[EK301]

def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.9))  # evenkeel: ignore

def bad():
    net = Net(3, 10, 0.1)
    net.bn.running_var[0] = -1
    return net
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "checkednets.py").write_text(NETWORKS)
    monkeypatch.delitem(sys.modules, "checkednets", raising=False)
    return "checkednets"


def told(command, *words) -> dict:
    code, out, errors = command("check", *words, "--format", "json")
    assert code in (0, 1), errors
    return json.loads(out)


def codes(found: dict) -> list[str]:
    return [f["code"] for f in found["findings"]]


def test_the_exit_code_tells_of_errors_alone(nets, command):
    code, out, _ = command("check", f"{nets}:odd")
    assert code == 0
    assert out.startswith("0 errors, 1 warning, 2 notes")
    code, out, _ = command("check", f"{nets}:bad")
    assert code == 1
    assert "EK303 negative-variance" in out
    assert "bn (checkednets.py:9)" in out


def test_what_a_network_prints_does_not_mix_with_findings(nets, command):
    code, out, errors = command("check", f"{nets}:odd", "--input", "4,3,8,8", "--format", "json")
    assert code == 0
    assert codes(json.loads(out)) == ["EK403", "EK101", "EK301"]
    assert "the network talks" in errors


def test_shapes_and_classes_reach_the_factory(nets, command):
    found = told(command, f"{nets}:good", "--input", "1,5,8,8", "--classes", "3")
    assert found["errors"] == found["warnings"] == 0
    assert not any("EK101" in u["codes"] for u in found["unchecked"])


def test_data_is_measured(nets, command):
    found = told(command, f"{nets}:good", "--data", "digits", "--batch-size", "32")
    assert [layer["path"] for layer in found["layers"]] == ["bn"]
    assert not any("EK307" in u["codes"] for u in found["unchecked"])
    assert "EK503" not in codes(found)
    few = told(command, f"{nets}:good", "--data", "digits", "--batch-size", "4")
    assert [f["evidence"] for f in few["findings"] if f["code"] == "EK503"] == [4]
    sizes = {
        reading: told(command, f"{nets}:good", "--data", "digits", "--reading", reading)["layers"]
        for reading in ("normalized", "unit", "raw")
    }
    assert len({round(layers[0]["own"], 3) for layers in sizes.values()}) == 3


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_are_checked(nets, command, tmp_path, suffix):
    command("check", f"{nets}:good", "--input", "1,3,8,8")  # imports the module
    import checkednets

    state = checkednets.bad().state_dict()
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    code, out, _ = command("check", f"{nets}:good", "--input", "4,3,8,8", "--weights", path)
    assert code == 1
    assert "EK303" in out


@pytest.mark.parametrize("output", ["sarif", "github"])
def test_formats_for_machines(nets, command, output):
    code, out, _ = command("check", f"{nets}:bad", "--format", output)
    assert code == 1
    if output == "sarif":
        results = json.loads(out)["runs"][0]["results"]
        place = results[0]["locations"][0]["physicalLocation"]
        assert place["artifactLocation"]["uri"] == "checkednets.py"
    else:
        assert out.startswith("::error file=checkednets.py,line=9,title=EK303 negative-variance::")


def test_ways_of_silence(nets, command, tmp_path):
    assert "EK403" in codes(told(command, f"{nets}:odd"))
    assert "EK403" not in codes(told(command, f"{nets}:odd", "--ignore", "EK101,EK403"))
    both = told(command, f"{nets}:odd", "--ignore", "EK403", "--ignore", "EK101")
    assert codes(both) == ["EK301"]
    assert codes(told(command, f"{nets}:plain")) == []  # by the comment in the factory
    (tmp_path / "pyproject.toml").write_text('[tool.evenkeel]\nignore = ["EK303"]\n')
    assert command("check", f"{nets}:bad")[0] == 0


def test_fix_writes_weights_that_give_the_same(nets, command, tmp_path):
    command("check", f"{nets}:good", "--input", "1,3,8,8")
    import checkednets

    torch.manual_seed(0)
    net = checkednets.good((3, 8, 8), 10)
    x = torch.randn(16, 3, 8, 8)
    net(x), net.eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    code, out, errors = command(
        "check", f"{nets}:good", "--input", "8,3,8,8", "--weights", "w.safetensors", "--fix"
    )
    assert code == 0
    assert "EK101" not in out
    assert "conv: bias moved into bn; build it bias=False" in errors
    done = told(command, f"{nets}:good", "--input", "8,3,8,8", "--fix", "--out", "o.safetensors")
    assert done["fixed"]["biases"] == [["conv", "bn"]]
    assert (tmp_path / "o.safetensors").is_file()
    state = load_file(tmp_path / "w-fixed.safetensors")
    assert "conv.bias" not in state
    again = checkednets.good((3, 8, 8), 10).eval()
    again.conv.bias = None
    again.load_state_dict(state)
    torch.testing.assert_close(again(x), net(x), rtol=1e-5, atol=1e-6)
    assert load_file(tmp_path / "w.safetensors").keys() == net.state_dict().keys()
    _, _, errors = command("check", f"{nets}:plain", "--input", "8,3,8,8", "--fix")
    assert "there is nothing to fix" in errors
    assert not (tmp_path / "fixed.safetensors").exists()


def test_a_network_of_evenkeel_train(command, tmp_path):
    words = ("train", "--data", "digits", "--epochs", "6", "--out", "net.safetensors")
    code, _, errors = command(*words)
    assert code == 0, errors
    found = told(command, "net.safetensors")
    assert found["errors"] == found["warnings"] == 0
    assert len(found["layers"]) >= 2
    assert "EK101" not in codes(found)
    assert told(command, "net.safetensors", "--fix")["fixed"]["biases"] == []


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("checkednets:none",), "has no 'none'"),
        (("nowhere:net",), "cannot be imported"),
        (("checkednets:odd", "--input", "3"), "is no shape"),
        (("checkednets:odd", "--input", "a,b"), "is no shape"),
        (("checkednets:odd", "--format", "xml"), "unknown --format 'xml'"),
        (("checkednets:odd", "--reading", "units"), "did you mean 'unit'"),
        (("checkednets:odd", "--ignore", "EK1"), "unknown code 'EK1'"),
        (("checkednets:odd", "--weights", "none.pt"), "no such file"),
        (("checkednets:odd", "--weights", "."), "it is a folder; give a file in it"),
        (("checkednets:odd", "--fix"), "give --input or --data"),
        (("checkednets:odd", "--fix", "--out", "."), "--out . is a folder; name a file in it"),
        (("checkednets:odd", "--data-dir", "x"), "belong to --data"),
        (("checkednets:odd", "--data", "digits", "--input", "1,3,9,9"), "--input has samples of"),
        (("checkednets.py", "--input", "1,3,9,9"), "leave out --input"),
    ],
)
def test_mistakes_are_explained(nets, command, words, what):
    code, out, errors = command("check", *words)
    assert code == 2
    assert out == ""
    assert what in errors
