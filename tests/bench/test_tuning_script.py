"""``benchmarks/tuning.py``, in Triton's interpreter: what it times, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evenkeel.bench.ops import Case
from evenkeel.bench.shapes import Place
from evenkeel.kernels.select import load

from ..kernels.test_triton import FUSED, _fast  # noqa: F401 - loads the kernels, interpreted

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "tuning.py"
SUMS = Case(Place(3, 8, 8, "bn+add+relu"), 4, "nchw", "float32", {})
PLAIN = Case(Place(8, 2, 3, "bn"), 4, "channels_last", "bfloat16", {})


@pytest.fixture
def tuning(monkeypatch):
    """The script as a module, with blocks that are small and few others to try."""
    spec = importlib.util.spec_from_file_location("tuning_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tuning_script", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LIMITS", FUSED)
    monkeypatch.setattr(module, "OTHERS", {"tile": (16,), "fused": (0, 64), "programs": ((2, 2),)})
    return module


def test_what_it_times(tuning, monkeypatch, capsys, tmp_path) -> None:
    """Both passes of each case; what divides the work as before is not timed again."""
    monkeypatch.setattr(tuning, "cases", lambda **_: ([SUMS, PLAIN], ["nothing"]))
    file = tmp_path / "tuning.json"
    words = ["--device", "cpu", "--seconds", "0.001", "--out", str(file)]
    monkeypatch.setattr(sys, "argv", ["tuning.py", *words])
    assert tuning.main() == 0
    found = json.loads(file.read_text())
    assert found["limits"] == json.loads(json.dumps(dataclasses.asdict(FUSED)))
    rows = found["rows"]
    assert [(r["layout"], r["pass"]) for r in rows] == [
        (layout, which) for layout in ("nchw", "channels_last") for which in ("forward", "backward")
    ]
    assert all(row["ratios"]["as they are"] == 1 < 1 + row["seconds"] for row in rows)
    assert {*rows[0]["ratios"]} == {"as they are", "tile 16", "fused 0", "programs (2, 2)"}
    out = capsys.readouterr().out
    assert "2 batch norms, 5 sets of sizes\nnothing\n" in out
    assert out.splitlines()[-2].startswith("fused 64")  # as many are merged as before
    assert "1.000 (1.00 to 1.00)" in out.splitlines()[-2]


def test_a_way_that_computes_something_else_is_refused(tuning) -> None:
    norm = tuning.Norm(SUMS, load("triton"))
    ways = {name: norm.passes(limits) for name, limits in tuning.tried(["tile"])}
    tuning.agree(norm, ways, 1e-5)
    ways["broken"] = {"forward": lambda: norm.y.zero_()}
    with pytest.raises(RuntimeError, match=r"with broken a result is 1\.0e"):
        tuning.agree(norm, ways, 1e-5)


def test_without_a_gpu_it_says_so() -> None:
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, SCRIPT], env=hidden, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: torch finds no CUDA device here\n")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--net", "resnet5"), "unknown network 'resnet5' (did you mean 'resnet50'?)"),
        (("--out", "nowhere/found.json"), "there is no folder nowhere; make it first"),
        (("--seconds", "nan"), "--seconds must be more than 0"),
    ],
)
def test_mistakes(words, text, tuning, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["tuning.py", "--device", "cpu", *words])
    with pytest.raises(SystemExit, match=r"^2$"):
        tuning.main()
    assert text in capsys.readouterr().err
