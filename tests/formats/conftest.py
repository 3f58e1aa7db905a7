"""Darknet's own files where there are any, and networks with numbers in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def darknets_files() -> Path:
    """The folder with what the Darknet program itself wrote and computed.

    EVENKEEL_DARKNET names it; it has mnist.cfg, .weights, .output.f32, and the like of heads.
    """
    named = os.environ.get("EVENKEEL_DARKNET")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "darknet"
    if not (folder / "mnist.weights").is_file():
        pytest.skip("no files of Darknet's here; EVENKEEL_DARKNET names their folder")
    return folder
