"""``evenkeel bench``: tiny runs end to end, what it says before, and how it ends."""

from __future__ import annotations

import importlib
import json
import os

import pytest
import torch

from evenkeel import allocator
from evenkeel.bench import ops, shapes, steps
from evenkeel.bench.machine import machine
from evenkeel.bench.results import OURS, Results
from evenkeel.bench.shapes import Place

from ..bench.rounds import time_once


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """The allocator and the threads are as before each test, and after it; sides run once."""
    time_once(monkeypatch)
    for key in allocator.variables(os.environ):
        monkeypatch.delenv(key)
    monkeypatch.delenv(allocator.SWITCH, raising=False)
    allocator.default_blocks()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    allocator.default_blocks()


@pytest.fixture
def tiny(monkeypatch):
    """One small shape in place of the dozen."""
    place = Place(4, 5, 6, "bn+add+relu")
    monkeypatch.setattr(shapes, "NETWORKS", {"resnet50": lambda: iter([place] * 3)})
    monkeypatch.setattr(shapes, "QUICK", (place,))


GLIBC = allocator.status().setting != "system"
HERE = ("--allocator", "default", "--seconds", "0.01", "--threads", "1")


class TestOps:
    def test_end_to_end(self, command, tiny, tmp_path):
        words = ("bench", "ops", "--quick", "--batch", "2", *HERE, "--out", "found.json")
        code, out, err = command(*words)
        assert (code, err) == (0, "")
        said = flat(out)
        assert "4 cases of batch norm, forward and backward, batch 2, about 1 s" in said
        assert "1 thread;" in said
        assert "torch.compile is left out; --compile brings it in" in said
        assert "4x5x6 bn+add+relu" in said
        assert "channels_last bfloat16: ours / eager is" in said
        assert "nchw float32: all norms of resnet50, ms: floor" in said
        assert said.endswith("Numbers: found.json")

        found = Results.from_json((tmp_path / "found.json").read_text())
        assert (found.kind, found.unit, found.finished) == ("ops", "s", True)
        assert [row.group for row in found.rows] == [
            ("nchw", "float32"),
            ("nchw", "bfloat16"),
            ("channels_last", "float32"),
            ("channels_last", "bfloat16"),
        ]
        assert all(row.counts == {"resnet50": 3} for row in found.rows)
        assert found.machine["allocator"] in ("default", "system")
        assert found.settings["batch"] == 2
        assert "out" not in found.settings

    def test_one_layout_and_dtype(self, command, tiny):
        code, out, _ = command(
            "bench", "ops", "--quick", *HERE, "--layout", "channels_last", "--dtype", "float32"
        )
        assert code == 0
        assert "channels_last float32, ms" in out
        assert "nchw" not in out
        assert "bfloat16" not in out

    def test_announced_without_running(self, command, tiny, monkeypatch):
        monkeypatch.setattr(ops, "run", None)
        code, out, _ = command("bench", "ops", "--quick", "--dry-run")
        assert code == 0
        assert f"allocator {'keep' if GLIBC else 'system'}" in flat(out)

    def test_too_large_is_told(self, command):
        words = ("bench", "ops", "--net", "vgg16", "--batch", "128", "--dry-run")
        code, out, _ = command(*words)
        assert code == 0
        assert "left out: 64x224x224 bn+relu in float32: its tensor has 1.5 GiB" in flat(out)

    def test_stopping_keeps_what_there_is(self, command, tiny, tmp_path, monkeypatch):
        right = ops.run

        def stopped(chosen, **options):
            yield from right(chosen[:1], **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(ops, "run", stopped)
        code, out, _ = command("bench", "ops", "--quick", *HERE, "--out", "found.json")
        assert code == 130
        assert "Stopped; 1 of 4 are measured." in out
        assert "ours / eager is" in out
        assert "stopped before the end" in out
        found = Results.from_json((tmp_path / "found.json").read_text())
        assert (len(found.rows), found.finished) == (1, False)


class TestNets:
    @pytest.fixture(autouse=True)
    def _tiny(self, monkeypatch):
        monkeypatch.setattr(
            steps,
            "plans",
            lambda **given: [steps.Plan("vgg", 32, 0.125, 2, tuple(given["layouts"]), "float32")],
        )

    def test_steps(self, command, tmp_path):
        code, out, _ = command("bench", "steps", "--quick", *HERE, "--out", "found.json")
        assert code == 0
        assert "training steps of 1 network, batch 32" in flat(out)
        assert "channels_last float32, ms" in out
        found = json.loads((tmp_path / "found.json").read_text())
        assert {"bare", "eager"} <= set(found["rows"][0]["sides"])
        assert found["unit"] == "s"

    def test_memory(self, command, tmp_path):
        words = ("bench", "memory", "--quick", "--allocator", "default", "--layout", "nchw")
        code, out, _ = command(*words, "--out", "found.json")
        assert code == 0
        assert "memory kept for backward of 1 network" in flat(out)
        assert "nchw float32, MB" in out
        assert "nchw float32: low memory / eager is 0." in out
        assert json.loads((tmp_path / "found.json").read_text())["unit"] == "bytes"

    def test_low_memory_and_a_control_are_timed_if_asked_for(self, command, tmp_path):
        words = ("bench", "steps", "--quick", *HERE, "--low-memory", "--control")
        code, out, _ = command(*words, "--out", "found.json")
        assert code == 0
        assert "low mem." in out
        assert "nchw float32: eager again / eager is " in out
        assert "nchw float32: ours / no norm is " in out
        found = json.loads((tmp_path / "found.json").read_text())
        assert {"low memory", "eager again"} <= set(found["rows"][0]["sides"])
        assert found["settings"]["low_memory"] is found["settings"]["control"] is True


class TestSteps:
    def test_a_network_that_is_no_part_of_all_on_images_of_any_size(self, command):
        words = ("bench", "steps", "--net", "resnet50", "--size", "64", "--layout", "nchw")
        code, out, _ = command(*words, "--device", "cpu", "--dry-run")
        assert code == 0
        assert "training steps of 1 network, batch 32, about" in flat(out)
        code, out, _ = command("bench", "steps", "--dry-run")
        assert "training steps of 10 networks, batch 32" in flat(out)

    def test_what_is_as_by_default_is_not_in_the_file(self, command, tmp_path, monkeypatch):
        given = []

        def plans(**options):
            given.append(options)
            return [steps.Plan("vgg", 32, 0.125, 2, ("nchw",), "float32")]

        monkeypatch.setattr(steps, "plans", plans)
        new = ("--size", "48")
        for words in ((), new):
            code, _, _ = command("bench", "steps", "--quick", *HERE, *words, "--out", "found.json")
            assert code == 0
            settings = json.loads((tmp_path / "found.json").read_text())["settings"]
            assert settings.get("size") == (48 if words else None)
            assert ("size" in settings) == ("size" in given[-1]) == bool(words)
            assert "device" not in settings

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
    def test_without_a_gpu(self, command):
        code, _, err = command("bench", "steps", "--device", "cuda", "--dry-run")
        assert code == 2
        assert "device 'cuda' was asked for but torch" in flat(err)

    def test_on_a_gpu(self, command, monkeypatch):
        """As it would be announced there."""
        module = importlib.import_module("evenkeel.cli.bench")
        monkeypatch.setattr(module, "device_named", torch.device)
        found = machine() | {"gpu": {"name": "NVIDIA H200"}}
        monkeypatch.setattr("evenkeel.bench.machine.machine", lambda: found)
        words = ("bench", "steps", "--device", "cuda", "--net", "resnet50", "--dry-run")
        more = ("--size", "224", "--batch", "256", "--dtype", "bfloat16", "--layout", "nchw")
        code, out, _ = command(*words, *more)
        assert code == 0
        assert "training steps of 1 network, batch 256, about 3 min 25 s NVIDIA H200" in flat(out)
        code, _, err = command(*words, "--low-memory")
        assert code == 2
        assert "--low-memory is for the native kernels, on the CPU, but got --device" in flat(err)


@pytest.mark.skipif(not GLIBC, reason="there is no glibc here")
class TestAllocator:
    def test_every_side_has_the_one_that_was_asked_for(self, command, tmp_path, monkeypatch):
        """The command sets it, and the side that accelerates a network does not set another."""
        plan = steps.Plan("vgg", 32, 0.125, 2, ("nchw",), "float32")
        monkeypatch.setattr(steps, "plans", lambda **given: [plan])
        for wish in ("keep", "default"):
            words = ("steps", "--quick", "--seconds", "0.01", "--allocator", wish, "--threads", "1")
            assert command("bench", *words, "--out", "found.json")[0] == 0
            found = Results.from_json((tmp_path / "found.json").read_text())
            assert found.machine["allocator"] == allocator.status().setting == wish
            assert OURS in found.rows[0].sides

    def test_what_the_environment_keeps_cannot_be_had_otherwise(self, command, monkeypatch):
        for key, value in allocator.KEEP.items():
            monkeypatch.setenv(key, value)
        code, _, err = command("bench", "ops", "--quick", "--allocator", "default", "--dry-run")
        assert code == 2
        assert "unset MALLOC_MMAP_MAX_, MALLOC_TOP_PAD_, MALLOC_TRIM_THRESHOLD_" in flat(err)

    def test_the_users_own_is_left_and_told(self, command, monkeypatch):
        monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
        code, out, _ = command("bench", "ops", "--quick", "--dry-run")
        assert code == 0
        assert "allocator own" in flat(out)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("ops", "--dtype", "float16"), "unknown dtype 'float16'"),
        (("ops", "--layout", "nhwc"), "unknown layout 'nhwc'"),
        (("ops", "--net", "resnet5"), "did you mean 'resnet50'?"),
        (("steps", "--net", "lenet"), "unknown network 'lenet'"),
        (("memory", "--allocator", "jemalloc"), "unknown allocator 'jemalloc'; choose keep or"),
        (("ops", "--out", "nowhere/f.json"), "there is no folder nowhere; make it first"),
        (("fold", "--out", "."), "--out . is a folder; name a file in it"),
    ],
)
def test_mistakes(command, words, text):
    code, _, err = command("bench", *words, "--dry-run")
    assert code == 2
    assert text in flat(err)


@pytest.mark.parametrize("which", [(), ("ops",), ("steps",), ("memory",)])
def test_help(command, which):
    code, out, _ = command("bench", *which, "--help")
    assert code == 0
    assert ("--dry-run" if which else "ops") in out
