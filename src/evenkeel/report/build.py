"""The whole report as numbers: what the page draws and ``--json`` prints."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..study.arms import Arm, Plan
from ..study.trial import Trial
from .answers import Answer, FourWays, answers, best_of, four_ways
from .numbers import (
    ArmSummary,
    Curve,
    Interval,
    as_family,
    compare_arms,
    curve,
    interval,
    summarize,
)
from .questions import differing_in
from .wording import Evidence, context, evidence

__all__ = ["Band", "Line", "Report", "Row", "build"]


@dataclass(frozen=True)
class Band:
    """15, 50 and 85 % of one hidden unit's input along the way, the mean over seeds."""

    arm: str
    steps: tuple[int, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """Final accuracy against one setting, all else equal: (value, accuracy, trials diverged)."""

    label: str
    points: tuple[tuple[float, Interval, int], ...]


@dataclass(frozen=True)
class Row:
    """One trial, for the table of all trials."""

    arm: str
    seed: int
    status: str
    accuracy: float | None
    steps_to_target: int | None
    loss: float | None
    seconds: float
    error: str


@dataclass(frozen=True)
class Report:
    """Everything that a study says.

    Attributes:
        name, data, target, seeds, steps: of the plan.
        finished, planned: how many trials there are and should be.
        lead: batch norm against none, in the usual place; None if the study has no such arms.
        answers: one for each question, numbered from 1.
        arms, curves, bands: one for each arm (a curve or band only where a trial has one).
        highlights: the arms that a figure shows at first.
        pair: an arm without and one with batch norm, else equal, whose bands to show side by side:
            with sigmoids if there are such, as in the paper's figure 1; None without two bands.
        rates, batches: accuracy against learning rate and against batch size.
        inference: the four ways of inference for each arm that has them.
        best: the arm of the inference answer, or None.
        rows: every trial.
        provenance: versions and devices, each with how many trials ran under it.
        recipes: what each arm is, by its name.
    """

    name: str
    data: str
    target: float
    seeds: int
    steps: int
    baseline: str
    finished: int
    planned: int
    lead: Evidence | None
    answers: tuple[Answer, ...]
    arms: tuple[ArmSummary, ...]
    curves: tuple[Curve, ...]
    bands: tuple[Band, ...]
    highlights: tuple[str, ...]
    pair: tuple[str, str] | None
    rates: tuple[Line, ...]
    batches: tuple[Line, ...]
    inference: tuple[FourWays, ...]
    best: str | None
    rows: tuple[Row, ...]
    provenance: tuple[tuple[str, str, int], ...]
    recipes: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values; what is not finite becomes None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def build(plan: Plan, trials: Sequence[Trial]) -> Report:
    """The report of a plan's finished trials."""
    curves = (curve(trials, arm.name) for arm in plan.arms)
    bands = [band for arm in plan.arms if (band := _band(trials, arm.name)) is not None]
    best = best_of(plan, trials)
    return Report(
        name=plan.name,
        data=plan.data.name,
        target=plan.target,
        seeds=plan.seeds,
        steps=plan.steps,
        baseline=plan.baseline,
        finished=len(trials),
        planned=len(plan.trials),
        lead=_lead(plan, trials),
        answers=tuple(answers(plan, trials)),
        arms=tuple(summarize(plan, trials)),
        curves=tuple(each for each in curves if each is not None),
        bands=tuple(bands),
        highlights=_highlights(plan),
        pair=_pair(plan, {band.arm for band in bands}),
        rates=_lines(plan, trials, "learning_rate"),
        batches=_lines(plan, trials, "batch_size"),
        inference=tuple(four_ways(plan, trials)),
        best=None if best is None else best.arm,
        rows=tuple(_row(plan, trial) for trial in trials),
        provenance=_provenance(trials),
        recipes={arm.name: arm.recipe() | {"steps": plan.steps_of(arm)} for arm in plan.arms},
    )


def _lead(plan: Plan, trials: Sequence[Trial]) -> Evidence | None:
    pairs = differing_in(plan, "placement", "before-activation", "none")
    pair = next((p for p in pairs if p[1].name == plan.baseline), None) or next(iter(pairs), None)
    found = None if pair is None else compare_arms(plan, trials, *pair)
    if found is None or pair is None:
        return None
    where = context(*pair, plan.baseline_arm, name_activation=False)
    words = ("batch norm before the activation", "the same net without it")
    return evidence(as_family([found])[0], *words, where, plan.target)


def _highlights(plan: Plan) -> tuple[str, ...]:
    """The baseline and the arms that differ from it in placement alone."""
    base = plan.baseline_arm
    near = [a for a in plan.arms if set(a.difference(base)) <= {"placement"}]
    return tuple(arm.name for arm in near[:6])


def _pair(plan: Plan, drawn: set[str]) -> tuple[str, str] | None:
    """Without and with batch norm: sigmoids first, then the baseline, then the usual place."""
    places = {arm.placement for arm in plan.arms} - {"none"}
    found = [
        (a, b)
        for place in places
        for a, b in differing_in(plan, "placement", "none", place)
        if {a.name, b.name} <= drawn
    ]

    def rank(pair: tuple[Arm, Arm]) -> tuple[object, ...]:
        a, b = pair
        usual = b.placement != "before-activation"
        based = plan.baseline not in (a.name, b.name)
        return a.activation != "sigmoid", based, usual, a.name, b.name

    best = min(found, key=rank, default=None)
    return None if best is None else (best[0].name, best[1].name)


def _band(trials: Sequence[Trial], name: str) -> Band | None:
    own = [t for t in trials if t.arm == name and t.status == "ok" and t.percentiles]
    if not own:
        return None
    columns = zip(*(trial.percentiles for trial in own), strict=True)
    means = [[sum(v) / len(own) for v in zip(*rows, strict=True)] for rows in columns]
    low, middle, high = zip(*means, strict=True)
    return Band(name, own[0].steps, tuple(low), tuple(middle), tuple(high))


def _lines(plan: Plan, trials: Sequence[Trial], key: str) -> tuple[Line, ...]:
    """Arms that differ in ``key`` alone (and what must go with it), as lines of two points or more.

    With the batch size go the learning rate, scaled, and the steps.
    """
    along = {"learning_rate", "steps"} if key == "batch_size" else set[str]()
    groups: dict[str, list[Arm]] = {}
    for arm in plan.arms:
        recipe = arm.recipe()
        if key == "batch_size":
            recipe["per sample"] = round(arm.learning_rate / arm.batch_size, 12)
        else:
            recipe["steps"] = plan.steps_of(arm)
        same = {k: v for k, v in recipe.items() if k != key and k not in along}
        groups.setdefault(repr(sorted(same.items(), key=str)), []).append(arm)
    lines: list[Line] = []
    for arms in groups.values():
        points = [_point(trials, arm, float(getattr(arm, key))) for arm in arms]
        known = sorted((p for p in points if p is not None), key=lambda p: p[0])
        if len(known) > 1:
            lines.append(Line(_label([arm.name for arm in arms]), tuple(known)))
    return tuple(lines)


def _label(names: Sequence[str]) -> str:
    """What names have in common: 'plain' of 'plain' and 'plain, lr 0.2'."""
    shortest = min(names, key=len)
    if all(name.startswith(shortest) for name in names):
        return shortest
    return shortest.rpartition(",")[0] or shortest


def _point(trials: Sequence[Trial], arm: Arm, value: float) -> tuple[float, Interval, int] | None:
    own = [t for t in trials if t.arm == arm.name]
    finals = [t.final for t in own if t.final is not None]
    if not finals:
        return None
    return value, interval(finals), sum(t.status == "diverged" for t in own)


def _row(plan: Plan, trial: Trial) -> Row:
    return Row(
        arm=trial.arm,
        seed=trial.seed,
        status=trial.status,
        accuracy=trial.final,
        steps_to_target=trial.steps_to(plan.target),
        loss=trial.train_loss[-1] if trial.train_loss else None,
        seconds=trial.seconds,
        error=trial.error,
    )


def _provenance(trials: Sequence[Trial]) -> tuple[tuple[str, str, int], ...]:
    keys = ("evenkeel", "torch", "python", "device", "threads", "data")
    counts = Counter(
        (key, str(trial.provenance[key]))
        for trial in trials
        for key in keys
        if key in trial.provenance
    )
    days = Counter(str(t.provenance["when"])[:10] for t in trials if "when" in t.provenance)
    found = [(key, value, count) for (key, value), count in counts.items()]
    return (*found, *(("day", day, count) for day, count in days.items()))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
