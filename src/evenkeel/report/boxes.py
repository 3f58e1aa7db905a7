"""The answer boxes: a question, the sentence that the numbers support, its evidence, and more."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .answers import Answer, FourWays
from .build import Report
from .markup import escape, prose, table
from .numbers import ALIKE, Interval
from .tables import backward, modes, ways
from .wording import Evidence

__all__ = ["box", "strip"]

_WIDTH, _HEIGHT = 200, 16


def box(report: Report, answer: Answer) -> str:
    """One answer as an article with the heading ``q1``, ``q2`` and so on."""
    key = f"q{answer.number}"
    bound = _bound([each.comparison.accuracy for each in answer.evidence])
    first = strip(answer.evidence[0].comparison.accuracy, bound) if answer.evidence else ""
    wide = "" if first else " alone"
    parts = [
        f'<article class="box" id="{key}" aria-labelledby="{key}-title">',
        f'<h3 id="{key}-title"><a class="count" href="#{key}">{answer.number} </a>'
        f"{escape(answer.question)} {_badge(answer.verdict)}</h3>",
        f'<div class="claim{wide}"><p class="sentence">{prose(answer.sentence)}</p>{first}</div>',
        _further(answer.evidence[1:], bound),
        _scale(bound) if answer.evidence else "",
        _tables(report, answer),
    ]
    if answer.next_step:
        step = prose(answer.next_step)
        parts.append(f'<p class="next"><strong>What would tell:</strong> {step}</p>')
    parts.append(f'<p class="background">{prose(answer.background)}</p>\n</article>')
    return "\n".join(part for part in parts if part)


def _badge(verdict: str) -> str:
    return f'<span class="badge {verdict.replace(" ", "-")}">{escape(verdict)}</span>'


def _further(found: Sequence[Evidence], bound: float) -> str:
    if not found:
        return ""
    items = "\n".join(
        f'<li><span class="mark {each.verdict}">{each.verdict}</span> '
        f"<span>{prose(each.sentence)}</span>{strip(each.comparison.accuracy, bound)}</li>"
        for each in found
    )
    return f'<ul class="evidence" aria-label="Further comparisons">\n{items}\n</ul>'


def _tables(report: Report, answer: Answer) -> str:
    parts: list[str] = []
    if answer.modes is not None:
        parts.append(table(modes(answer.modes)))
    if answer.backward is not None:
        parts.append(table(backward(answer.backward)))
    if answer.inference is not None:
        parts.append(table(ways(answer.inference)))
        parts.append(_folds(answer.inference, report.inference))
    return "\n".join(parts)


def _folds(best: FourWays, found: Sequence[FourWays]) -> str:
    """How many norms fold, how exactly, and why others stay."""
    norms = best.folded_norms + best.left_norms
    facts = (
        ("Norms folded", f"{best.folded_norms} of {norms}"),
        ("Norms left", str(best.left_norms)),
        ("Largest difference of a logit", f"{best.difference:.1e}"),
        ("The same, of the largest logit", f"{best.relative:.1e}"),
    )
    items = "".join(f"<div><dt>{dt}</dt><dd>{prose(dd)}</dd></div>" for dt, dd in facts)
    text = f'<dl class="facts">{items}</dl>'
    staying = [each for each in found if each.left_norms]
    if not staying:
        return text
    items = "\n".join(
        f"<li>'{prose(each.arm)}': {each.left_norms} of {each.folded_norms + each.left_norms} "
        f"stay; {'the first one: ' if each.left_norms > 1 else ''}{prose(each.left_reason)}.</li>"
        for each in staying
    )
    count = f"{len(staying)} {'arm has' if len(staying) == 1 else 'arms have'}"
    return (
        f"{text}\n<details><summary>{count} norms that cannot be folded, and why</summary>\n"
        f'<ul class="plain">\n{items}\n</ul></details>'
    )


def strip(i: Interval, bound: float) -> str:
    """A difference and its interval as a small drawing; the sentence beside it has the numbers.

    What lies outside of the bound is an arrow at the edge.
    """

    def x(share: float) -> str:
        return f"{_WIDTH * (0.5 + 0.48 * max(-1.0, min(1.0, share / bound))):.1f}"

    middle, zone = _HEIGHT / 2, 0.48 * _WIDTH * min(1.0, ALIKE / bound)
    low, high = (i.mean if edge is None else edge for edge in (i.low, i.high))
    mark = f'<path class="span" d="M{x(low)} {middle}H{x(high)}"/>'
    if abs(i.mean) <= bound:
        mark += f'<circle class="mean" cx="{x(i.mean)}" cy="{middle}" r="4"/>'
    if low < -bound * 1.001:
        mark += f'<path class="out" d="M8 {middle - 5}L1 {middle}L8 {middle + 5}Z"/>'
    if high > bound * 1.001:
        edge = _WIDTH - 1
        mark += f'<path class="out" d="M{edge - 7} {middle - 5}L{edge} {middle}l-7 5Z"/>'
    return (
        f'<svg class="strip" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" aria-hidden="true" focusable="false">'
        f'<rect class="zone" x="{_WIDTH / 2 - zone:.1f}" y="0" width="{2 * zone:.1f}" '
        f'height="{_HEIGHT}"/><path class="zero" d="M{_WIDTH / 2} 0V{_HEIGHT}"/>'
        f"{mark}</svg>"
    )


def _bound(intervals: Sequence[Interval]) -> float:
    """A round share of points, at least one, that holds the intervals.

    The first one decides: others may reach to four times it, and are cut off beyond that.
    """
    edges = [max(abs(v) for v in (i.mean, i.low, i.high) if v is not None) for i in intervals]
    reach = max([0.01, *edges[:1]])
    most = 100 * max([reach, *(edge for edge in edges if edge <= 4 * reach)])
    power = 10 ** math.floor(math.log10(most))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= most - 1e-9)) / 100


def _scale(bound: float) -> str:
    most = f"{100 * bound:g}"
    return (
        f'<p class="scale" aria-hidden="true"><span>\u2212{most}</span><span>0</span>'
        f'<span>+{most}</span><span class="unit">points, first minus second</span></p>'
    )
