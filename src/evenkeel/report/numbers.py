"""Numbers of a study: one summary for each arm, and comparisons of arms on matched seeds.

Intervals are 95 % bootstrap intervals of the mean over seeds (percentile method, 10,000 resamples,
fixed generator); p-values are of paired t tests, corrected by Holm within each family of
comparisons. A steps-to-target that was not reached counts as the whole budget; where that would
make an arm look faster than it is, speed is not compared, so ratios of steps are conservative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from ..study.arms import Arm, Plan
from ..study.trial import Trial

__all__ = [
    "ALIKE",
    "LEVEL",
    "ArmSummary",
    "Comparison",
    "Curve",
    "Interval",
    "Pair",
    "as_family",
    "compare",
    "compare_arms",
    "comparison",
    "corrected",
    "curve",
    "interval",
    "summarize",
]

RESAMPLES = 10_000
LEVEL = 0.05
"""Below this a corrected p-value counts as a difference."""
ALIKE = 0.005
"""Arms whose accuracies differ by less than this are called alike: half a point."""
_SAME = 1e-9
"""Differences this close to each other are equal but for rounding."""

Pair = tuple[Arm, Arm]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; the interval is None below two values."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds.

    Attributes:
        trials, diverged, failed: how many there are; a failed trial has no accuracy.
        accuracy: final test accuracy.
        reached: how many trials reached the target.
        steps: steps to the target, those that never got there counted as the whole budget.
        against: the comparison with the baseline (None for the baseline itself).
    """

    name: str
    trials: int
    diverged: int
    failed: int
    accuracy: Interval | None
    reached: int
    steps: Interval | None
    budget: int
    against: Comparison | None


@dataclass(frozen=True)
class Comparison:
    """Arm ``a`` minus arm ``b`` on the seeds that both have.

    Attributes:
        accuracy: difference of final accuracy.
        p, p_corrected: of no difference in accuracy; the second within its family.
        p_alike, p_alike_corrected: of a difference of `ALIKE` or more, by two one-sided t tests.
        speed: how many times as many steps ``b`` needs to reach the target as ``a``; None if
            neither ever does, if their budgets differ, or if the faster one missed it with a seed
            with which the slower one did not.
        censored: whether some trial never reached it.
        speed_p, speed_p_corrected: of no difference in speed.
        identical: every trial of ``a`` has the very numbers of that of ``b``.
        spread: standard deviation of the accuracy difference.
        family: how many p-values were corrected together.
    """

    a: str
    b: str
    seeds: int
    accuracy: Interval
    p: float
    p_corrected: float
    p_alike: float
    p_alike_corrected: float
    speed: Interval | None
    censored: bool
    speed_p: float | None
    speed_p_corrected: float | None
    identical: bool
    spread: float
    family: int = 1

    @property
    def differs(self) -> bool:
        """Whether the accuracies are known to differ."""
        return self.p_corrected < LEVEL

    @property
    def differs_in_speed(self) -> bool:
        """Whether the steps to the target are known to differ."""
        return self.speed_p_corrected is not None and self.speed_p_corrected < LEVEL

    @property
    def is_alike(self) -> bool:
        """Whether the accuracies are known to differ by less than `ALIKE`."""
        return self.p_alike_corrected < LEVEL

    def seeds_to_tell(self) -> int | None:
        """Seeds with which a true difference of this size would show up four times out of five.

        From the usual power formula at the 5 % level shared out among the family, which is the
        strictest that Holm's correction can be.
        """
        if abs(self.accuracy.mean) < _SAME:
            return None
        quantiles = float(stats.norm.isf(0.025 / self.family) + stats.norm.isf(0.2))
        needed = math.ceil((quantiles * self.spread / self.accuracy.mean) ** 2) + 1
        return max(needed, 6) if self.spread < _SAME else needed


@dataclass(frozen=True)
class Curve:
    """Test accuracy along the way: the mean over seeds and its interval at each point."""

    arm: str
    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def summarize(plan: Plan, trials: Sequence[Trial]) -> list[ArmSummary]:
    """One summary for each arm, in the plan's order."""
    baseline = plan.baseline_arm
    others = [arm for arm in plan.arms if arm is not baseline]
    against = compare(plan, trials, [(arm, baseline) for arm in others])
    by_name = {comparison.a: comparison for comparison in against}
    found: list[ArmSummary] = []
    for arm in plan.arms:
        own = [trial for trial in trials if trial.arm == arm.name]
        usable = _usable(own)
        finals = [trial.final for trial in usable if trial.final is not None]
        budget = plan.steps_of(arm)
        steps = [trial.steps_to(plan.target) for trial in usable]
        found.append(
            ArmSummary(
                name=arm.name,
                trials=len(own),
                diverged=sum(trial.status == "diverged" for trial in own),
                failed=sum(trial.status == "failed" for trial in own),
                accuracy=interval(finals) if finals else None,
                reached=sum(step is not None for step in steps),
                steps=interval([budget if s is None else s for s in steps]) if steps else None,
                budget=budget,
                against=by_name.get(arm.name),
            )
        )
    return found


def compare(plan: Plan, trials: Sequence[Trial], pairs: Sequence[Pair]) -> list[Comparison]:
    """Comparisons, corrected; pairs without two common seeds are left out."""
    found = (compare_arms(plan, trials, a, b) for a, b in pairs)
    return as_family([each for each in found if each is not None], jointly=False)


def compare_arms(plan: Plan, trials: Sequence[Trial], a: Arm, b: Arm) -> Comparison | None:
    """Arm a against arm b, not corrected; None without two common seeds."""
    first = {t.seed: t for t in _usable(trials) if t.arm == a.name}
    second = {t.seed: t for t in _usable(trials) if t.arm == b.name}
    pairs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    if len(pairs) < 2:
        return None
    budget = plan.steps_of(a)
    reached = [(x.steps_to(plan.target), y.steps_to(plan.target)) for x, y in pairs]
    censored = any(step is None for pair in reached for step in pair)
    logs: list[float] = []
    if budget == plan.steps_of(b) and any(s is not None for pair in reached for s in pair):
        logs = [math.log((y or budget) / (x or budget)) for x, y in reached]
        faster = 0 if sum(logs) > 0 else 1
        if any(pair[faster] is None and pair[1 - faster] is not None for pair in reached):
            logs = []
    return comparison(
        a.name,
        b.name,
        [(float(x.final or 0), float(y.final or 0)) for x, y in pairs],
        logs,
        censored=censored,
        identical=all(_numbers(x) == _numbers(y) for x, y in pairs),
    )


def comparison(
    a: str,
    b: str,
    pairs: Sequence[tuple[float, float]],
    log_ratios: Sequence[float] = (),
    *,
    censored: bool = False,
    identical: bool = False,
) -> Comparison:
    """A comparison of paired accuracies and, where given, of the logs of steps(b) / steps(a)."""
    difference = [x - y for x, y in pairs]
    return Comparison(
        a=a,
        b=b,
        seeds=len(pairs),
        accuracy=interval(difference),
        p=_paired_p(difference),
        p_corrected=1.0,
        p_alike=_equivalence_p(difference),
        p_alike_corrected=1.0,
        censored=censored,
        speed=_exponential(interval(log_ratios)) if log_ratios else None,
        speed_p=_paired_p(log_ratios) if log_ratios else None,
        speed_p_corrected=None,
        identical=identical,
        spread=float(np.std(difference, ddof=1)),
    )


def as_family(comparisons: Sequence[Comparison], *, jointly: bool = True) -> list[Comparison]:
    """The comparisons with Holm's correction.

    Differences in accuracy and in speed are one family if a claim may rest on either (jointly),
    else one each. Claims that arms are alike are a family of their own.
    """
    accuracy = [c.p for c in comparisons]
    speed = [c.speed_p for c in comparisons if c.speed_p is not None]
    if jointly:
        both = corrected([*accuracy, *speed])
        accuracy, speed = both[: len(accuracy)], both[len(accuracy) :]
    else:
        accuracy, speed = corrected(accuracy), corrected(speed)
    alike = corrected([c.p_alike for c in comparisons])
    of_speed = iter(speed)
    family = len(accuracy) + (len(speed) if jointly else 0)
    return [
        replace(
            each,
            p_corrected=accuracy[place],
            p_alike_corrected=alike[place],
            speed_p_corrected=None if each.speed_p is None else next(of_speed),
            family=family,
        )
        for place, each in enumerate(comparisons)
    ]


def curve(trials: Sequence[Trial], arm: str) -> Curve | None:
    """The arm's accuracy curve, or None without a trial that ended well."""
    own = [trial for trial in trials if trial.arm == arm and trial.status == "ok"]
    if not own:
        return None
    steps = own[0].steps
    rows = np.array([trial.accuracy for trial in own])
    intervals = [interval(list(column)) for column in rows.T]
    return Curve(
        arm,
        steps,
        tuple(i.mean for i in intervals),
        tuple(i.mean if i.low is None else i.low for i in intervals),
        tuple(i.mean if i.high is None else i.high for i in intervals),
    )


def interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % bootstrap interval."""
    sample = np.asarray(values, dtype=float)
    mean = float(sample.mean())
    if len(sample) < 2:
        return Interval(mean)
    if np.ptp(sample) < _SAME:
        return Interval(mean, mean, mean)
    found = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def corrected(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): the chance of any false alarm stays below level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    result = [1.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, p_values[index] * (len(p_values) - rank)))
        result[index] = running
    return result


def _paired_p(differences: Sequence[float]) -> float:
    """The two-sided p-value of a paired t test; of a sign test where all differences are equal.

    Accuracies are counts of images, so two or three equal differences are no rare accident, and a
    t test would take them for certainty.
    """
    if np.ptp(differences) < _SAME:
        return 1.0 if abs(differences[0]) < _SAME else 2 * 0.5 ** len(differences)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _equivalence_p(differences: Sequence[float]) -> float:
    """The p-value of two one-sided t (or sign) tests against a difference of `ALIKE` or more."""
    if np.ptp(differences) < _SAME:
        return 0.5 ** len(differences) if abs(differences[0]) < ALIKE else 1.0
    above = stats.ttest_1samp(differences, -ALIKE, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, ALIKE, alternative="less").pvalue
    return float(max(above, below))


def _exponential(logs: Interval) -> Interval:
    low = None if logs.low is None else math.exp(logs.low)
    high = None if logs.high is None else math.exp(logs.high)
    return Interval(math.exp(logs.mean), low, high)


def _numbers(trial: Trial) -> tuple[object, ...]:
    return trial.accuracy, trial.train_loss, trial.final


def _usable(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.final is not None]
