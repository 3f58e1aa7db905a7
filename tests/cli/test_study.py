"""``evenkeel study`` and ``evenkeel report``: what they show, and how mistakes end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from evenkeel.study.data import load
from evenkeel.study.pool import Pool
from evenkeel.study.presets import PRESETS
from evenkeel.study.trial import run_trial

from ..study.helpers import CPU

SMALL = """
seeds = 2
steps = 40
points = 4
target = 0.5
[[arm]]
name = "plain"
learning_rate = 0.1
[[arm]]
name = "normed"
learning_rate = 0.1
placement = "before-activation"
"""


@pytest.fixture
def evenkeel(command, monkeypatch):
    """Runs a command in an empty folder, 80 columns wide; gives exit code, output, errors."""
    monkeypatch.setenv("COLUMNS", "80")
    return command


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture
def in_process(monkeypatch):
    """Trials run here and not in workers, which tests/study/test_run.py looks at."""

    def run(pool, jobs):
        for arm, seed in jobs:
            yield run_trial(pool._plan, arm, seed, load("digits"), CPU)

    monkeypatch.setattr(Pool, "run", run)


class TestStudy:
    def test_from_a_file_to_a_page_and_back(self, evenkeel, config, in_process):
        code, out, err = evenkeel("study", "--config", config, "--workers", "2")
        assert (code, err) == (0, "")
        assert "2 arms x 2 seeds = 4 trials" in flat(out)
        assert "1. Before or after the non-linearity?" in out
        assert max(len(line) for line in out.splitlines() if "Report" not in line) <= 80
        page = Path("runs/small-digits/report.html")
        assert str(page) in out
        assert page.read_text().lower().startswith("<!doctype html>")

        code, out, _ = evenkeel("study", "--config", config)
        assert code == 0
        assert "4 trials, 4 of them done" in flat(out)

        page.unlink()
        code, out, _ = evenkeel("report", "runs/small-digits")
        assert code == 0
        assert page.exists()

        code, out, _ = evenkeel("report", "runs/small-digits", "--json")
        numbers = json.loads(out)
        assert numbers["finished"] == 4
        assert [arm["name"] for arm in numbers["arms"]] == ["plain", "normed"]
        assert len(numbers["answers"]) == 10

        code, out, _ = evenkeel("study", "--resume", "--seeds", "3", "--workers", "1")
        assert code == 0
        assert "6 trials, 4 of them done" in flat(out)

    def test_a_dry_run_shows_the_arms_and_trains_nothing(self, evenkeel, config):
        code, out, _ = evenkeel("study", "--config", config, "--dry-run")
        assert code == 0
        assert "normed" in out
        assert "about" in out
        assert not Path("runs").exists()

    def test_your_own_network(self, evenkeel, tmp_path):
        (tmp_path / "mine.py").write_text(
            "from torch import nn\n"
            "def net(shape, classes):\n"
            "    return nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Flatten(),\n"
            "                         nn.Linear(4 * (shape[1] - 2) * (shape[2] - 2), classes))\n"
        )
        code, out, _ = evenkeel("study", "--model", "mine:net", "--dry-run")
        sys.modules.pop("mine", None)
        assert code == 0
        assert "Left out: arm 'after pooling': Sequential has no place for" in flat(out)
        assert "on input of layers" in out
        code, out, _ = evenkeel("study", "--model", "lenet5", "--dry-run")
        assert "kept in runs/quick-digits-lenet5" in flat(out)

    def test_your_own_pictures(self, evenkeel, tmp_path):
        for place in range(8):
            path = tmp_path / "pictures" / "ab"[place % 2] / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (12, 12), 30 * place).save(path)
        (tmp_path / "own.toml").write_text(SMALL.replace("0.1\n", "0.1\nbatch_size = 2\n"))
        words = ("--data", "folder", "--data-dir", "pictures", "--image-size", "16", "--dry-run")
        code, out, _ = evenkeel("study", "--config", "own.toml", *words)
        assert code == 0
        assert "6 training and 2 test images, 1x16x16, 2 classes" in flat(out)

    def test_a_failed_arm_is_shown(self, evenkeel, tmp_path):
        (tmp_path / "later.py").write_text(
            "import multiprocessing\nfrom torch import nn\n"
            "def net(classes):\n"
            "    if multiprocessing.parent_process(): raise OSError('lost the net')\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
        )
        (tmp_path / "f.toml").write_text(
            'seeds = 1\nsteps = 3\n[[arm]]\nname = "own"\nmodel = "later:net"\n'
        )
        code, out, _ = evenkeel("study", "--config", "f.toml", "--workers", "1")
        sys.modules.pop("later", None)
        assert code == 0
        assert "own, seed 0: failed" in flat(out)
        assert "1 trial failed; try again with --retry-failed" in flat(out)


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--preset", "quik"], "unknown preset 'quik' (did you mean 'quick'?); choose one of"),
            (["--data", "mnits"], "unknown data 'mnits' (did you mean 'mnist'?)"),
            (["--data", "mnist", "--data-dir", "."], "train-images"),
            (["--data", "mnist", "--data-dir", "nowhere"], "nowhere"),
            (["--data", "folder"], "needs the folder"),
            (["--model", "nowhere:net"], "'nowhere' of model 'nowhere:net' cannot be imported"),
            (["--model", "vgg16"], "unknown model 'vgg16'"),
            (["--config", "no.toml"], "no.toml cannot be read"),
            (["--config", "a.toml", "--preset", "quick"], "give --preset or --config, not both"),
            (["--resume"], "there is no run in runs; start one with 'evenkeel study'"),
            (["--resume", "--preset", "quick"], "--resume goes on with a run as it was"),
            (["--device", "tpu"], "unknown device 'tpu'; choose auto, cpu or cuda"),
            (["--device", "cuda"], "device 'cuda' was asked for but torch"),
            (["--out", "/dev/null/x", "--config", "small.toml"], "cannot be made"),
        ],
    )
    @pytest.mark.usefixtures("config")
    def test_each_is_one_line_and_exit_code_2(self, evenkeel, words, message, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        code, out, err = evenkeel("study", "--workers", "1", *words)
        assert code == 2
        assert flat(err).startswith("error: ")
        assert message in flat(err)
        assert len(err.strip().splitlines()) == 1
        assert "Traceback" not in out + err

    def test_a_bad_pattern_in_a_file(self, evenkeel, tmp_path):
        bad = SMALL + 'statistics = "n c h w -> x"\n'
        (tmp_path / "bad.toml").write_text(bad)
        code, _, err = evenkeel("study", "--config", "bad.toml")
        assert code == 2
        assert "arm 'normed': axis 'x' on the right of 'n c h w -> x'" in flat(err)

    def test_a_corrupted_run(self, evenkeel, config, tmp_path):
        (tmp_path / "study.sqlite").write_bytes(b"\x00garbage" * 999)
        for words in (["report", "."], ["study", "--out", ".", "--config", config]):
            code, _, err = evenkeel(*words)
            assert code == 2
            assert "study.sqlite is damaged" in flat(err)
            assert "nothing was changed" in flat(err)

    def test_a_full_disk_under_the_page(self, evenkeel, config, in_process, monkeypatch):
        assert evenkeel("study", "--config", config, "--workers", "1")[0] == 0
        page = Path("runs/small-digits/report.html")
        before = page.read_text()

        def full(*_args, **_kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        code, _, err = evenkeel("report", "runs/small-digits")
        assert code == 2
        assert "report.html cannot be written: No space left on device" in flat(err)
        assert page.read_text() == before
        assert sorted(p.name for p in page.parent.iterdir()) == [
            "lock",
            "report.html",
            "study.sqlite",
        ]

    def test_a_report_of_nothing(self, evenkeel):
        code, _, err = evenkeel("report", "runs/none")
        assert code == 2
        assert "there is no study in runs/none" in flat(err)


def test_every_preset_is_in_the_help(evenkeel):
    _, out, _ = evenkeel("study", "--help")
    assert all(name in flat(out) for name in PRESETS)


def test_the_version(evenkeel):
    code, out, _ = evenkeel("--version")
    assert (code, out.strip()) == (0, "evenkeel 0.1.0")
