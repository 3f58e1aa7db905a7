"""Settings that every test shares."""

import sys

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of users are imported from the folder at hand; no test leaves its own behind."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the GPU tests, hundreds of them, where there is no GPU to see them."""
    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        items[:] = [item for item in items if item not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)
        config.stash[_LEFT_OUT] = len(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says that they were left out, and why."""
    count = terminalreporter.config.stash.get(_LEFT_OUT, 0)
    if count:
        terminalreporter.line(f"{count} GPU tests were left out: there is no CUDA device here")


_LEFT_OUT = pytest.StashKey[int]()
