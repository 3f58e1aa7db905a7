"""README and docs: every example is run, every command is typed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evenkeel.study.config import load_plan

from .formats import samples
from .study.data.makers import idx_files, write

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

NETWORK = """
from torch import nn

def small(shape, classes):
    return nn.Sequential(nn.Conv2d(shape[0], 4, 3, padding=1), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * shape[1] * shape[2], classes))
"""


SMALL = """
seeds = 2
steps = 10
[[arm]]
name = "plain"
[[arm]]
name = "normed"
placement = "before-activation"
"""


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of one language, as they stand."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def lines(text: str) -> list[list[str]]:
    """The words of each command in the shell blocks, in their order."""
    typed = [line for block in blocks(text, "sh") for line in block.splitlines()]
    return [words for line in typed if (words := shlex.split(line, comments=True))]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A folder with all that the commands speak of, small."""
    write(tmp_path / "mnist", idx_files(train=200, test=100, size=28), packed=True)
    rng = np.random.default_rng(0)
    for place in range(80):
        path = tmp_path / "pictures" / "ab"[place % 2] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(path)
    Image.fromarray(rng.integers(0, 255, (28, 28), np.uint8)).save(tmp_path / "seven.png")
    (tmp_path / "mynets.py").write_text(NETWORK)
    source = samples.text(
        (1, 8, 8), "convolutional batch_normalize=1 filters=4 size=3 pad=1 activation=leaky",
        "connected output=3 activation=linear",
    )  # fmt: skip
    samples.written(tmp_path, source, samples.weights_for(source))
    samples.old_keras_file(tmp_path / "model.h5")
    for document in DOCUMENTS:
        for block in blocks(document.read_text(), "toml"):
            (tmp_path / "mine.toml").write_text(block)
    return tmp_path


def test_there_is_something_to_test():
    text = (ROOT / "README.md").read_text()
    assert len(blocks(text, "python")) >= 4
    assert ["make", "study"] in lines(text)
    assert ["make", "test"] in lines(text)
    assert any(words[:2] == ["evenkeel", "train"] for words in lines(text))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(document.read_text(), "python"):
        exec(compile(block, document.name, "exec"), names)


def test_what_an_example_says_behind_its_print_is_what_it_prints(capsys):
    block = blocks((ROOT / "README.md").read_text(), "python")[-1]
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == block.strip().splitlines()[-1].split("# ")[1]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_in_toml_are_plans(document, tmp_path):
    for block in blocks(document.read_text(), "toml"):
        (tmp_path / "mine.toml").write_text(block)
        assert len(load_plan(tmp_path / "mine.toml").arms) >= 2


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_can_be_typed(document, command, prepared):
    """Studies and benchmarks are shown, not run; everything else runs."""
    found = lines(document.read_text())
    if any("report" in words or "--resume" in words for words in found):
        (prepared / "small.toml").write_text(SMALL)
        assert command("study", "--config", "small.toml", "--out", "runs/quick-digits")[0] == 0
    for tool, *words in found:
        if tool == "make":
            make = shutil.which("make")
            if make is None:
                pytest.skip("there is no make here")
            done = subprocess.run([make, "-n", *words], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            continue
        assert tool == "evenkeel", f"'{tool}' is no command that this test knows"
        is_long = words[0] in ("study", "bench") and "--dry-run" not in words
        asked = [*words, "--dry-run"] if is_long else words
        code, _, errors = command(*asked)
        assert code == 0, f"evenkeel {shlex.join(asked)}: {errors}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target
