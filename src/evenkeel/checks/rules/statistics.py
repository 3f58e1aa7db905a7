"""The running statistics themselves: what is in them, and where they came from."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..facts import NormFacts
from ..observe import Observation
from ..walk import norm_calls
from .base import Blind, Found

__all__ = [
    "counted_twice",
    "half_precision",
    "lost_statistics",
    "negative_variance",
    "never_updated",
    "not_finite",
    "stale_average",
    "tiny_variance",
]

_TINY_SHARE = 1e-4
"""A variance under this share of epsilon is rounding: the norm divides by epsilon alone."""
_TINY = 1e-12
_STALE = 0.5


def never_updated(seen: Observation) -> Iterator[Found]:
    """Mean 0 and variance 1 in every owner: no batch was ever counted."""
    others = any(not f.never_updated and f.remembers for f in seen.batch_norms)
    missing = seen.loaded.missing if seen.loaded is not None else {}
    called = norm_calls(seen.trains)
    for facts in seen.batch_norms:
        if not facts.remembers or not facts.never_updated or facts.path in missing:
            continue
        if called and facts.path not in called:
            continue  # that is another rule's
        if seen.loaded is not None:
            severity, text = "error", "though the checkpoint is of a trained network"
        elif others:
            severity = "error" if _has_learned(facts) else "warning"
            text = "though other norms have seen some"
        elif _has_learned(facts) and not facts.training:
            severity, text = "warning", "though beta is not what norms begin with"
        else:
            severity, text = "note", "for the network is fresh"
        count = facts.count or 0
        yield Found(
            facts.path, count, f"mean 0 and variance 1 after {count} batches, {text}", severity
        )


def not_finite(seen: Observation) -> Iterator[Found]:
    """NaN or infinity in statistics, gamma or beta."""
    for facts in seen.norms.values():
        held = {
            "running_mean": facts.mean,
            "running_var": facts.var,
            "gamma": facts.weight,
            "beta": facts.bias,
        }
        bad = {name: int((~t.isfinite()).sum()) for name, t in held.items() if t is not None}
        told = {name: count for name, count in bad.items() if count}
        if told:
            text = ", ".join(f"{count} values of {name}" for name, count in told.items())
            yield Found(facts.path, sum(told.values()), f"{text} are NaN or infinite")


def negative_variance(seen: Observation) -> Iterator[Found]:
    """A running variance below zero."""
    for facts in seen.batch_norms:
        if facts.var is None or not bool((facts.var < 0).any()):
            continue
        least = float(facts.var[facts.var < 0].min())
        count = int((facts.var < 0).sum())
        nan = int((facts.var + (facts.eps or 0.0) <= 0).sum())
        message = f"{count} variances below zero, the least {least:.3g}; {nan} give NaN or infinity"
        yield Found(facts.path, least, message)


def tiny_variance(seen: Observation) -> Iterator[Found]:
    """Variances that have vanished against epsilon, subnormal numbers among them."""
    for facts in seen.batch_norms:
        if facts.var is None or facts.dtype is None or not facts.remembers:
            continue
        limit = max(_TINY_SHARE * (facts.eps or 0.0), _TINY)
        tiny = (facts.var >= 0) & (facts.var < limit)
        count = int(tiny.sum())
        if not count:
            continue
        subnormal = int(is_subnormal(facts.var, facts.dtype).sum())
        least = float(facts.var[tiny].min())
        share = count / facts.var.numel()
        eps = max(facts.eps or 0.0, 1e-300)
        message = (
            f"{count} of {facts.var.numel()} variances have vanished, the least {least:.3g} "
            f"({subnormal} subnormal); what comes there is multiplied by {eps**-0.5:.3g}"
        )
        severity = "warning" if share >= 0.5 else "note"
        yield Found(facts.path, least, message, severity, fixable=bool(subnormal and facts.eps))


def half_precision(seen: Observation) -> Iterator[Found]:
    """Running statistics in float16 or bfloat16."""
    for facts in seen.batch_norms:
        if not facts.remembers or facts.dtype not in (torch.float16, torch.bfloat16):
            continue
        step = torch.finfo(facts.dtype).eps
        kind = str(facts.dtype).removeprefix("torch.")
        message = f"statistics in {kind}, which keeps no change under {step:.1e} of a value"
        yield Found(facts.path, step, message, "warning" if facts.moves else "note")


def lost_statistics(seen: Observation) -> Iterator[Found]:
    """A checkpoint without the running statistics of a norm."""
    missing = {} if seen.loaded is None else seen.loaded.missing
    for path, names in missing.items():
        message = (
            f"the checkpoint has no {' and '.join(names)}; the norm keeps what it was made with"
        )
        yield Found(path, len(names), message)


def counted_twice(seen: Observation) -> Iterator[Found]:
    """Statistics that one training step counts more than once, for a checkpointed segment."""
    for path, times in seen.recounts.items():
        message = f"one forward and backward counted its statistics {times:g} times"
        yield Found(path, times, message)


def stale_average(seen: Observation) -> Iterator[Found | Blind]:
    """Averaged weights (EMA, SWA) whose norms have statistics of other weights."""
    if seen.averaged is not None:
        fits = seen.measured
        if fits is not None and fits.start is not None:
            message = (
                f"weights of {seen.averaged} models were averaged, the statistics were not: they "
                f"are {fits.own[fits.start].size:.2f} deviations off from here on"
            )
            yield Found(fits.start, fits.own[fits.start].size, message)
        elif fits is None:
            yield Blind(
                f"{seen.averaged} models were averaged without their statistics; give data to "
                "tell whether those were estimated anew"
            )
    loaded = seen.loaded
    if loaded is None or loaded.checkpoint.averaged is None:
        return
    main, averaged = loaded.checkpoint.state, loaded.checkpoint.averaged
    moved = _weights_apart(main, averaged, {f.path for f in seen.batch_norms})
    for facts in seen.batch_norms:
        apart = _statistics_apart(facts, main, averaged)
        if apart is not None and apart > max(_STALE, 4 * moved):
            yield Found(
                facts.path,
                apart,
                f"the averaged network's statistics are {apart:.2f} deviations from the trained "
                f"one's, while its weights differ by {100 * moved:.0f} %",
            )


def is_subnormal(var: Tensor, dtype: torch.dtype) -> Tensor:
    """Where values are so small that the dtype keeps them with fewer digits, and slowly."""
    return (var > 0) & (var < torch.finfo(dtype).tiny)


def _has_learned(facts: NormFacts) -> bool:
    """True if beta is not what anybody starts with, which is one number for all."""
    return facts.bias is not None and bool((facts.bias != facts.bias[:1]).any())


def _weights_apart(a: dict[str, Tensor], b: dict[str, Tensor], norms: set[str]) -> float:
    """The relative distance of all weights outside of norms."""
    apart = size = 0.0
    for name, value in a.items():
        other = b.get(name)
        inside = name.rpartition(".")[0] in norms
        if other is None or inside or not value.is_floating_point() or other.shape != value.shape:
            continue
        apart += float((value.double() - other.double()).square().sum())
        size += float(value.double().square().sum())
    return math.sqrt(apart / size) if size else 0.0


def _statistics_apart(facts: NormFacts, a: dict[str, Tensor], b: dict[str, Tensor]) -> float | None:
    """How far the second statistics are from the first, in the first's deviations."""
    start = f"{facts.path}." if facts.path else ""
    names = [f"{start}running_mean", f"{start}running_var"]
    if any(name not in state for name in names for state in (a, b)):
        return None
    (m, v), (mean, var) = ([s[n].double().cpu().flatten() for n in names] for s in (a, b))
    kept = v + (facts.eps or 0.0)
    if m.shape != mean.shape or not bool((kept > 0).all()) or not m.numel():
        return None
    d = (mean - m).square() / kept
    r = ((var + (facts.eps or 0.0)).clamp_min(0) / kept).sqrt() - 1
    found = float((d + r.square()).mean().sqrt())
    return found if math.isfinite(found) else None
