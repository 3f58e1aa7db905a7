"""The commands that train, study, evaluate and predict have glibc keep large blocks."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evenkeel import allocator

pytestmark = pytest.mark.skipif(
    allocator.status().setting == "system", reason="this process does not use glibc's allocator"
)

TELLS = """
import os
from pathlib import Path
from torch import nn
from evenkeel import allocator

def net(shape, classes):
    with Path("told").open("a") as file:
        print(os.getpid(), allocator.status().setting, file=file)
    size = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 8), nn.ReLU(), nn.Linear(8, classes))
"""

SMALL = """
seeds = 1
steps = 10
points = 2
[[arm]]
name = "plain"
[[arm]]
name = "normed"
placement = "before-activation"
"""


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    for key in allocator.variables(os.environ):
        monkeypatch.delenv(key)
    monkeypatch.delenv(allocator.SWITCH, raising=False)
    allocator.default_blocks()
    yield
    monkeypatch.delenv(allocator.SWITCH, raising=False)
    allocator.default_blocks()


@pytest.mark.parametrize("wish", ["keep", "default"])
def test_one_network(command, tmp_path, monkeypatch, wish):
    monkeypatch.setenv(allocator.SWITCH, wish)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "digit.png")
    for words in (
        ("train", "--epochs", "1", "--out", "m.safetensors"),
        ("evaluate", "m.safetensors"),
        ("predict", "m.safetensors", "digit.png"),
        ("recalibrate", "m.safetensors", "--out", "again.safetensors"),
    ):
        allocator.default_blocks()
        code, _, err = command(*words)
        assert code == 0, err
        assert allocator.status().setting == wish, words[0]


@pytest.mark.parametrize("wish", ["keep", "default"])
def test_every_process_of_a_study(command, tmp_path, monkeypatch, wish):
    monkeypatch.setenv(allocator.SWITCH, wish)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / f"tells_{wish}.py").write_text(TELLS)
    (tmp_path / "small.toml").write_text(SMALL)
    words = ("--config", "small.toml", "--model", f"tells_{wish}:net", "--workers", "1")
    code, _, err = command("study", *words)
    assert code == 0, err
    told = [line.split() for line in Path("told").read_text().splitlines()]
    assert len({process for process, _ in told}) == 2
    assert {setting for _, setting in told} == {wish}


def test_a_switch_that_does_not_exist(command, monkeypatch):
    monkeypatch.setenv(allocator.SWITCH, "off")
    for words in (("train",), ("study",), ("evaluate", "m.safetensors"), ("doctor",)):
        code, _, err = command(*words)
        assert code == 2
        assert "unknown EVENKEEL_ALLOCATOR=off; choose keep or default" in " ".join(err.split())
