"""Studies with a known truth: trials of exactly these accuracies, targets reached exactly there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from evenkeel.report.numbers import Comparison, comparison
from evenkeel.study.arms import Arm, Plan
from evenkeel.study.trial import Trial

STEPS = (10, 20, 40, 60, 80, 100)
NONE = Arm("plain")
BEFORE = replace(NONE, name="before", placement="before-activation")
AFTER = replace(NONE, name="after", placement="after-activation")


def plan_of(*arms: Arm, seeds: int = 4, **more: Any) -> Plan:
    settings = {"steps": 100, "points": len(STEPS), "target": 0.9, **more}
    return Plan("made", arms or (NONE, BEFORE, AFTER), seeds=seeds, **settings)


def made(plan: Plan, arm: Arm | str, seed: int, final: float = 0.95, **more: Any) -> Trial:
    """A trial that ends at ``final`` and reaches the target at the step ``reach`` (None: never)."""
    if isinstance(arm, str):
        arm = next(a for a in plan.arms if a.name == arm)
    reach = more.pop("reach", 40)
    accuracy = tuple(0.92 if reach is not None and step >= reach else 0.2 for step in STEPS)
    values = {
        "status": "ok",
        "steps": STEPS,
        "accuracy": accuracy,
        "train_loss": tuple(1 / (1 + step) + seed for step in STEPS),
        "final": final,
        "percentiles": tuple((-step / 10, 0.0, step / 5 + seed) for step in STEPS),
        "seconds": 1.5,
        "provenance": {"torch": "2.13", "when": "2026-01-02T03:04:05Z"},
    }
    return Trial(plan.key(arm), arm.name, seed, **(values | more))


def failed(plan: Plan, arm: str, seed: int) -> Trial:
    found = next(a for a in plan.arms if a.name == arm)
    return Trial(plan.key(found), arm, seed, "failed", error="Traceback\nRuntimeError: no luck")


def study(
    plan: Plan,
    finals: Mapping[str, Sequence[float]],
    reach: Mapping[str, Sequence[int | None]] | None = None,
) -> list[Trial]:
    """One trial for each accuracy, the seeds from 0 on."""
    steps = reach or {}
    return [
        made(plan, name, seed, final, reach=steps.get(name, [40] * len(values))[seed])
        for name, values in finals.items()
        for seed, final in enumerate(values)
    ]


def compared(
    a: Sequence[float], b: Sequence[float], logs: Sequence[float] = (), **more: Any
) -> Comparison:
    return comparison("a", "b", list(zip(a, b, strict=True)), logs, **more)


def assert_readable(text: str) -> None:
    """A sentence for people: ends with a period, no trace of a number that is none."""
    assert text.endswith("."), text
    assert text[0].isupper(), text
    assert not re.search(r"\b(nan|inf|None|True|False)\b|[{}\[\]]|  |\.\.", text), text
