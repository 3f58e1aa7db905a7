"""How many bytes a training step keeps for its backward, on every side.

Counted are the storages that autograd saves, each once, without those of the parameters and
buffers, which are there anyway. That is what decides how large a batch fits; the allocator's
padding and what kernels use in passing are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..surgery.accelerating.low_memory import kept_bytes
from .results import LOW, OURS, PEERS, Row, reason_of
from .steps import COMPILING, Plan, Step, sides_of
from .timing import Measure, Ratio

__all__ = ["estimate", "run", "saved_bytes"]


def saved_bytes(step: Step) -> int:
    """The bytes that one step's forward keeps for its backward; runs both."""
    loss, size = kept_bytes(step.forward, step.model)
    loss.backward()  # type: ignore[no-untyped-call]
    return size


def estimate(chosen: Sequence[Plan], compiles: bool) -> float:
    """About how many seconds the plans take."""
    return sum((10 * plan.guess + COMPILING * compiles) * len(plan.layouts) for plan in chosen)


def run(chosen: Sequence[Plan], *, compiles: bool) -> Iterator[Row]:
    """Counts net by net; yields one row for each layout.

    Args:
        chosen: what to run.
        compiles: True to run torch.compile too.
    """
    for plan in chosen:
        for layout in plan.layouts:
            yield _counted(plan, layout, compiles)
        if compiles:
            torch._dynamo.reset()


def _counted(plan: Plan, layout: str, compiles: bool) -> Row:
    found: dict[str, Measure] = {}
    absent: dict[str, str] = {}
    for name, builder in sides_of(plan, layout, compiles, asked=(LOW,)).items():
        try:
            size = float(saved_bytes(builder()))
        except Exception as error:  # whatever one side fails with, the others go on
            absent[name] = reason_of(error)
            continue
        found[name] = Measure(size, size, size)
    ratios = {}
    if OURS in found:
        for peer in PEERS:
            if peer in found:
                ratio = found[OURS].median / found[peer].median
                ratios[peer] = Ratio(ratio, ratio, ratio)
    return Row(plan.name, layout, plan.dtype, found, ratios, absent=absent)
