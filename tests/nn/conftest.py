"""Fixtures of packed convolutions."""

from __future__ import annotations

import pytest

from evenkeel.nn import ways


def _by_onednn(monkeypatch):
    """Every convolution that oneDNN can compute is computed by it."""
    monkeypatch.setattr(ways, "SMALL", 0)
    monkeypatch.setattr(ways, "LARGE", 0)
    monkeypatch.setattr(ways, "FEW", 1 << 40)
    monkeypatch.setattr(ways, "_is_depthwise", lambda conv: False)


@pytest.fixture(params=["oneDNN for all", "as it decides"])
def limits(request, monkeypatch):
    """The choice as it is, and oneDNN for all."""
    if request.param == "oneDNN for all":
        _by_onednn(monkeypatch)


@pytest.fixture
def reordering(monkeypatch):
    _by_onednn(monkeypatch)
