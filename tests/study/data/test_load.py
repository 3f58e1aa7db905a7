"""Choosing a data set by name."""

import subprocess
import sys
from pathlib import Path

import pytest

from evenkeel.errors import ConfigError
from evenkeel.study.data import NAMES, load

HEAVY = ("PIL", "pooch", "requests", "sklearn", "rich")


def test_the_names() -> None:
    assert NAMES == ("digits", "mnist", "fashion-mnist", "cifar10", "idx", "folder")


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("mnsit", {}, "unknown data set 'mnsit'; choose one of digits, mnist, fashion-mnist"),
        ("idx", {}, "'idx' needs the folder .* give --data-dir"),
        ("folder", {}, "'folder' needs the folder"),
        ("digits", {"folder": Path("x")}, "'digits' has no files, but got the folder x"),
        ("mnist", {"image_size": 32}, "image_size=32 is for 'folder' only; 'mnist'"),
        ("folder", {"image_size": 0}, "image_size=0 must be at least 1"),
    ],
)
def test_wishes_that_cannot_be_met(name: str, options: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load(name, **options)


def _loaded(code: str) -> set[str]:
    """Which of the heavy libraries a piece of code imports, in a fresh interpreter."""
    code += f"; import sys; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_import_is_lean() -> None:
    assert _loaded("import evenkeel.study.data") == set()
    assert "PIL" in _loaded("import evenkeel.study.data.folder")
