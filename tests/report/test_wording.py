"""Numbers become words: each function by a table, each verdict from planted numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evenkeel.report.numbers import Interval
from evenkeel.report.wording import (
    context,
    evidence,
    percent,
    points,
    probability,
    times,
)
from evenkeel.study.arms import Arm

from .planted import assert_readable, compared


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [(0.9889, 1, "98.9 %"), (0.95, 0, "95 %"), (1.0, 1, "100.0 %"), (0.0, 1, "0.0 %")],
)
def test_percent(share, digits, text):
    assert percent(share, digits) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0141, "1.4 points"),
        (0.306, "30.6 points"),
        (0.00095, "0.1 points"),
        (0.0009, "0.09 points"),
        (0.0002, "0.02 points"),
        (0.0, "0.00 points"),
        (-0.02, "-2.0 points"),
    ],
)
def test_points(share, text):
    assert points(share) == text


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.0, "p < 0.001"),
        (0.000999, "p < 0.001"),
        (0.001, "p = 0.001"),
        (0.0094, "p = 0.009"),
        (0.0123, "p = 0.01"),
        (0.031, "p = 0.03"),
        (0.0496, "p = 0.0496"),
        (0.0489, "p = 0.049"),
        (0.0511, "p = 0.051"),
        (0.056, "p = 0.06"),
        (1.0, "p = 1.00"),
    ],
)
def test_probability(p, text):
    assert probability(p) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1.0, "1.00 times"), (1.04, "1.04 times"), (1.1, "1.1 times"), (3.16, "3.2 times"),
     (19.94, "19.9 times"), (20.4, "20 times"), (1234.5, "1234 times")],
)  # fmt: skip
def test_times(ratio, text):
    assert times(ratio) == text


# One comparison in words


def given(**changes):
    """A comparison that says nothing, but for the changes."""
    quiet = replace(
        compared([0.9, 0.92, 0.95], [0.91, 0.9, 0.95]),
        accuracy=Interval(0.0, -0.01, 0.01),
        p_corrected=0.5,
        p_alike_corrected=0.5,
        speed=None,
        speed_p_corrected=None,
        censored=False,
        identical=False,
    )
    return replace(quiet, **changes)


BETTER = {"accuracy": Interval(0.0141, 0.009, 0.022), "p_corrected": 0.004}
WORSE = {"accuracy": Interval(-0.306, -0.348, -0.264), "p_corrected": 0.0001}
ALIKE = {"accuracy": Interval(0.001, -0.002, 0.003), "p_alike_corrected": 0.02}
FASTER = {"speed": Interval(4.63, 3.67, 5.79), "speed_p_corrected": 0.0004}
SLOWER = {"speed": Interval(0.5, 0.4, 0.625), "speed_p_corrected": 0.02}
DULL = {"speed": Interval(1.5, 0.9, 2.1), "speed_p_corrected": 0.06}

SENTENCES = [
    ({}, "unclear",
     "The net against the other: this study cannot tell which ends higher (95 % interval -1.0 to "
     "+1.0 points, p = 0.50)."),
    (BETTER, "better",
     "The net ends 1.4 points above the other (95 % interval +0.9 to +2.2 points, p = 0.004)."),
    (WORSE, "worse",
     "The net ends 30.6 points below the other (95 % interval -34.8 to -26.4 points, p < 0.001)."),
    (ALIKE, "alike",
     "The net ends within half a point of the other (95 % interval -0.2 to +0.3 points; p = 0.02 "
     "for more)."),
    ({"identical": True}, "identical",
     "The net and the other give the same numbers in every trial."),
    ({"identical": True, **BETTER}, "identical",
     "The net and the other give the same numbers in every trial."),
    (BETTER | FASTER, "better",
     "The net ends 1.4 points above the other (95 % interval +0.9 to +2.2 points, p = 0.004), and "
     "reaches 95 % 4.6 times sooner (95 % interval 3.7 to 5.8 times, p < 0.001)."),
    (BETTER | SLOWER, "better",
     "The net ends 1.4 points above the other (95 % interval +0.9 to +2.2 points, p = 0.004), and "
     "needs 2.0 times the steps to 95 % (95 % interval 1.6 to 2.5 times, p = 0.02)."),
    (WORSE | SLOWER | {"censored": True}, "worse",
     "The net ends 30.6 points below the other (95 % interval -34.8 to -26.4 points, p < 0.001), "
     "and needs at least 2.0 times the steps to 95 % (95 % interval 1.6 to 2.5 times, p = 0.02)."),
    (ALIKE | FASTER, "faster",
     "The net ends within half a point of the other (95 % interval -0.2 to +0.3 points; p = 0.02 "
     "for more), but it reaches 95 % 4.6 times sooner (95 % interval 3.7 to 5.8 times, "
     "p < 0.001)."),
    (ALIKE | SLOWER, "slower",
     "The net ends within half a point of the other (95 % interval -0.2 to +0.3 points; p = 0.02 "
     "for more), but it needs 2.0 times the steps to 95 % (95 % interval 1.6 to 2.5 times, "
     "p = 0.02)."),
    (FASTER | {"censored": True}, "faster",
     "The net against the other: this study cannot tell which ends higher (95 % interval -1.0 to "
     "+1.0 points, p = 0.50), but the net reaches 95 % at least 4.6 times sooner (95 % interval "
     "3.7 to 5.8 times, p < 0.001)."),
    (SLOWER, "slower",
     "The net against the other: this study cannot tell which ends higher (95 % interval -1.0 to "
     "+1.0 points, p = 0.50), but the net needs 2.0 times the steps to 95 % (95 % interval 1.6 to "
     "2.5 times, p = 0.02)."),
    (DULL, "unclear",
     "The net against the other: this study cannot tell which ends higher (95 % interval -1.0 to "
     "+1.0 points, p = 0.50)."),
    (BETTER | DULL, "better",
     "The net ends 1.4 points above the other (95 % interval +0.9 to +2.2 points, p = 0.004)."),
    ({"speed": Interval(1.04, 1.02, 30.0), "speed_p_corrected": 0.01}, "faster",
     "The net against the other: this study cannot tell which ends higher (95 % interval -1.0 to "
     "+1.0 points, p = 0.50), but the net reaches 95 % 1.04 times sooner (95 % interval 1.02 to 30 "
     "times, p = 0.01)."),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "verdict", "sentence"), SENTENCES)
def test_what_a_comparison_supports(changes, verdict, sentence):
    comparison = given(**changes)
    found = evidence(comparison, "the net", "the other", "", 0.95)
    assert (found.verdict, found.sentence) == (verdict, sentence)
    assert found.comparison is comparison
    assert_readable(found.sentence)


def test_the_level_is_five_percent_and_not_reached_by_five():
    assert evidence(given(p_corrected=0.0499), "a", "b", "", 0.9).verdict == "worse"
    assert evidence(given(p_corrected=0.05), "a", "b", "", 0.9).verdict == "unclear"
    assert evidence(given(p_alike_corrected=0.05), "a", "b", "", 0.9).verdict == "unclear"
    slow = {"speed": Interval(2.0, 1.5, 3.0), "speed_p_corrected": 0.05}
    assert evidence(given(**slow), "a", "b", "", 0.9).verdict == "unclear"


def test_raw_p_values_claim_nothing():
    raw = given(p=0.0001, p_alike=0.0001, speed=Interval(3.0, 2.0, 4.0), speed_p=0.0001)
    raw = replace(raw, speed_p_corrected=0.5)
    assert evidence(raw, "a", "b", "", 0.9).verdict == "unclear"


def test_where_comes_first():
    found = evidence(given(**BETTER), "the net", "the other", "with ReLU, at batch 2", 0.95)
    assert found.sentence.startswith("With ReLU, at batch 2, the net ends 1.4 points above")


# What two arms share that is unusual

USUAL = Arm("usual", placement="before-activation")
CONTEXTS = [
    ({}, {"placement": "none"}, ""),
    ({"batch_size": 2}, {"placement": "none"}, "at batch 2"),
    ({"batch_size": 2, "learning_rate": 0.003}, {"placement": "none"}, "at batch 2"),
    ({"learning_rate": 0.5}, {"placement": "none"}, "at learning rate 0.5"),
    ({"activation": "sigmoid", "learning_rate": 0.1}, {"affine": False}, ""),
    ({"input_norm": False}, {"placement": "none"}, "on raw input"),
    ({"model": "residual"}, {"placement": "after-addition"}, "in 'residual'"),
    ({"statistics": "layer"}, {"affine": False}, "with layer statistics"),
    ({"statistics": "layer"}, {"statistics": "spatial"}, ""),
    ({"affine": False}, {"statistics": "layer"}, "without gamma and beta"),
    ({"layers": "conv"}, {"affine": False}, "on conv layers"),
    ({"placement": "none"}, {"input_norm": False}, "without batch norm"),
    ({"placement": "on-input"}, {"affine": False}, "with it on-input"),
    ({"input_norm": False, "batch_size": 4}, {"placement": "none"}, "at batch 4, on raw input"),
]


@pytest.mark.parametrize(("shared", "contrast", "text"), CONTEXTS)
def test_context(shared, contrast, text):
    arm = replace(USUAL, **shared)
    assert context(arm, replace(arm, **contrast), USUAL, name_activation=False) == text


def test_activations_are_named_where_asked():
    for activation, said in (
        ("relu", "with ReLU"), ("leaky_relu", "with leaky ReLU"), ("sigmoid", "with sigmoid")
    ):  # fmt: skip
        arm = replace(USUAL, activation=activation, batch_size=2)
        other = replace(arm, affine=False)
        assert context(arm, other, USUAL, name_activation=True) == f"{said}, at batch 2"
