"""Running commands as a program that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


@pytest.fixture
def start(tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a command as a program of its own, in the same folder."""
    running: list[subprocess.Popen[str]] = []

    def run(*words: str | Path) -> subprocess.Popen[str]:
        program = "from evenkeel.cli import main; main()"
        argv: Sequence[str] = [sys.executable, "-u", "-c", program, *map(str, words)]
        running.append(
            subprocess.Popen(
                argv,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"},
            )
        )
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.communicate()
