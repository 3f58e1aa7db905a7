"""How numbers become words: shares, points, p-values, and what a comparison supports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..study.arms import Arm
from .numbers import LEVEL, Comparison, Interval

__all__ = ["Evidence", "context", "evidence", "percent", "points", "probability", "times"]


@dataclass(frozen=True)
class Evidence:
    """One comparison in words.

    ``verdict`` is 'better' or 'worse' (a against b, in accuracy), 'faster' or 'slower' (where only
    the speed is known to differ), 'alike', 'identical' or 'unclear'.
    """

    verdict: str
    sentence: str
    comparison: Comparison


def evidence(c: Comparison, a: str, b: str, where: str, target: float) -> Evidence:
    """The sentence that a comparison supports; a and b are the arms in words."""
    start = f"{where}, {a}" if where else a
    start = start[0].upper() + start[1:]
    span = _span(c.accuracy)
    speed = _speed(c, target)
    if c.identical:
        return Evidence("identical", f"{start} and {b} give the same numbers in every trial.", c)
    if c.differs:
        up = c.accuracy.mean > 0
        text = f"{start} ends {points(abs(c.accuracy.mean))} {'above' if up else 'below'} {b}"
        also = f", and {speed}" if speed else ""
        numbers = f"{span}, {probability(c.p_corrected)}"
        return Evidence("better" if up else "worse", f"{text} ({numbers}){also}.", c)
    if c.is_alike:
        p = probability(c.p_alike_corrected)
        text = f"{start} ends within half a point of {b} ({span}; {p} for more)"
    else:
        numbers = f"{span}, {probability(c.p_corrected)}"
        text = f"{start} against {b}: this study cannot tell which ends higher ({numbers})"
    if speed and c.speed is not None:
        who = "it" if c.is_alike else a
        verdict = "faster" if c.speed.mean > 1 else "slower"
        return Evidence(verdict, f"{text}, but {who} {speed}.", c)
    return Evidence("alike" if c.is_alike else "unclear", f"{text}.", c)


def _speed(c: Comparison, target: float) -> str:
    """What the steps to the target say, or nothing if they say nothing for sure."""
    if c.speed is None or c.speed_p_corrected is None or not c.differs_in_speed:
        return ""
    ratio = c.speed.mean
    least = "at least " if c.censored else ""
    numbers = f"{_ratio_span(c.speed)}, {probability(c.speed_p_corrected)}"
    if ratio > 1:
        return f"reaches {percent(target, 0)} {least}{times(ratio)} sooner ({numbers})"
    return f"needs {least}{times(1 / ratio)} the steps to {percent(target, 0)} ({numbers})"


_SAID: dict[str, Callable[[Any], str]] = {
    "model": lambda v: f"in '{v}'",
    "batch_size": lambda v: f"at batch {v}",
    "learning_rate": lambda v: f"at learning rate {v:g}",
    "input_norm": lambda v: "on normalized input" if v else "on raw input",
    "statistics": lambda v: f"with {v} statistics",
    "affine": lambda v: "with gamma and beta" if v else "without gamma and beta",
    "layers": lambda v: f"on {v} layers",
    "placement": lambda v: "without batch norm" if v == "none" else f"with it {v}",
}
_ACTIVATIONS = {"relu": "ReLU", "leaky_relu": "leaky ReLU", "sigmoid": "sigmoid"}


def context(arm: Arm, other: Arm, usual: Arm, *, name_activation: bool) -> str:
    """What two arms share that is not the usual arm's, in words.

    The activation is named where asked, because a question may compare under several. A learning
    rate that goes with the batch size or the activation is not.
    """
    contrast = arm.difference(other)
    said = [f"with {_ACTIVATIONS[arm.activation]}"] if name_activation else []
    scaled = arm.batch_size != usual.batch_size or arm.activation != usual.activation
    for key, say in _SAID.items():
        value = getattr(arm, key)
        if key in contrast or value == getattr(usual, key) or (key == "learning_rate" and scaled):
            continue
        said.append(say(value))
    return ", ".join(said)


def percent(share: float, digits: int = 1) -> str:
    """0.9889 is '98.9 %'."""
    return f"{100 * share:.{digits}f} %"


def points(share: float) -> str:
    """A difference of shares: 0.0141 is '1.4 points'."""
    value = 100 * share
    return f"{value:.1f} points" if abs(value) >= 0.095 else f"{value:.2f} points"


def probability(p: float) -> str:
    """A p-value with the digits it deserves: 'p = 0.03', 'p = 0.049', 'p = 0.0498', 'p < 0.001'."""
    if p < 0.001:
        return "p < 0.001"
    if abs(p - LEVEL) < 0.005:
        return f"p = {p:.{4 if abs(p - LEVEL) < 0.0005 else 3}f}"
    return f"p = {p:.3f}" if p < 0.01 else f"p = {p:.2f}"


def times(ratio: float) -> str:
    """A ratio of 1 or more: '1.04 times', '3.2 times', '40 times'."""
    return f"{_ratio(ratio)} times"


def _span(i: Interval) -> str:
    if i.low is None or i.high is None:
        return f"{100 * i.mean:+z.1f} points"
    return f"95 % interval {100 * i.low:+z.1f} to {100 * i.high:+z.1f} points"


def _ratio_span(i: Interval) -> str:
    low, high = (i.low or i.mean), (i.high or i.mean)
    if i.mean < 1:
        low, high = 1 / high, 1 / low
    return f"95 % interval {_ratio(low)} to {_ratio(high)} times"


def _ratio(value: float) -> str:
    digits = 0 if value >= 20 else 1 if value >= 1.1 else 2
    return f"{value:.{digits}f}"
