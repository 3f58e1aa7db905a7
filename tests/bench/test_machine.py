"""What a benchmark ran on."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata

import torch

from evenkeel import allocator
from evenkeel.bench import machine as machines
from evenkeel.bench.machine import caches, machine


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


def test_the_version_of_triton_by_any_name(monkeypatch):
    names = {"pytorch-triton": "3.6.0+git"}

    def version(name):
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return names[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(machines, "find_spec", lambda name: name)
    assert machines._triton() == "3.6.0+git"
    names["triton"] = "3.7.1"
    assert machines._triton() == "3.7.1"
    names.clear()
    assert machines._triton() == "of unknown version"
    monkeypatch.setattr(machines, "find_spec", lambda name: None)
    assert machines._triton() is None


def test_the_allocator_in_force(monkeypatch):
    for key in allocator.variables(os.environ):
        monkeypatch.delenv(key)
    allocator.default_blocks()
    assert machine()["allocator"] in ("default", "system")
    assert allocator.keep_blocks().setting == machine()["allocator"]
    allocator.default_blocks()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert machine()["allocator"] in ("own", "system")
    assert machine()["allocator_variables"]["MALLOC_ARENA_MAX"] == "2"
