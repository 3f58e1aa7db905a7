"""``evenkeel doctor``: every finding, and backends that fail."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from evenkeel import allocator
from evenkeel.bench.checkup import findings
from evenkeel.errors import BackendError
from evenkeel.kernels import select


@pytest.fixture
def healthy(monkeypatch):
    for key in allocator.variables(os.environ):
        monkeypatch.delenv(key)
    monkeypatch.delenv(allocator.SWITCH, raising=False)
    allocator.default_blocks()
    yield
    allocator.default_blocks()


@pytest.fixture
def backend(monkeypatch):
    """Puts one backend, or an error, where all of them are."""

    def install(found) -> None:
        def load(name):
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(select, "backends", lambda: ("fast",))
        monkeypatch.setattr(select, "load", load)

    return install


class Fast:
    """Runs float32 only."""

    def refuses(self, view, dtype, device):
        return None if dtype == torch.float32 else "there is no bfloat16 in it"


class Described(Fast):
    def describe(self) -> str:
        return "AVX-512, 2 threads"


def found() -> dict[str, object]:
    return {finding.topic: finding for finding in findings()}


def test_all_of_it(command, healthy):
    code, out, err = command("doctor")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert f"torch {torch.__version__}" in text
    assert "backend reference runs nchw float32, nchw bfloat16, channels_last float32" in text
    for topic in ("python", "evenkeel", "threads", "allocator", "CUDA", "C++ compiler"):
        assert topic in text


def test_what_a_backend_refuses(backend):
    backend(Fast())
    finding = found()["backend fast"]
    assert finding.is_good
    assert finding.text == (
        "runs nchw float32, channels_last float32; not nchw bfloat16, channels_last bfloat16: "
        "there is no bfloat16 in it"
    )


def test_what_a_backend_says_of_itself(backend):
    backend(Described())
    assert found()["backend fast"].text.startswith("AVX-512, 2 threads; runs nchw float32")


@pytest.mark.parametrize("error", [BackendError("not built"), ImportError("no .so"), OSError("x")])
def test_a_backend_that_cannot_be_loaded(backend, command, error):
    backend(error)
    finding = found()["backend fast"]
    assert finding.is_good is False
    assert finding.text == f"cannot be loaded ({type(error).__name__}): {error}"
    code, out, _ = command("doctor")
    assert code == 0
    assert str(error) in out


@pytest.mark.skipif(allocator.status().setting == "system", reason="there is no glibc here")
class TestAllocator:
    def test_default(self, healthy):
        finding = found()["allocator"]
        assert finding.is_good is None
        assert finding.text.startswith("glibc's default until train, evaluate, predict, study or")
        assert "evenkeel.allocator.keep_blocks()" in finding.remedy
        assert "export MALLOC_MMAP_MAX_=0 " in finding.remedy

    def test_kept_since_run_time(self, healthy):
        allocator.keep_blocks()
        finding = found()["allocator"]
        assert (finding.is_good, finding.remedy) == (True, "")
        assert finding.text.startswith("glibc keeps large blocks, set at run time")

    def test_kept_by_the_environment(self, healthy, monkeypatch):
        for key, value in allocator.KEEP.items():
            monkeypatch.setenv(key, value)
        finding = found()["allocator"]
        assert (finding.is_good, finding.remedy) == (True, "")
        assert finding.text == "glibc keeps large blocks, set by the environment"

    def test_turned_off(self, healthy, monkeypatch):
        monkeypatch.setenv(allocator.SWITCH, "default")
        finding = found()["allocator"]
        assert finding.is_good is False
        assert "as EVENKEEL_ALLOCATOR=default asks; large blocks go back" in finding.text
        assert finding.remedy == "unset EVENKEEL_ALLOCATOR"

    def test_the_users_own(self, healthy, monkeypatch):
        monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
        finding = found()["allocator"]
        assert (finding.is_good, finding.remedy) == (None, "")
        assert "set up by you, in the environment (MALLOC_ARENA_MAX)" in finding.text


def test_no_glibc(monkeypatch):
    def fails(name):
        raise OSError("libc.so.6: cannot open shared object file")

    monkeypatch.setattr(allocator.ctypes, "CDLL", fails)
    finding = found()["allocator"]
    assert finding.remedy == ""
    assert "not glibc's" in finding.text


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    finding = found()["C++ compiler"]
    assert finding.is_good is False
    assert "CXX" in finding.remedy


def test_too_many_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    finding = found()["threads"]
    assert (finding.text, finding.remedy) == (
        "torch computes with 64 on 2 cores",
        "torch.set_num_threads(2)",
    )
