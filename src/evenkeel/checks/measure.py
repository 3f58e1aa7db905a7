"""How far running statistics are from data: moments of what norms see, and the gap as a number."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.contract import Moments
from ..kernels.reference import Reference
from ..view import logical_view
from .facts import NormFacts

__all__ = ["Gap", "Moments", "floor_of", "gap", "merged", "moments", "shift_between"]

_VERBS = Reference()


@dataclass(frozen=True)
class Gap:
    """The gap of one norm, and its worst owner: which, how many deviations off, which ratio.

    Attributes:
        size: root mean square over all owners, see `gap`.
        owner: index of the owner that is farthest off.
        shift: of that owner, (mean seen - running mean) / sqrt(running variance + eps).
        ratio: of that owner, variance seen / running variance.
    """

    size: float
    owner: int
    shift: float
    ratio: float


def moments(facts: NormFacts, x: Tensor) -> Moments | None:
    """Exact moments of each owner of a norm's input, flat and in float64 on the CPU."""
    bound = facts.bound(tuple(x.shape))
    if bound is None or bound.count < 1 or not x.is_floating_point() or x.is_meta:
        return None
    with torch.no_grad():
        view = logical_view(bound.shape, bound.kept)
        n, mean, m2 = _VERBS.stats(x.detach().reshape(bound.shape), view)
    return Moments(n, _plain(mean), _plain(m2))


def merged(parts: list[Moments]) -> Moments:
    """Moments of all batches together."""
    return _VERBS.merge(parts)


def gap(facts: NormFacts, seen: Moments) -> Gap | None:
    """What the running statistics put wrong, relative to what the norm should give.

    ::

        r = sqrt((var_seen + eps) / (running_var + eps))        d = (mean_seen - running_mean) / s
        gap = sqrt(sum(gamma^2 * ((r - 1)^2 * v + d^2)) / sum(gamma^2 * v))

    with ``s = sqrt(running_var + eps)`` and ``v = var_seen / (var_seen + eps)``: the root mean
    square of the difference between the norm's output with running and with seen statistics, over
    the deviation of the latter. Both variances are unbiased.

    Returns:
        None where there is nothing to compare, or the running statistics cannot be used.
    """
    if facts.mean is None or facts.var is None or seen.n < 2:
        return None
    eps = facts.eps or 0.0
    var = seen.m2 / (seen.n - 1)
    kept = facts.var + eps
    if facts.mean.shape != seen.mean.shape or not _usable(facts.mean, kept, seen.mean, var):
        return None
    weight = torch.ones_like(var) if facts.weight is None else facts.weight.square()
    if weight.shape != var.shape or not bool(weight.isfinite().all()):
        weight = torch.ones_like(var)
    alive = var / (var + eps).clamp_min(1e-300)
    ratio = ((var + eps) / kept).sqrt()
    shift = (seen.mean - facts.mean) / kept.sqrt()
    wrong = (ratio - 1).square() * alive + shift.square()
    whole = float((weight * alive).sum())
    if whole <= 0:
        return None
    worst = int((weight * wrong).argmax())
    return Gap(
        size=math.sqrt(float((weight * wrong).sum()) / whole),
        owner=worst,
        shift=float(shift[worst]),
        ratio=float(((var + eps) / kept)[worst]),
    )


def floor_of(samples: int) -> float:
    """The gap that chance alone gives data of so many samples, if their pixels are alike.

    The mean of n values is off by 1 / sqrt(n) deviations, and their deviation by half of that in
    square: ``sqrt((1 + 1 / 2) / n)``.
    """
    return math.sqrt(1.5 / max(samples, 1))


def shift_between(a: Moments, b: Moments) -> float:
    """How far apart two sets of moments are, in deviations of the first: as `gap` does it."""
    var, other = a.m2 / max(a.n, 1), b.m2 / max(b.n, 1)
    alive = var > 1e-12 * var.max().clamp_min(1e-300)
    if not bool(alive.any()):
        return 0.0
    d = (b.mean - a.mean)[alive].square() / var[alive]
    r = (other[alive] / var[alive]).sqrt() - 1
    return float((d + r.square()).mean().sqrt())


def _plain(vector: Tensor) -> Tensor:
    return vector.detach().to("cpu", torch.float64).flatten()


def _usable(*vectors: Tensor) -> bool:
    mean, kept, _, var = vectors
    finite = all(bool(v.isfinite().all()) for v in vectors)
    return finite and bool((kept > 0).all()) and bool((var >= 0).all()) and mean.numel() > 0
