"""The report's tables, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..study.arms import Arm
from .answers import FourWays
from .build import Report, Row
from .demonstration import BackwardFacts, ModeFacts
from .markup import Cell, Column, Table
from .numbers import ArmSummary, Interval
from .wording import percent

__all__ = [
    "arms",
    "backward",
    "differences",
    "modes",
    "p_value",
    "points_with_sign",
    "recipe",
    "span",
    "trials",
    "ways",
    "ways_of_all",
]

NONE = Cell("\u2013", kind="muted")  # an en dash: nothing to say
WAYS = (
    ("running", "with running statistics"),
    ("batch", "with the test batch's statistics"),
    ("folded", "folded into the layers"),
    ("skipped", "skipped"),
)
_USUAL = {f.name: getattr(Arm("usual"), f.name) for f in fields(Arm)}


def arms(report: Report) -> Table:
    """Every arm: how it differs from the baseline, how it ended, and how sure that is."""
    base = report.recipes[report.baseline]
    columns = (
        Column("arm", False),
        Column("differs from the baseline in", False),
        Column("accuracy"),
        Column("points to the baseline"),
        Column("corrected p"),
        Column(f"steps to {percent(report.target, 0)}"),
        Column("trials"),
    )
    rows = tuple(_arm(report, arm, base) for arm in report.arms)
    caption = (
        "Accuracy is the mean of final test accuracy over seeds, with its 95 % interval; points to "
        f"the baseline, '{report.baseline}', are on matched seeds, in bold where the p-value, "
        "corrected within this table, is below 0.05; a trial that never reached "
        f"{percent(report.target, 0)} counts with all its steps."
    )
    return Table("arms-table", caption, columns, rows, sortable=True)


def _arm(report: Report, arm: ArmSummary, base: Mapping[str, Any]) -> tuple[Cell, ...]:
    is_base = arm.name == report.baseline
    differs = "the baseline" if is_base else differences(report.recipes[arm.name], base)
    accuracy = steps = against = p = NONE
    if arm.accuracy is not None:
        mean = arm.accuracy.mean
        accuracy = Cell(percent(mean, 2), mean, note=span(arm.accuracy, digits=2))
    if arm.against is not None:
        found = arm.against
        kind = "strong" if found.differs else ""
        mean = found.accuracy.mean
        against = Cell(
            points_with_sign(mean), mean, kind, note=span(found.accuracy, digits=2, signed=True)
        )
        p = Cell(p_value(found.p_corrected), found.p_corrected)
    if arm.steps is not None:
        part = "" if arm.reached == arm.trials else f"{arm.reached} of {arm.trials} reached it"
        steps = Cell(f"{arm.steps.mean:.0f}", arm.steps.mean, note=part)
        if not arm.reached:
            steps = Cell("never", arm.steps.mean, "muted")
    trouble = [
        f"{count} {what}"
        for count, what in ((arm.diverged, "diverged"), (arm.failed, "failed"))
        if count
    ]
    return (
        Cell(arm.name, kind="strong" if is_base else ""),
        Cell(differs),
        accuracy,
        against,
        p,
        steps,
        Cell(str(arm.trials), arm.trials, "trouble" if trouble else "", note=", ".join(trouble)),
    )


def differences(own: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """How a recipe differs from another; what only norms have must differ from the usual."""
    found = [
        (key, value)
        for key, value in own.items()
        if value != base.get(key, _USUAL.get(key)) and key != "steps"
    ]
    if own.get("steps") != base.get("steps"):
        found.append(("steps", own.get("steps")))
    return ", ".join(f"{_word(key)} {_value(value)}" for key, value in found) or "nothing"


def recipe(own: Mapping[str, Any]) -> str:
    """A whole recipe in one line."""
    return ", ".join(
        f"{_word(key)} {_value(value)}" for key, value in own.items() if value not in (None, {})
    )


def _word(key: str) -> str:
    special = {"affine": "gamma and beta", "bn_momentum": "norm momentum", "eps": "epsilon"}
    return special.get(key, key.replace("_", " "))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key} {_value(each)}" for key, each in value.items()) + ")"
    return "as usual" if value is None else str(value)


def trials(report: Report) -> Table:
    """Every trial; those that failed or diverged too."""
    columns = (
        Column("arm", False),
        Column("seed"),
        Column("status", False),
        Column("final accuracy"),
        Column(f"steps to {percent(report.target, 0)}"),
        Column("last loss"),
        Column("seconds"),
        Column("error", False),
    )
    caption = (
        "All trials, seed by seed in the order of the plan. Seconds are of training alone; the "
        "last loss is the mean over the steps since the point before."
    )
    rows = tuple(_trial(row) for row in report.rows)
    return Table("trials-table", caption, columns, rows, sortable=True)


def _trial(row: Row) -> tuple[Cell, ...]:
    lines = row.error.strip().splitlines()
    error = NONE
    if lines:
        error = Cell(lines[-1], kind="trouble", detail=row.error if len(lines) > 1 else "")
    finite = row.loss is not None and abs(row.loss) < float("inf")
    loss = Cell("not finite", kind="trouble") if row.status == "diverged" else NONE
    return (
        Cell(row.arm),
        Cell(str(row.seed), row.seed),
        Cell(row.status, kind="" if row.status == "ok" else "trouble"),
        NONE if row.accuracy is None else Cell(percent(row.accuracy, 2), row.accuracy),
        NONE if row.steps_to_target is None else Cell(
            str(row.steps_to_target), row.steps_to_target
        ),
        Cell(f"{row.loss:.4f}", row.loss) if finite else loss,
        Cell(f"{row.seconds:.2f}", row.seconds),
        error,
    )  # fmt: skip


def ways(found: FourWays) -> Table:
    """One arm's accuracy in the four ways of inference."""
    rows = tuple(
        (
            Cell(f"norms {label}"),
            Cell(percent(getattr(found, way).mean, 2), note=span(getattr(found, way), digits=2)),
        )
        for way, label in WAYS
    )
    columns = (Column("inference", False), Column("accuracy"))
    caption = f"Test accuracy of '{found.arm}', with its 95 % interval."
    return Table("ways-table", caption, columns, rows)


def ways_of_all(found: Sequence[FourWays]) -> Table:
    """The four ways of every arm that has them."""
    columns = (
        Column("arm", False),
        *(Column(f"accuracy {label}") for _, label in WAYS),
        Column("norms folded"),
        Column("left"),
        Column("largest logit difference"),
        Column("of the largest logit"),
        Column("why the first of those left stays", False),
    )
    rows = tuple(
        (
            Cell(each.arm),
            *(_mean_and_span(getattr(each, way)) for way, _ in WAYS),
            Cell(str(each.folded_norms), each.folded_norms),
            Cell(str(each.left_norms), each.left_norms),
            Cell(f"{each.difference:.1e}", each.difference),
            Cell(f"{each.relative:.1e}", each.relative),
            Cell(each.left_reason) if each.left_reason else NONE,
        )
        for each in found
    )
    return Table("inference-table", "The four ways of inference, by arm.", columns, rows, True)


def _mean_and_span(i: Interval) -> Cell:
    return Cell(percent(i.mean, 2), i.mean, note=span(i, digits=2))


def backward(facts: BackwardFacts) -> Table:
    """What each call of a training step returned and changed."""
    same = Cell("no bit changed")
    columns = tuple(Column(name, False) for name in ("", "gamma", "beta", "running mean"))
    moved, stats = (
        Cell("changed", kind="trouble") if bad else same
        for bad in (facts.parameters_moved, facts.statistics_moved)
    )
    step = f"the explicit step, {facts.learning_rate:g} times the gradient, made"
    stepped = (_vector(facts.gamma_stepped), _vector(facts.beta_stepped))
    start = (_vector(facts.gamma), _vector(facts.beta), _vector(facts.running_mean))
    rows = (
        (Cell("at the start"), *start),
        (
            Cell("the forward call in training made"),
            NONE,
            NONE,
            _vector(facts.running_mean_forward),
        ),
        (Cell("the backward call returned"), _vector(facts.dgamma), _vector(facts.dbeta), NONE),
        (Cell("and changed"), moved, moved, stats),
        (Cell(step), *stepped, NONE),
    )
    caption = "One training step of a norm with two channels, call by call."
    return Table("backward-table", caption, columns, rows)


def modes(facts: ModeFacts) -> Table:
    """Where SPATIAL and PER_ACTIVATION agree on a dense layer's values."""
    rows = (
        ("SPATIAL on (n, c)", facts.dense),
        ("SPATIAL on (n, c, 1, 1)", facts.dense_as_image),
        ("SPATIAL on (n, 1, 1, c), units as pixels", facts.units_as_pixels),
    )
    columns = (Column("a dense layer's values", False), Column("largest difference"))
    cells = tuple((Cell(name), Cell("0" if value == 0 else f"{value:.3g}")) for name, value in rows)
    caption = "Against PER_ACTIVATION on the same values, outputs and input gradients."
    return Table("modes-table", caption, columns, cells)


def span(i: Interval, *, digits: int = 1, signed: bool = False) -> str:
    """An interval of shares: '98.7 to 99.0', in per cent."""
    if i.low is None or i.high is None:
        return "one value"
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{100 * i.low:{form}} to {100 * i.high:{form}}"


def points_with_sign(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * share:+.2f}"


def p_value(p: float) -> str:
    """A p-value for a table; three digits, so that none is rounded across the level."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _vector(values: Sequence[float]) -> Cell:
    return Cell("(" + ", ".join(f"{value:.4g}" for value in values) + ")")
