"""cuDNN on the host, in the place of the real one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from evenkeel.cudnn import extended, plain
from evenkeel.cudnn.place import Place
from evenkeel.kernels import cudnn as backend
from evenkeel.kernels.cudnn_api import calls

from .fake import Fake


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """The binding on the fake, with tensors on the CPU."""
    host = Fake()
    library = host.library()

    @contextmanager
    def ready(*_: object) -> Iterator[int]:
        yield 1

    monkeypatch.setattr(calls, "library", lambda: library)
    monkeypatch.setattr(calls, "ready", ready)
    monkeypatch.setattr(backend, "library", lambda: library)
    return host


@pytest.fixture
def on_fake(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """And the face too."""
    for module in (plain, extended):
        monkeypatch.setattr(module, "place_of", lambda x: Place(True, "the fake"))
    return fake
