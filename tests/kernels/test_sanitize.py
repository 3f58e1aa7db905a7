"""The native kernels below Python: a small run of native/check under its sanitizers.

`make sanitize` runs more cases of every storage type on every instruction set, and threads as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from filelock import FileLock

CHECK = Path(__file__).parents[2] / "native" / "check"
USED = "avx2" if torch.backends.cpu.get_cpu_capability().startswith("AVX") else "baseline"
BUILT = {"baseline": "", "avx2": "", "avx512": ""} | {USED: "f32"}
"""One type on one instruction set compiles in seconds, all of them in minutes."""

PROBE = """
#include <memory>
int main(int count, char**) { std::unique_ptr<int[]> p(new int[2]); return p[count] * 0; }
"""


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], capture_output=True, text=True)


def reason_to_skip(folder: Path) -> str | None:
    """What is missing for a build with sanitizers, or None."""
    if not (CHECK / "CMakeLists.txt").exists():
        return "the C++ sources are not here: this is no source tree"
    if shutil.which("cmake") is None:
        return "there is no cmake on the path"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or shutil.which(compiler) is None:
        return "there is no C++ compiler on the path (CXX, c++ or g++)"
    probe = folder / "probe.cpp"
    probe.write_text(PROBE)
    sanitized = ("-std=c++20", "-fsanitize=address,undefined")
    done = run(compiler, *sanitized, probe, "-o", folder / "probe")
    if done.returncode == 0:
        done = run(folder / "probe")
    if done.returncode != 0:
        return f"{compiler} makes no program with sanitizers that runs here: {done.stderr[:200]}"
    return None


@pytest.fixture(scope="module")
def check(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """evenkeel_check with AddressSanitizer and UndefinedBehaviorSanitizer."""
    reason = reason_to_skip(tmp_path_factory.mktemp("probe"))
    if reason is not None:
        pytest.skip(reason)
    cache = request.config.cache  # there, the next run builds only what has changed
    folder = cache.mkdir("native-check") if cache else tmp_path_factory.mktemp("native-check")
    types = [f"-DTYPES_{instructions}={types}" for instructions, types in BUILT.items()]
    with FileLock(folder / "lock"):  # all workers of a run share the folder
        configured = run(
            "cmake", "-S", CHECK, "-B", folder, "-DSANITIZE=address", "-DFEWER_LOOPS=ON", *types
        )
        assert configured.returncode == 0, configured.stderr
        built = run("cmake", "--build", folder, "--parallel", "2")
        assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return folder / "evenkeel_check"


def test_the_kernels_are_right_and_stay_within_their_tensors(check: Path) -> None:
    done = run(check, "--cases", "40")
    assert done.returncode == 0, done.stderr[-5000:]
    assert f"cases right: {USED} f32" in done.stdout
    assert "own threads" in done.stdout


MISTAKES = {
    "mean": "mean[0] is",
    "m2": "m2[0] is",
    "y": "WRONG: y[",
    "sum": "sum_dz[0] is",
    "dx": "WRONG: dx[",
    "dresidual": "WRONG: dresidual[",
    "address": "m2 has other bits at other addresses",
    "before": "",  # AddressSanitizer, a signal or the bytes beside
    "behind": "",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(check: Path, mistake: str) -> None:
    """A program that finds nothing has found nothing only if it can find something."""
    done = run(check, "--cases", "60", "--mistake", mistake)
    assert done.returncode != 0, f"a mistake in {mistake} was not seen"
    assert MISTAKES[mistake] in done.stderr
    assert "IN evenkeel_check --seed 1 --case" in done.stderr


def test_a_case_runs_again_alone(check: Path) -> None:
    done = run(check, "--cases", "60", "--mistake", "y")
    number = done.stderr.split("--case ")[1].split(":")[0]
    again = run(check, "--seed", "1", "--case", number, "--mistake", "y")
    assert again.returncode == 1
    assert again.stderr == done.stderr


def test_unknown_words_are_refused(check: Path) -> None:
    for words in (["--case"], ["--casess", "3"], ["--seed", "x"], ["--mistake", "none of these"]):
        done = run(check, *words)
        assert done.returncode == 2
        assert "evenkeel_check [--cases N]" in done.stderr
