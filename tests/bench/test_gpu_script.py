"""``benchmarks/gpu.py``: what it plans, its clock, and that it stops where there is no GPU."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from evenkeel.bench.machine import machine
from evenkeel.bench.results import Results, row_of
from evenkeel.bench.timing import Samples

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = sys.modules["gpu_script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_script"]


def started(*words: str) -> subprocess.CompletedProcess[str]:
    """The script, where torch sees no GPU."""
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(program, env=hidden, capture_output=True, text=True)


@pytest.fixture
def log(tmp_path):
    with (tmp_path / "gpu.log").open("a+") as file:
        yield file


@pytest.fixture
def phase(gpu):
    """A phase that runs a program of Python's."""

    def make(text: str, name: str = "tests", share: float = 1.0):
        return gpu.Phase(name, "a test", share, [sys.executable, "-c", text], gpu.last_line)

    return make


class TestWithoutAGpu:
    def test_it_stops_and_says_why(self, tmp_path):
        done = started("--out", str(tmp_path / "new"))
        assert done.returncode == 2
        assert "finds no CUDA device here; run this on a machine with an NVIDIA GPU" in done.stderr
        assert (done.stdout, list((tmp_path / "new").iterdir())) == ("", [])

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (("--minutes", "0.2"), "--minutes is 0.2; give half a minute or more"),
            (("--minutes", "nan"), "--minutes is nan; give half a minute or more"),
            (("--only", "fold"), "invalid choice: 'fold'"),
            (("--out", str(SCRIPT)), f"--out {SCRIPT} cannot be made"),
        ],
    )
    def test_mistakes(self, words, text):
        done = started(*words)
        assert done.returncode == 2
        assert text in done.stderr

    def test_the_machine_is_asked_in_a_process_of_its_own(self, gpu):
        done = started("--serve", "machine")
        assert json.loads(done.stdout)["gpu"] is None


class TestPlan:
    def test_phases_and_their_files(self, gpu, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/cuda/{name}")
        found = gpu.phases(tmp_path, "NVIDIA H200", 8, None)
        assert [each.name for each in found] == list(gpu.SHARES)
        assert sum(gpu.SHARES.values()) == pytest.approx(1)
        steps, ops, compiled = (phase.command for phase in found[2:5])
        assert steps[1:5] == ["-m", "evenkeel", "bench", "steps"]
        assert " ".join(steps[5:-2]) == (
            "--device cuda --net resnet50 --batch 256 --size 224 --dtype bfloat16 "
            "--layout channels_last --seconds 8 --no-compile"
        )
        assert steps[-1] == str(tmp_path / "steps-h200.json")
        assert compiled[-1] == str(tmp_path / "steps-compiled-h200.json")
        assert "--no-compile" not in compiled
        assert ops[-2:] == ["--out", str(tmp_path / "ops-h200.json")]
        assert 0.1 <= float(ops[ops.index("--seconds") + 1]) <= 1
        assert found[5].command[0] == "/cuda/compute-sanitizer"
        assert found[5].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        assert "--no-compile" in ops
        steps, ops = gpu.phases(tmp_path, "x", 8, ["steps", "ops"])
        assert (steps.name, ops.name) == ("steps", "ops")
        assert "--compile" in ops.command
        assert 480 * ops.share / (steps.share + ops.share) > 200  # three seconds for each of 64

    def test_the_commands_are_understood(self, gpu, tmp_path, monkeypatch, command):
        """On the CPU, as they would be announced."""
        for each in gpu.phases(tmp_path, "NVIDIA H200", 8, ["steps", "ops", "compiled"]):
            words = ["cpu" if word == "cuda" else word for word in each.command[3:]]
            code, out, err = command(*words, "--dry-run")
            assert (code, err) == (0, "")
            assert "resnet50" not in out
            assert f"{gpu.CASES} cases" in out or "1 network, batch 256" in out

    def test_every_file_with_gpu_tests_is_run_and_no_other(self, gpu):
        words = gpu.tests()
        files = [word for word in words if word.endswith(".py")]
        assert {"tests/test_gpu.py", "tests/cudnn/test_gpu.py"} <= {*files}
        root = SCRIPT.parent.parent
        assert {root / name for name in (*files, *gpu.ELSEWHERE)} == {
            path
            for path in (root / "tests").rglob("test_*.py")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.gpu"
        }

    def test_files_that_need_what_is_missing_are_left_out(self, gpu, monkeypatch):
        right = gpu.there
        monkeypatch.setattr(gpu, "there", lambda name: name != "safetensors" and right(name))
        assert not any("tests/study" in word for word in gpu.tests())

    def test_where_evenkeel_is_not_installed_the_checkout_is_on_the_path(self, gpu, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", "mine")
        monkeypatch.setattr(gpu, "INSTALLED", False)
        monkeypatch.setattr(sys, "path", sys.path.copy())
        for _ in range(2):
            gpu.from_source()  # which must not pass for an installation
        assert sys.path.count(str(SCRIPT.parent.parent / "src")) == 1
        wanted = f"{SCRIPT.parent.parent / 'src'}{os.pathsep}mine"
        assert gpu.environment()["PYTHONPATH"] == wanted
        monkeypatch.setattr(gpu, "INSTALLED", True)
        assert gpu.environment()["PYTHONPATH"] == "mine"

    @pytest.mark.parametrize(
        ("name", "slug"),
        [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("(?)", "gpu")],
    )
    def test_names(self, gpu, name, slug):
        assert gpu.slug_of(name) == slug

    def test_without_a_sanitizer_it_is_left_out_which_is_no_failure(self, gpu, monkeypatch, log):
        monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
        (found,) = gpu.phases(Path(), "x", 8, ["sanitizer"])
        one = gpu.ran(found, 1, log)
        assert (one.result, one.told, one.is_good) == ("left out", "it is not on the PATH", True)


class TestRun:
    def test_one_that_fails_stops_no_other(self, gpu, phase, log, capsys):
        chosen = [phase("print('broken'); exit(3)"), phase("print('fine')", "ops")]
        found = gpu.carried_out(chosen, time.monotonic() + 60, log)
        assert [(one.result, one.told) for one in found] == [
            ("failed with 3", "broken"),
            ("ok", "fine"),
        ]
        assert "  | broken" in capsys.readouterr().out
        log.seek(0)
        text = log.read()
        assert text.index("==== tests") < text.index("broken") < text.index("==== ops")
        assert [one.is_good for one in found] == [False, True]

    def test_a_limit_ends_a_phase_as_ctrl_c_does_and_all_that_it_has_started(
        self, gpu, phase, log, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(gpu, "GRACE", 3)
        child = f"import time; time.sleep(4); open({str(tmp_path / 'alive')!r}, 'w')"
        text = (
            "import subprocess, sys, time, signal\n"
            f"subprocess.Popen([sys.executable, '-c', {child!r}],"
            " preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))\n"
            "try:\n    print('ready', flush=True); time.sleep(60)\n"
            "except KeyboardInterrupt:\n    print('what there is')\n"
        )
        one = gpu.ran(phase(text), 2, log)
        assert (one.result, one.told) == ("stopped after 2 s", "what there is")
        assert one.seconds < 5
        time.sleep(4)
        assert not (tmp_path / "alive").exists()

    def test_one_that_does_not_listen_is_killed(self, gpu, phase, log, monkeypatch):
        monkeypatch.setattr(gpu, "GRACE", 0.2)
        ignore = f"import signal, time; signal.signal({int(signal.SIGINT)}, signal.SIG_IGN)"
        one = gpu.ran(phase(f"{ignore}; time.sleep(60)"), 1, log)
        assert one.seconds < 5
        assert not one.is_good

    def test_what_one_leaves_of_its_time_goes_to_those_behind(self, gpu, log, monkeypatch):
        limits = []
        now = SimpleNamespace(monotonic=lambda: 50.0 * len(limits))
        monkeypatch.setattr(gpu, "time", now)

        def ran(phase, limit, _):
            limits.append(limit)
            return gpu.Outcome(phase.name, "ok", "", 50, True)

        monkeypatch.setattr(gpu, "ran", ran)
        chosen = [gpu.Phase(str(share), "", share, [], str) for share in (0.6, 0.3, 0.1)]
        gpu.carried_out(chosen, 200.0, log)
        assert limits == pytest.approx([120, 150 * 0.75, 100])

    def test_no_limit_is_so_short_that_nothing_could_come_of_it(self, gpu, log, monkeypatch):
        limits = []
        monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: 0.0))
        right = gpu.Outcome("a", "ok", "", 0, True)
        monkeypatch.setattr(gpu, "ran", lambda phase, limit, _: limits.append(limit) or right)
        chosen = [gpu.Phase("a", "", share, [], str) for share in (0.01, 0.99)]
        for deadline in (480.0, 20.0):
            gpu.carried_out(chosen, deadline, log)
        assert limits == pytest.approx([gpu.LEAST, 480, 20, 20])

    def test_ctrl_c_leaves_the_others_out(self, gpu, phase, log, monkeypatch):
        def ran(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(gpu, "ran", ran)
        assert gpu.carried_out([phase(""), phase("")], time.monotonic() + 5, log) == []


class TestServed:
    def test_the_environment_begins_with_the_versions(self, gpu, monkeypatch, capsys):
        there = {"name": "NVIDIA H200", "triton": "3.6.0", "cudnn": 91900, "cuda": "13.0"}
        found = machine() | {"gpu": there, "torch": "2.11.0"}
        monkeypatch.setattr("evenkeel.bench.machine.machine", lambda: found)
        monkeypatch.setattr(gpu, "driver", lambda: "580.1")
        gpu.serve_environment()
        out = capsys.readouterr().out
        assert gpu.said("Traceback (most recent call last):\n 1\nE: no") == "E: no"
        assert gpu.said(out) == (
            "NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, cudnn 91900, cuda 13.0"
        )
        assert "backend triton: " in out

    def test_a_driver_that_does_not_answer(self, gpu, monkeypatch):
        def run(*_, **__):
            raise FileNotFoundError

        monkeypatch.setattr(gpu.subprocess, "run", run)
        assert gpu.driver() == "unknown"

    def test_the_small_calls_can_be_made(self, gpu, capsys):
        gpu.small_calls("cpu", "reference")
        assert capsys.readouterr().out.count("ran (") == 2 * 3


class TestTold:
    def test_pytests_count(self, gpu):
        assert gpu.tested("..F\nseen: 3 passed\n===== 1 failed, 3 passed in 2.0s =====\n") == (
            "1 failed, 3 passed in 2.0s"
        )
        assert gpu.tested("no such option") == "no such option"
        assert gpu.tested("") == "nothing was printed"

    def test_the_sanitizers(self, gpu):
        text = "========= ERROR SUMMARY: 0 errors\nbye"
        assert gpu.checked(text) == "ERROR SUMMARY: 0 errors"

    def test_numbers(self, gpu, tmp_path):
        file = tmp_path / "steps.json"
        assert gpu.measured(file) == "no numbers"
        sides = {"eager": 4.0, "compile": 2.0, "evenkeel": 1.0, "evenkeel compiled": 1.5}
        samples = {side: Samples((seconds,) * 4) for side, seconds in sides.items()}
        row = row_of("a", "nchw", "float32", samples, absent={"cudnn": "no such library"})
        results = Results("steps", "s", {}, {}, [row], finished=True)
        file.write_text(results.to_json())
        assert gpu.measured(file) == (
            "1 rows; ours / eager 0.25; ours / compile 0.50; ours compiled / compile 0.75; "
            "cudnn missing"
        )
        results.finished = False
        file.write_text(results.to_json())
        assert gpu.measured(file).startswith("1 rows, not all; ")
        os.utime(file, (0, 0))
        assert gpu.measured(file) == "no numbers"  # but those of another run
        file.write_text("{}")
        assert "no result file" in gpu.measured(file)

    def test_the_table(self, gpu):
        rows = list(gpu.rows_of([gpu.Outcome("ops", "ok", "64 rows", 41.7, True)]))
        assert rows[1] == f"ops                42  ok{' ' * 20}64 rows"
