"""Settings that every test shares."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from evenkeel.cli import main

torch.set_num_threads(1)

# In the background of a shell, or under nohup, Ctrl-C is ignored, and by whatever is started there.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of users are imported from the folder at hand; no test leaves its own behind."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of instructions of the native kernels in turn; the best one again afterwards."""
    native = pytest.importorskip("evenkeel._native", reason="the native kernels are not built")
    try:
        native.use(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.use("best")


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the GPU tests, hundreds of them, where there is no GPU to see them."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        items[:] = [item for item in items if item not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)
        config.stash[_LEFT_OUT] = len(left_out)


@pytest.fixture(autouse=True)
def _device_is_alive(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends a worker whose GPU has met an illegal address: all that it would run fails then.

    pytest-xdist starts another one in its place.
    """
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" not in os.environ:
                raise
            print(f"this worker's GPU is lost: {error}", file=sys.stderr, flush=True)
            os._exit(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says that they were left out, and why."""
    count = terminalreporter.config.stash.get(_LEFT_OUT, 0)
    if count:
        terminalreporter.line(f"{count} GPU tests were left out: there is no CUDA device here")


_LEFT_OUT = pytest.StashKey[int]()
