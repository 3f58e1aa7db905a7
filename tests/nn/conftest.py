"""Fixtures of packed convolutions."""

from __future__ import annotations

import pytest

from evenkeel.nn import ways


@pytest.fixture(params=["oneDNN for all", "as it decides"])
def limits(request, monkeypatch):
    """The limits as they are, and such that nothing is too small for oneDNN."""
    if request.param == "oneDNN for all":
        monkeypatch.setattr(ways, "SMALL", 0)
        monkeypatch.setattr(ways, "DENSE", 0)


@pytest.fixture
def reordering(monkeypatch):
    monkeypatch.setattr(ways, "SMALL", 0)
    monkeypatch.setattr(ways, "DENSE", 0)
