"""Running commands: in this process, or as a program that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from evenkeel.cli import main

Said = tuple[int, str, str]
"""Exit code, output, errors."""


@pytest.fixture
def command(capsys, monkeypatch, tmp_path) -> Callable[..., Said]:
    """Runs a command here, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["evenkeel", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def start(tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a command as a program of its own, in the same folder."""
    running: list[subprocess.Popen[str]] = []

    def run(*words: str | Path, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
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
                preexec_fn=before,
            )
        )
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.communicate()
