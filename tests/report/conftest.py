"""Reports that several tests look at; made once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evenkeel.report.build import Report, build
from evenkeel.report.page import render

from .synthetic import (
    ARMS,
    BEFORE,
    HOSTILE,
    PLAIN,
    Level,
    plan_of,
    report_of,
    trials_of,
)


@pytest.fixture(scope="session")
def whole() -> Report:
    """A finished study with an arm for every figure and a diverged one."""
    return report_of()


@pytest.fixture(scope="session")
def page(whole: Report) -> str:
    return render(whole)


@pytest.fixture(scope="session")
def hostile() -> Report:
    """A study whose arms and errors try to break out of the page."""
    arms = (
        replace(PLAIN, name=HOSTILE),
        replace(BEFORE, name="<b>bold</b> & <!--<script>"),
        replace(BEFORE, name="%{x} @c1 $x$", learning_rate=0.2),
        replace(PLAIN, name="x" * 300, learning_rate=0.2),
    )
    error = f"Traceback:\n  {HOSTILE}\nValueError: {HOSTILE}"
    return report_of(*arms, levels={"x" * 300: Level(status="failed", error=error)})


@pytest.fixture(scope="session")
def unfinished() -> Report:
    """The first five of 40 trials."""
    plan = plan_of(*ARMS)
    return build(plan, trials_of(plan)[:5])


@pytest.fixture(scope="session")
def failed() -> Report:
    """A study of which every trial failed."""
    broken = Level(status="failed", error="Traceback\nRuntimeError: out of luck")
    return report_of(PLAIN, BEFORE, levels={"plain": broken, "before": broken})


@pytest.fixture(scope="session")
def one_arm() -> Report:
    return report_of(BEFORE)


@pytest.fixture(scope="session")
def no_norms() -> Report:
    return report_of(PLAIN, replace(PLAIN, name="slow", learning_rate=0.001))


@pytest.fixture(scope="session")
def empty() -> Report:
    """A study of which no trial is done."""
    return build(plan_of(), [])
