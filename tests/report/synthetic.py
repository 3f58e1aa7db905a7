"""Studies without training: plans, and trials that look like a study's, from given levels."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from evenkeel.report.build import Report, build
from evenkeel.study.arms import Arm, Plan
from evenkeel.study.trial import Trial

PLAIN = Arm("plain", learning_rate=0.02)
BEFORE = replace(PLAIN, name="before", placement="before-activation")
AFTER = replace(PLAIN, name="after", placement="after-activation")
LAYER = replace(BEFORE, name="layer norm", statistics="layer")
NO_AFFINE = replace(BEFORE, name="no gamma", affine=False)
SIGMOID = replace(PLAIN, name="sigmoid", activation="sigmoid")
SIGMOID_BEFORE = replace(SIGMOID, name="sigmoid, before", placement="before-activation")
FAST = replace(PLAIN, name="plain, lr 0.2", learning_rate=0.2)
FAST_BEFORE = replace(BEFORE, name="before, lr 0.2", learning_rate=0.2)
TINY = replace(PLAIN, name="plain, batch 2", batch_size=2, learning_rate=0.00125, steps=400)
ARMS = (PLAIN, BEFORE, AFTER, LAYER, NO_AFFINE, SIGMOID, SIGMOID_BEFORE, FAST, FAST_BEFORE, TINY)

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1> '\"&"


@dataclass(frozen=True)
class Level:
    """How an arm does: its mean final accuracy, how fast, and how its trials end."""

    final: float = 0.98
    half: float = 20.0
    spread: float = 0.003
    status: str = "ok"
    error: str = ""


LEVELS = {
    "plain": Level(0.95, 60.0, 0.006),
    "before": Level(0.985),
    "after": Level(0.984),
    "layer norm": Level(0.975, 35.0),
    "sigmoid": Level(0.3, 80.0),
    "sigmoid, before": Level(0.96, 40.0),
    "plain, lr 0.2": Level(0.1, status="diverged"),
    "plain, batch 2": Level(0.8, 200.0),
}


def plan_of(*arms: Arm, seeds: int = 4, **more: Any) -> Plan:
    """A plan of some arms, all of `ARMS` by default."""
    return Plan("made", arms or ARMS, seeds=seeds, steps=100, points=6, target=0.9, **more)


def trial(plan: Plan, arm: Arm, seed: int, level: Level | None = None) -> Trial:
    """One trial at a level; equal arguments give equal trials."""
    level = level or LEVELS.get(arm.name, Level())
    common = {"key": plan.key(arm), "arm": arm.name, "seed": seed, "status": level.status}
    if level.status == "failed":
        return Trial(**common, error=level.error or "RuntimeError: made to fail")
    draw = random.Random(f"{arm.name} {seed}")
    final = min(1.0, max(0.0, level.final + draw.gauss(0, level.spread)))
    total = plan.steps_of(arm)
    steps = tuple(
        dict.fromkeys(math.ceil(total * ((i + 1) / plan.points) ** 2) for i in range(plan.points))
    )
    grown = [1 - math.exp(-step / level.half) for step in steps]
    accuracy = [0.1 + (final - 0.1) * share for share in grown]
    diverged = level.status == "diverged"
    return Trial(
        **common,
        steps=steps,
        accuracy=(*accuracy[:-1], final),
        train_loss=(
            *(2.3 * (1 - 0.99 * share) for share in grown[:-1]),
            math.nan if diverged else 0.02,
        ),
        final=final,
        percentiles=tuple((-share - 0.1, share / 4, share + 0.1) for share in grown),
        inference={} if diverged or not arm.has_norm else _inference(arm, final),
        seconds=1.25,
        provenance={"evenkeel": "0.1.0", "torch": "2.13.0", "when": "2026-01-02T03:04:05Z"},
    )


def _inference(arm: Arm, final: float) -> dict[str, Any]:
    folds = arm.placement == "before-activation" and arm.statistics == "spatial"
    names = ["conv1", "conv2", "fc1"]
    left = [] if folds else [[name, "its input comes from 'relu1'"] for name in names]
    return {
        "running": final,
        "batch": min(1.0, final + 0.001),
        "skipped": 0.4,
        "folded": final,
        "fold": {
            "folded": [[name, name] for name in names] if folds else [],
            "left": left,
            "difference": 3.2e-6 if folds else 0.0,
            "scale": 8.0,
        },
    }


def trials_of(plan: Plan, levels: Mapping[str, Level] | None = None) -> list[Trial]:
    """All trials of a plan; arms named in ``levels`` at those, the others as usual."""
    given = levels or {}
    return [trial(plan, arm, seed, given.get(arm.name)) for arm, seed in plan.trials]


def report_of(*arms: Arm, levels: Mapping[str, Level] | None = None, **more: Any) -> Report:
    """The report of a finished study of some arms."""
    plan = plan_of(*arms, **more)
    return build(plan, trials_of(plan, levels))
