"""Checkpoints: files and dicts, wrapped names, averaged weights beside the others, wrong files."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from evenkeel import check
from evenkeel.checks.weights import as_checkpoint, load_into, save
from evenkeel.errors import ConfigError, FormatError

from .planted import Net, images, net
from .test_observe import everything


def broken() -> nn.Module:
    model = net()
    model.bn1.running_var[0] = -1
    return model


def wrapped(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_files_are_checked_in_place_of_the_network(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    state = broken().state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = Net()
    before = everything(model)
    for given in (path, str(path), state):
        found = check(model, checkpoint=given)
        assert [f.path for f in found.of("EK303")] == ["bn1"]
        assert not found.of("EK301")
    assert everything(model) == before


@pytest.mark.parametrize(
    "given",
    [
        lambda m: wrapped(m, "module."),
        lambda m: wrapped(m, "_orig_mod."),
        lambda m: wrapped(m, "module._orig_mod."),
        lambda m: {"epoch": torch.tensor(3), "state_dict": m.state_dict(), "optimizer": {}},
        lambda m: {"model": wrapped(m, "module.")},
        lambda m: {"ema": m.state_dict()},
        lambda m: m.state_dict() | {"extra.weight": torch.ones(3)},
    ],
)
def test_weights_are_found_under_the_usual_names(given):
    assert check(Net(), checkpoint=given(broken())).of("EK303")


def test_a_wrapped_network_takes_bare_weights():
    average = AveragedModel(Net())
    state = {f"module.{k}": v for k, v in broken().state_dict().items()}
    found = check(average, checkpoint=state | {"n_averaged": torch.tensor(3)})
    assert [f.path for f in found.of("EK303")] == ["module.bn1"]


def test_averaged_weights_with_the_statistics_of_another_network():
    """The average has moved little; its statistics are still those of the start."""
    model, fresh = net(), Net()
    model.bn1.running_var *= 9
    averaged = copy.deepcopy(model)
    averaged.bn1.load_state_dict(fresh.bn1.state_dict())
    with torch.no_grad():
        averaged.conv1.weight.mul_(1.01)
    both = {"state_dict": model.state_dict(), "state_dict_ema": averaged.state_dict()}
    (finding,) = check(Net(), checkpoint=both).of("EK308")
    assert finding.path == "bn1"
    mean, var = model.bn1.running_mean.double(), model.bn1.running_var.double() + 1e-5
    r = ((1 + 1e-5) / var).sqrt() - 1
    assert finding.evidence == pytest.approx(
        float((mean.square() / var + r.square()).mean().sqrt()), rel=1e-6
    )
    averaged.bn1.load_state_dict(model.bn1.state_dict())
    both["state_dict_ema"] = averaged.state_dict()
    assert not check(Net(), checkpoint=both).of("EK308")


def test_an_average_that_lags_in_all_is_not_stale():
    """Statistics one deviation apart follow from weights that are 40 % apart."""
    model = net()
    averaged = copy.deepcopy(model)
    averaged.bn1.running_mean += model.bn1.running_var.sqrt()
    both = {"state_dict": model.state_dict(), "state_dict_ema": averaged.state_dict()}
    assert check(Net(), checkpoint=both).of("EK308")
    with torch.no_grad():
        for p in (*averaged.conv1.parameters(), *averaged.conv2.parameters()):
            p.mul_(0.6)
        averaged.fc.weight.mul_(0.6)
    both["state_dict_ema"] = averaged.state_dict()
    assert not check(Net(), checkpoint=both).of("EK308")


def test_an_average_without_data_is_not_judged():
    average = AveragedModel(net())
    average.update_parameters(net())
    found = check(average, images())
    assert any("EK308" in u.codes and "1 models" in u.reason for u in found.unchecked)
    buffers = AveragedModel(net(), use_buffers=True)
    buffers.update_parameters(net())
    assert not any("EK308" in u.codes for u in check(buffers, images()).unchecked)


def test_missing_statistics_are_told_once():
    found = check(Net(), checkpoint=dict(broken().named_parameters()))
    assert {f.path: f.evidence for f in found.of("EK309")} == {"bn1": 2, "bn2": 2}
    assert not found.of("EK301")
    half = {k: v for k, v in net().state_dict().items() if not k.startswith("bn2.running_var")}
    assert [f.evidence for f in check(Net(), checkpoint=half).of("EK309")] == [1]
    old = {k: v for k, v in net().state_dict().items() if "num_batches" not in k}
    assert not check(Net(), checkpoint=old).of("EK309")  # before torch 0.4.1


def test_wrong_files_are_refused(tmp_path):
    state = net().state_dict()
    for given, what in (
        (tmp_path / "none.pt", "no such file"),
        ({}, "no tensors"),
        ({"a": 1, "b": "c"}, "no tensors"),
        ({k: v for k, v in state.items() if k != "fc.weight"}, r"no fc\.weight; it is of another"),
        (state | {"fc.bias": torch.ones(3)}, r"fc\.bias is \(3,\), but the network's is \(5,\)"),
    ):
        with pytest.raises(FormatError, match=what):
            check(Net(), checkpoint=given)
    for name, content in (("a.safetensors", b"no"), ("a.pt", b"no"), ("b.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match=name):
            as_checkpoint(tmp_path / name)
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    with pytest.raises(FormatError, match="holds a list"):
        as_checkpoint(tmp_path / "list.pt")


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"model": net()}, tmp_path / "whole.pt")  # a pickled network
    with pytest.raises(FormatError, match=r"it is no file of tensors.*state_dict"):
        as_checkpoint(tmp_path / "whole.pt")


def test_what_is_saved_is_read_back(tmp_path):
    model = net()
    model.again = model.conv1  # one tensor under two names
    save(tmp_path / "out.safetensors", model)
    other = Net()
    other.again = other.conv1
    load_into(other, as_checkpoint(tmp_path / "out.safetensors"))
    assert all(torch.equal(a, other.state_dict()[k]) for k, a in model.state_dict().items())
    with pytest.raises(ConfigError, match="cannot be written"):
        save(tmp_path / "no" / "out.safetensors", model)
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]
