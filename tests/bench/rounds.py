"""Fewer calls of what is timed, for tests of what is done with the times."""

from __future__ import annotations

import pytest

from evenkeel.bench import timing


def time_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of one call for each side, behind one to warm up; see test_timing for the rest."""
    for name in ("least", "most"):
        monkeypatch.setitem(timing.interleaved.__kwdefaults__, name, 1)
    for name in ("WARM_UP", "MOST_SETTLING", "MOST_CALLS"):
        monkeypatch.setattr(timing, name, 1)
