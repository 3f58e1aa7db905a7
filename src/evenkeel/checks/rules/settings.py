"""Gamma, beta, momentum, epsilon, and what an optimizer does with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import torch

from ..observe import Observation
from .base import Found

__all__ = [
    "dead_gamma",
    "eps_outlier",
    "eps_zero",
    "huge_gamma",
    "left_out_of_optimizer",
    "momentum_of_other_convention",
    "weight_decay",
]

_DEAD = 1e-6
_DEAD_SHARE = 1e-4
_HUGE = 100.0
_OTHER_WAY = 0.9
_FEW_STEPS = 1000
_USUAL_EPS = 1e-5


def dead_gamma(seen: Observation) -> Iterator[Found]:
    """Channels whose gamma is all but zero in a norm that has trained."""
    for facts in seen.batch_norms:
        gamma = facts.weight
        if gamma is None or not gamma.numel() or not bool(gamma.isfinite().all()):
            continue
        size = gamma.abs()
        dead = int((size <= max(_DEAD, _DEAD_SHARE * float(size.max()))).sum())
        is_fresh = dead == gamma.numel() and (facts.never_updated or not facts.remembers)
        if dead and not is_fresh:  # a fresh one may begin at zero, at the end of a residual block
            message = f"{dead} of {gamma.numel()} channels have a gamma of zero, or next to it"
            severity = "warning" if 2 * dead >= gamma.numel() else "note"
            yield Found(facts.path, dead, message, severity)


def huge_gamma(seen: Observation) -> Iterator[Found]:
    """A gamma that makes values of deviation one into hundreds."""
    for facts in seen.batch_norms:
        gamma = facts.weight
        if gamma is None or not gamma.numel():
            continue
        size = gamma.abs()
        largest = float(size[size.isfinite()].max()) if bool(size.isfinite().any()) else 0.0
        if largest > _HUGE:
            count = int((size > _HUGE).sum())
            message = f"{count} of {gamma.numel()} above {_HUGE:g}, the largest {largest:.4g}"
            yield Found(facts.path, largest, message)


def momentum_of_other_convention(seen: Observation) -> Iterator[Found]:
    """A momentum of 0.9 or 0.99: the weight of the new value here, of the old one elsewhere."""
    for facts in seen.batch_norms:
        m = facts.momentum
        if m is None or not facts.remembers:
            continue
        if not 0 <= m <= 1:
            yield Found(facts.path, m, f"momentum {m:g} is no weight between 0 and 1", "error")
        elif m == 1:
            message = "momentum 1: only the last batch is remembered"
            yield Found(facts.path, m, message, "warning")
        elif m >= _OTHER_WAY:
            message = (
                f"momentum {m:g} weighs the new batch by {m:g}, so about {1 / m:.2f} batches are "
                f"remembered; Keras' and ONNX' {m:g} is {1 - m:.4g} here"
            )
            yield Found(facts.path, m, message, "warning")
        elif m == 0 and facts.tracks:
            message = "momentum 0: the statistics never move"
            yield Found(facts.path, m, message, "warning" if facts.never_updated else "note")


def eps_outlier(seen: Observation) -> Iterator[Found]:
    """An epsilon that no framework has, or that is far from the network's others."""
    known = [f for f in seen.batch_norms if f.eps]
    counts = Counter(f.eps for f in known if f.eps is not None and f.eps > 0)
    usual = max(counts, key=lambda e: (counts[e], -abs(math.log(e / _USUAL_EPS))), default=None)
    for facts in known:
        eps = facts.eps
        if eps is None:
            continue
        if eps < 0:
            yield Found(facts.path, eps, f"eps {eps:g} is negative", "error")
        elif not 1e-8 <= eps <= 1e-2:
            yield Found(facts.path, eps, f"eps {eps:g}; frameworks have 1e-6 to 1e-3", "warning")
        elif usual is not None and not 0.1 < eps / usual < 10:
            message = f"eps {eps:g}, where most norms of this network have {usual:g}"
            yield Found(facts.path, eps, message, "note")


def eps_zero(seen: Observation) -> Iterator[Found]:
    """No epsilon at all."""
    for facts in seen.batch_norms:
        if facts.eps != 0:
            continue
        is_half = facts.dtype in (torch.float16, torch.bfloat16)
        zeros = 0 if facts.var is None else int((facts.var == 0).sum())
        finite = [] if facts.var is None else [v for v in facts.var.tolist() if math.isfinite(v)]
        least = min(finite, default=0.0)
        what = f"{zeros} variances are zero" if zeros else f"the least variance is {least:.3g}"
        half = ", in half precision" if is_half else ""
        message = f"eps 0{half}; {what}"
        severity = "error" if is_half or zeros else "warning"
        yield Found(facts.path, least, message, severity)


def weight_decay(seen: Observation) -> Iterator[Found]:
    """Gamma and beta in a group of the optimizer that decays."""
    for path, decay in (seen.decays or {}).items():
        if not decay.held or decay.weight_decay <= 0:
            continue
        pull = decay.rate * decay.weight_decay
        half = math.log(2) / pull if pull > 0 else math.inf
        shown = f"halves them in {half:,.0f} steps" if math.isfinite(half) else "pulls on them"
        message = (
            f"weight decay {decay.weight_decay:g} on gamma and beta {shown} without a gradient"
        )
        yield Found(path, decay.weight_decay, message, "warning" if half < _FEW_STEPS else "note")


def left_out_of_optimizer(seen: Observation) -> Iterator[Found]:
    """Gamma or beta that take gradients and that no group of the optimizer has."""
    for path, decay in (seen.decays or {}).items():
        facts = seen.norms[path]
        if decay.held < decay.of and facts.batch:
            left = decay.of - decay.held
            severity = "warning" if facts.moves else "note"
            rest = ", while its statistics move" if facts.moves else ""
            message = f"{left} of gamma and beta are in no group of the optimizer{rest}"
            yield Found(path, left, message, severity)
