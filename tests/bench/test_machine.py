"""What a benchmark ran on, and its allocator."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from evenkeel.bench import machine as machines
from evenkeel.bench.machine import KEEP, allocator, caches, environment_for, machine, run_again

GLIBC = platform.libc_ver()[0] == "glibc"
glibc_only = pytest.mark.skipif(not GLIBC, reason="glibc's allocator is not used here")


@pytest.fixture
def untuned(monkeypatch):
    for key in machines._tuned(os.environ):
        monkeypatch.delenv(key)


def test_machine_is_plain_data():
    found = machine()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    assert platform.node() not in found.values()


def test_files_that_are_not_there(monkeypatch):
    monkeypatch.setattr(machines, "_read", lambda path: None)
    found = machine()
    assert found["cpu"]
    assert (found["memory_gib"], found["features"], caches()) == (None, [], {})


@glibc_only
class TestAllocator:
    def test_settings(self, untuned):
        assert allocator() == allocator({}) == "default"
        assert allocator(KEEP) == "keep"
        assert allocator({"MALLOC_ARENA_MAX": "1"}) == "own"
        assert allocator(KEEP | {"LD_PRELOAD": "libjemalloc.so"}) == "own"

    def test_environment(self, untuned, monkeypatch):
        assert environment_for("default") is None
        assert environment_for("keep").items() > KEEP.items()
        for key, value in KEEP.items():
            monkeypatch.setenv(key, value)
        assert environment_for("keep") is None
        assert not environment_for("default").keys() & KEEP.keys()
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
        assert environment_for("keep") is environment_for("default") is None

    def test_keep_spares_page_faults(self, untuned):
        program = (
            "import resource, torch\n"
            "def run(n):\n"
            "    for _ in range(n): torch.zeros(1 << 24)\n"
            "run(20)\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "run(5)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        )

        def faults(environment: dict[str, str]) -> int:
            done = subprocess.run(
                [sys.executable, "-c", program], env=environment, capture_output=True, text=True
            )
            return int(done.stdout)

        default, keep = faults(dict(os.environ)), faults(os.environ | KEEP)
        assert keep < default / 4


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocator(KEEP) == "system"
    assert environment_for("keep") is environment_for("default") is None


def test_run_again(tmp_path):
    environment = os.environ | {"COLUMNS": "80"}
    assert run_again(["--version"], environment) == 0
    assert run_again(["no-such-command"], environment) == 2
